//! What /proc/PID/task/TID/status says of a thread: read for each of thousands while their process stands still, so only
//! what is wanted is looked at.

use std::path::Path;

use anyhow::{Context, Result};

use super::proc_file;
use crate::image::process::Creds;

/// Whose a thread is, what it may do, and whether its calls are filtered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ThreadStatus {
    /// But for the securebits, which only the thread itself knows.
    pub creds: Creds,
    /// 0: none.
    pub seccomp: u32,
    /// Of its process.
    pub umask: Option<u32>,
    /// Of its process: some of its memory is locked.
    pub locked: bool,
    /// Of its process: it is the init of its pid namespace.
    pub is_init: bool,
}

impl ThreadStatus {
    /// # Errors
    /// When the file cannot be read, or is of another form.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = proc_file::read(path).with_context(|| format!("reading {}", path.display()))?;
        // A thread's name may be any bytes.
        Self::parse(&String::from_utf8_lossy(&bytes))
            .with_context(|| format!("{} is not as expected", path.display()))
    }

    fn parse(text: &str) -> Option<Self> {
        const WANTED: usize = 9;
        let mut s = Self::default();
        let mut seen = 0;
        for line in text.lines() {
            // A line end in a thread's name is shown as two characters.
            let Some((name, value)) = line.split_once(':') else {
                continue;
            };
            let value = value.trim_ascii();
            let mask = || u64::from_str_radix(value, 16).ok();
            match name {
                "Uid" => s.creds.uids = ids(value)?.try_into().ok()?,
                "Gid" => s.creds.gids = ids(value)?.try_into().ok()?,
                "Groups" => s.creds.groups = ids(value)?,
                "CapInh" => s.creds.cap_inheritable = mask()?,
                "CapPrm" => s.creds.cap_permitted = mask()?,
                "CapEff" => s.creds.cap_effective = mask()?,
                "CapBnd" => s.creds.cap_bounding = mask()?,
                "CapAmb" => s.creds.cap_ambient = mask()?,
                "NoNewPrivs" => s.creds.no_new_privs = value != "0",
                _ => {
                    // Not every kernel has filters.
                    match name {
                        "Seccomp" => s.seccomp = value.parse().ok()?,
                        "Umask" => s.umask = u32::from_str_radix(value, 8).ok(),
                        "VmLck" => s.locked = !value.starts_with("0 "),
                        "NStgid" => s.is_init = value.split_ascii_whitespace().last() == Some("1"),
                        _ => {}
                    }
                    continue;
                }
            }
            seen += 1;
        }
        (seen == WANTED).then_some(s)
    }
}

fn ids(text: &str) -> Option<Vec<u32>> {
    text.split_ascii_whitespace()
        .map(|id| id.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{Creds, ThreadStatus};

    #[test]
    fn says_what_procfs_says() {
        let ours = ThreadStatus::read("/proc/thread-self/status").unwrap();
        let all = procfs::process::Process::myself()
            .and_then(|p| p.status())
            .unwrap();
        let creds = Creds {
            uids: [all.ruid, all.euid, all.suid, all.fuid],
            gids: [all.rgid, all.egid, all.sgid, all.fgid],
            groups: all.groups,
            cap_inheritable: all.capinh,
            cap_permitted: all.capprm,
            cap_effective: all.capeff,
            cap_bounding: all.capbnd.unwrap(),
            cap_ambient: all.capamb.unwrap(),
            securebits: 0,
            no_new_privs: all.nonewprivs == Some(1),
        };
        let theirs = ThreadStatus {
            creds,
            seccomp: all.seccomp.unwrap_or(0),
            umask: all.umask,
            locked: all.vmlck != Some(0),
            is_init: all.nstgid.and_then(|ids| ids.last().copied()) == Some(1),
        };
        assert_eq!(ours, theirs);
    }

    #[test]
    fn values_are_read() {
        let text = "Name:\ta\\nUid: 5\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 10 \nCapInh:\t01\nCapPrm:\t02\n\
                    CapEff:\t03\nCapBnd:\tff\nCapAmb:\t04\nNoNewPrivs:\t1\nSeccomp:\t2\n";
        let s = ThreadStatus::parse(text).unwrap();
        let wanted = Creds {
            uids: [1, 2, 3, 4],
            gids: [5, 6, 7, 8],
            groups: vec![9, 10],
            cap_inheritable: 1,
            cap_permitted: 2,
            cap_effective: 3,
            cap_bounding: 255,
            cap_ambient: 4,
            securebits: 0,
            no_new_privs: true,
        };
        assert_eq!((s.creds, s.seccomp), (wanted, 2));
        assert_eq!(ThreadStatus::parse("Uid:\t1\t2\t3\t4\n"), None);
        assert_eq!(
            ThreadStatus::parse(&text.replace("\t4\nGid", "\nGid")),
            None
        );
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,300}") {
            let _ = ThreadStatus::parse(&text);
        }
    }
}
