//! Task identifiers of PVM: 32 bits that name a host and a slot on it.
//!
//! ```text
//! bit 31      a pvmd (alone: the own one)
//! bit 30      a group or multicast address
//! bits 18-29  host index, from 1
//! bits 0-17   slot on that host, from 1; 0 in the tid of a host or its pvmd
//! ```

use std::fmt;
use std::str::FromStr;

use pvm_abi::{TID_GROUP, TID_HOST, TID_PVMD, is_task};
use serde::{Serialize, Serializer};

use crate::error::Failure;

/// Lowest bit of the host index.
const HOST_SHIFT: u32 = 18;

/// A tid, as it goes over the wire. Prints as PVM's console does: t40002.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tid(pub u32);

impl Tid {
    /// No task: the parent of a task that was not spawned.
    pub const NONE: Tid = Tid(0);
    /// The pvmd that a task is connected to.
    pub const PVMD: Tid = Tid(TID_PVMD);

    /// Index of the host in the virtual machine; 0 for none.
    pub fn host_index(self) -> u32 {
        (self.0 & TID_HOST) >> HOST_SHIFT
    }

    /// Whether it is of the host of the master pvmd, which is the first one.
    pub fn is_master(self) -> bool {
        self.host_index() == 1
    }

    /// The tid of the host, as `pvm_config` gives it.
    pub fn host(self) -> Tid {
        Tid(self.0 & TID_HOST)
    }

    /// Number of the task on its host; 0 for hosts and pvmds.
    pub fn slot(self) -> u32 {
        self.0 & ((1 << HOST_SHIFT) - 1)
    }

    /// Whether it names a pvmd.
    pub fn is_pvmd(self) -> bool {
        self.0 & TID_PVMD != 0 && self.0 & TID_GROUP == 0
    }

    /// Whether it is the address of a group or a multicast.
    pub fn is_group(self) -> bool {
        self.0 & TID_GROUP != 0 && self.0 & TID_PVMD == 0
    }

    /// Whether it names a task: no pvmd, host or group, and not 0.
    pub fn is_task(self) -> bool {
        is_task(self.0)
    }
}

impl FromStr for Tid {
    type Err = anyhow::Error;

    /// Reads t40002, 40002 and 0x40002: always hexadecimal, as PVM writes it.
    fn from_str(text: &str) -> anyhow::Result<Tid> {
        let digits = ["t", "T", "0x", "0X"]
            .iter()
            .find_map(|prefix| text.strip_prefix(prefix))
            .unwrap_or(text);
        // from_str_radix would take a sign.
        let hexadecimal = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        u32::from_str_radix(digits, 16)
            .ok()
            .filter(|_| hexadecimal)
            .map(Tid)
            .ok_or_else(|| {
                Failure::Usage.because(format!(
                    "'{text}' is no tid: write it as PVM does, t40002 (hexadecimal)"
                ))
            })
    }
}

impl fmt::Display for Tid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("t{:x}", self.0))
    }
}

impl fmt::Debug for Tid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Tid {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_tid_is_read_as_pvm_writes_it() {
        for text in ["t40002", "40002", "0x40002", "T40002", "0X40002"] {
            assert_eq!(text.parse::<Tid>().unwrap(), Tid(0x40002), "{text}");
        }
        assert_eq!("t80000000".parse::<Tid>().unwrap(), Tid::PVMD);
    }

    #[test]
    fn what_is_no_tid_is_refused_with_its_text() {
        for text in ["", "t", "0x", "tt1", "-1", "+1", "t123456789", "h1", "4 2"] {
            let error = text.parse::<Tid>().unwrap_err();
            assert!(error.to_string().contains(&format!("'{text}'")), "{error}");
            assert_eq!(Failure::of(&error), Failure::Usage);
        }
    }

    #[test]
    fn its_parts() {
        let tid = Tid(0x80003);
        assert_eq!((tid.host_index(), tid.slot()), (2, 3));
        assert_eq!(tid.host(), Tid(0x80000));
        assert!(tid.is_task() && !tid.is_pvmd() && !tid.is_group());
        assert!(Tid::PVMD.is_pvmd() && Tid(0x8004_0000).is_pvmd());
        assert!(Tid(0x4000_0001).is_group() && !Tid(0x4000_0001).is_task());
        assert!(!Tid::NONE.is_task() && !tid.host().is_task());
        assert!(!Tid(-31i32 as u32).is_task(), "an error code");
    }

    proptest! {
        #[test]
        fn what_is_printed_can_be_read(raw: u32) {
            prop_assert_eq!(Tid(raw).to_string().parse::<Tid>().unwrap(), Tid(raw));
        }

        #[test]
        fn any_text_is_read_or_refused(text: String) {
            let _ = text.parse::<Tid>();
        }
    }
}
