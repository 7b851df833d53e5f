//! What /proc/PID/task/TID/status says of a thread: read for each of thousands while their process stands still, so only
//! what is wanted is looked at.

use std::path::Path;

use anyhow::{Context, Result};

use super::proc_file;

/// Whose a thread is, what it may do, and whether its calls are filtered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ThreadStatus {
    /// Real, effective, saved, of the file system.
    pub uids: [u32; 4],
    pub gids: [u32; 4],
    pub groups: Vec<u32>,
    pub cap_inheritable: u64,
    pub cap_permitted: u64,
    pub cap_effective: u64,
    pub cap_bounding: u64,
    pub cap_ambient: u64,
    pub no_new_privs: bool,
    /// 0: none.
    pub seccomp: u32,
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
                "Uid" => s.uids = ids(value)?.try_into().ok()?,
                "Gid" => s.gids = ids(value)?.try_into().ok()?,
                "Groups" => s.groups = ids(value)?,
                "CapInh" => s.cap_inheritable = mask()?,
                "CapPrm" => s.cap_permitted = mask()?,
                "CapEff" => s.cap_effective = mask()?,
                "CapBnd" => s.cap_bounding = mask()?,
                "CapAmb" => s.cap_ambient = mask()?,
                "NoNewPrivs" => s.no_new_privs = value != "0",
                _ => {
                    // Not every kernel has filters.
                    if name == "Seccomp" {
                        s.seccomp = value.parse().ok()?;
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
    use super::ThreadStatus;

    #[test]
    fn says_what_procfs_says() {
        let ours = ThreadStatus::read("/proc/thread-self/status").unwrap();
        let all = procfs::process::Process::myself()
            .and_then(|p| p.status())
            .unwrap();
        let theirs = ThreadStatus {
            uids: [all.ruid, all.euid, all.suid, all.fuid],
            gids: [all.rgid, all.egid, all.sgid, all.fgid],
            groups: all.groups,
            cap_inheritable: all.capinh,
            cap_permitted: all.capprm,
            cap_effective: all.capeff,
            cap_bounding: all.capbnd.unwrap(),
            cap_ambient: all.capamb.unwrap(),
            no_new_privs: all.nonewprivs == Some(1),
            seccomp: all.seccomp.unwrap_or(0),
        };
        assert_eq!(ours, theirs);
    }

    #[test]
    fn values_are_read() {
        let text = "Name:\ta\\nUid: 5\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 10 \nCapInh:\t01\nCapPrm:\t02\n\
                    CapEff:\t03\nCapBnd:\tff\nCapAmb:\t04\nNoNewPrivs:\t1\nSeccomp:\t2\n";
        let s = ThreadStatus::parse(text).unwrap();
        assert_eq!((s.uids, s.gids), ([1, 2, 3, 4], [5, 6, 7, 8]));
        assert_eq!(s.groups, [9, 10]);
        let caps = [s.cap_inheritable, s.cap_permitted, s.cap_effective];
        assert_eq!((caps, s.cap_bounding, s.cap_ambient), ([1, 2, 3], 255, 4));
        assert!(s.no_new_privs && s.seccomp == 2);
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
