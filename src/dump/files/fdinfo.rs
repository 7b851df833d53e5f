//! /proc/PID/fdinfo/FD (proc_pid_fdinfo(5)).

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, bail};
use nix::fcntl::{self, OFlag};
use nix::sys::stat::Mode;

use crate::image::files::{Lock, LockClass};

/// What every descriptor has, and the raw lines of its kind.
#[derive(Debug, Default)]
pub struct FdInfo {
    /// Access mode and status flags, with O_CLOEXEC if the descriptor has it.
    pub flags: i32,
    pub pos: i64,
    pub locks: Vec<Lock>,
    /// All of it.
    text: String,
}

/// The directory /proc/PID/fdinfo: the way to it takes longer than one of its files.
pub struct Infos {
    path: String,
    dir: OwnedFd,
}

impl Infos {
    /// `dir` is a pid or "self".
    pub fn of(dir: &str) -> Result<Self> {
        let path = format!("/proc/{dir}/fdinfo");
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = fcntl::open(path.as_str(), flags, Mode::empty()).with_context(|| path.clone())?;
        Ok(Self { path, dir })
    }

    pub fn read(&self, fd: i32) -> Result<FdInfo> {
        let read = || -> std::io::Result<String> {
            // The processes stand still meanwhile: no call is made that is not needed.
            let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
            let name = fd.to_string();
            let mut file = File::from(fcntl::openat(
                &self.dir,
                name.as_str(),
                flags,
                Mode::empty(),
            )?);
            let mut bytes = vec![0; 1024];
            let mut n = file.read(&mut bytes)?;
            if n > bytes.len() / 2 {
                bytes.truncate(n);
                n += file.read_to_end(&mut bytes)?;
            }
            bytes.truncate(n);
            String::from_utf8(bytes).map_err(std::io::Error::other)
        };
        let path = || format!("{}/{fd}", self.path);
        FdInfo::parse(read().with_context(path)?).with_context(path)
    }
}

impl FdInfo {
    /// Reads /proc/`dir`/fdinfo/`fd`; `dir` is a pid or "self".
    pub fn read(dir: &str, fd: i32) -> Result<Self> {
        Infos::of(dir)?.read(fd)
    }

    pub fn parse(text: String) -> Result<Self> {
        let mut info = Self {
            text,
            ..Self::default()
        };
        for line in info.text.lines() {
            if let Some(rest) = line.strip_prefix("lock:") {
                info.locks.push(lock(rest)?);
            }
        }
        info.flags = i32::from_str_radix(info.text("flags")?, 8).context("flags")?;
        info.pos = info.text("pos")?.parse().context("pos")?;
        Ok(info)
    }

    /// Lines as they are.
    pub fn lines(&self) -> std::str::Lines<'_> {
        self.text.lines()
    }

    /// The text of line `name`; of several the last.
    pub fn text(&self, name: &str) -> Result<&str> {
        self.find(name)
            .with_context(|| format!("no line \"{name}:\""))
    }

    /// The same, where there need be none.
    pub fn find(&self, name: &str) -> Option<&str> {
        let mut named = self.lines().filter_map(|line| line.split_once(':'));
        let (_, value) = named.rfind(|(key, _)| key.trim() == name)?;
        Some(value.trim())
    }

    pub fn decimal<T: std::str::FromStr<Err = std::num::ParseIntError>>(
        &self,
        name: &str,
    ) -> Result<T> {
        self.text(name)?
            .parse()
            .with_context(|| format!("line \"{name}:\""))
    }

    pub fn hex(&self, name: &str) -> Result<u64> {
        u64::from_str_radix(self.text(name)?, 16).with_context(|| format!("line \"{name}:\""))
    }

    /// A pair of `seconds, nanoseconds` in brackets, in nanoseconds.
    pub fn timespec(&self, name: &str) -> Result<i64> {
        let text = self.text(name)?;
        let (s, n) = text
            .trim_matches(['(', ')'])
            .split_once(',')
            .with_context(|| format!("line \"{name}:\" is no pair"))?;
        let (s, n): (i64, i64) = (s.trim().parse()?, n.trim().parse()?);
        Ok(s.saturating_mul(1_000_000_000).saturating_add(n))
    }
}

/// `1: FLOCK  ADVISORY  WRITE 359 00:13:11691 0 EOF` (fs/locks.c, lock_get_status).
fn lock(line: &str) -> Result<Lock> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [_, class, _, kind, _, _, start, end] = fields[..] else {
        bail!("lock line \"{line}\" is not understood");
    };
    let class = match class {
        "FLOCK" => LockClass::Flock,
        "OFDLCK" => LockClass::Ofd,
        "POSIX" => LockClass::Posix,
        other => bail!("a lock of kind {other} cannot be carried; give it up first"),
    };
    let start: i64 = start.parse().context("lock start")?;
    let len = match end {
        "EOF" => 0,
        end => {
            end.parse::<i64>()
                .context("lock end")?
                .saturating_sub(start)
                + 1
        }
    };
    Ok(Lock {
        class,
        exclusive: kind == "WRITE",
        start,
        len,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_read_with_their_range() {
        let info = FdInfo::parse(
            "pos:\t5\nflags:\t02100002\nmnt_id:\t24\nino:\t9\n\
             lock:\t1: POSIX  ADVISORY  WRITE 359 00:13:11691 10 19\n\
             lock:\t2: FLOCK  ADVISORY  READ 359 00:13:11691 0 EOF\n"
                .to_owned(),
        )
        .unwrap();
        assert_eq!(info.pos, 5);
        assert_eq!(info.flags & libc::O_CLOEXEC, libc::O_CLOEXEC);
        assert_eq!(info.locks[0].len, 10);
        assert!(info.locks[0].exclusive && !info.locks[1].exclusive);
        assert_eq!(info.locks[1].class, LockClass::Flock);
    }

    #[test]
    fn a_lease_is_refused() {
        assert!(
            FdInfo::parse(
                "pos:\t0\nflags:\t00\nlock:\t1: LEASE  ACTIVE    WRITE 3 00:1:2 0 EOF\n".to_owned()
            )
            .is_err()
        );
    }
}
