//! Which Landlock rules a thread has (security/landlock/cred.h): none, ours, or its own.

use std::sync::OnceLock;
use std::thread;

use anyhow::{Context, Result};

use super::KernelMemory;
use crate::kernel::landlock;

/// Bytes in which all security modules together keep what they note of a thread.
const NOTES: usize = 256;

/// Where the rules of a thread are.
#[derive(Debug)]
pub struct Rules {
    /// In struct cred: what security modules note.
    notes: u64,
    /// In that: the address of a struct landlock_ruleset.
    at: u64,
    /// This process's own, or 0.
    own: u64,
}

impl Rules {
    /// None where the kernel has no Landlock, or its memory cannot be read. The first call takes a moment.
    pub fn get() -> Option<&'static Self> {
        static ONE: OnceLock<Option<Rules>> = OnceLock::new();
        let find = || {
            let kernel = KernelMemory::get().ok().filter(|_| landlock::is_there())?;
            // What a thread does to itself goes with it.
            let found = thread::Builder::new().spawn(|| Self::find(kernel)).ok()?;
            found.join().ok()?.ok()
        };
        ONE.get_or_init(find).as_ref()
    }

    /// Modules share the notes as they are configured. The word that changes when the calling thread gets rules is theirs.
    fn find(kernel: &KernelMemory) -> Result<Self> {
        let notes = kernel.field(0, "cred", "security")?;
        let look = || -> Result<Vec<u64>> {
            let cred = kernel.pointer(kernel.current()?, "task_struct", "cred")?;
            let bytes = kernel.read(kernel.u64(cred.wrapping_add(notes))?, NOTES)?;
            let word = |b: &[u8]| b.try_into().map_or(0, u64::from_ne_bytes);
            Ok(bytes.chunks_exact(8).map(word).collect())
        };
        let layers = |rules: u64| match rules {
            0 => Ok(0),
            _ => kernel.u32(kernel.field(rules, "landlock_ruleset", "num_layers")?),
        };
        let before = look()?;
        landlock::restrict()?;
        let after = look()?;
        let is_kernel = |address: u64| (address as i64) < 0;
        let is_one_more = |(before, after): (u64, u64)| {
            (before == 0 || is_kernel(before))
                && is_kernel(after)
                && before != after
                && matches!((layers(before), layers(after)), (Ok(b), Ok(a)) if a == b + 1)
        };
        let mut pairs = before.into_iter().zip(after).enumerate();
        let (i, (own, _)) = pairs
            .find(|(_, pair)| is_one_more(*pair))
            .context("this kernel keeps Landlock's rules otherwise")?;
        let at = 8 * i as u64;
        Ok(Self { notes, at, own })
    }

    /// Whether a thread with the struct cred at `cred` has rules that we have not.
    ///
    /// # Errors
    /// When kernel memory cannot be read.
    pub fn restrict(&self, cred: u64) -> Result<bool> {
        let kernel = KernelMemory::get()?;
        let notes = kernel.u64(cred.wrapping_add(self.notes))?;
        let rules = kernel.u64(notes.wrapping_add(self.at))?;
        Ok(rules != 0 && rules != self.own)
    }
}

#[cfg(test)]
mod tests {
    use super::Rules;
    use crate::kernel::kmem::threads::Threads;
    use crate::kernel::landlock;

    #[test]
    fn a_thread_with_rules_is_known() {
        let (Some(threads), Some(rules)) = (Threads::get(), Rules::get()) else {
            return eprintln!("SKIPPED: needs CAP_BPF and Landlock");
        };
        let is_restricted = || {
            let own = threads.find(nix::unistd::gettid().as_raw()).unwrap();
            rules.restrict(threads.look(own).unwrap().cred).unwrap()
        };
        assert!(!is_restricted());
        let other = std::thread::spawn(move || {
            let before = is_restricted();
            landlock::restrict().unwrap();
            (before, is_restricted())
        });
        assert_eq!(other.join().unwrap(), (false, true));
        assert!(!is_restricted());
    }
}
