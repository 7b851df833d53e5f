//! A restore into this very process, and what others want from it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;

use anyhow::Result;

use crate::image::DescriptionId;
use crate::image::memory::ChangedFlags;
use crate::image::process::Process;
use crate::kernel::remote::Remote;

/// What stands in place of what the image says.
#[derive(Debug, Default)]
pub struct Replaced {
    /// Open file descriptions. Their status flags become those of the image.
    pub descriptions: BTreeMap<DescriptionId, OwnedFd>,
    /// Files that are mapped, by their index in the image's list.
    pub files: BTreeMap<u32, File>,
}

/// On whose behalf an image is restored into this very process ([`super::here`]). All but `replaced` is called
/// in the tracer.
pub trait Guest {
    /// Called once, before anything is built.
    ///
    /// # Errors
    /// Nothing has been built.
    fn replaced(&mut self) -> Result<Replaced>;

    /// We are the tracer now, a process with one thread, and nothing is built yet.
    ///
    /// # Errors
    /// Everything ends.
    fn stepped_aside(&mut self) -> Result<()>;

    /// The memory of the first process stands, but where it is filled lazily, and no mapping of ours is in it but
    /// `body`'s area; our descriptors still are open in it.
    ///
    /// # Errors
    /// Everything half-built dies.
    fn furnish(&mut self, body: &mut Remote, p: &Process) -> Result<()>;

    /// What of the image is otherwise, which may become known only now: advice and locks of the first process's
    /// mappings.
    ///
    /// # Errors
    /// Everything half-built dies.
    fn changed_flags(&mut self) -> Result<ChangedFlags>;

    /// Everything stands. True: from now on somebody else decides about these processes should we die; they are
    /// parked for him.
    ///
    /// # Errors
    /// Everything half-built dies.
    fn entrust(&mut self, pids: &[i32]) -> Result<bool>;

    /// Returns when it may run. What is open here besides what the guest has is closed already.
    ///
    /// # Errors
    /// It must not run: everything dies.
    fn may_run(&mut self, warnings: &[String]) -> Result<()>;

    /// It runs: nothing is to be decided any more.
    ///
    /// # Errors
    /// It runs all the same.
    fn runs(&mut self) -> Result<()>;
}
