//! Pipes and FIFOs, with what stood in them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;

use anyhow::{Context, Result, bail};
use nix::fcntl::OFlag;

use super::{Builder, paths, status_flags};
use crate::image::files::{DescriptionId, Kind, Pipe};
use crate::kernel::fds;

/// A description of a pipe, and the file of a named one.
type End<'a> = (DescriptionId, &'a Pipe, Option<u32>);

impl Builder<'_> {
    /// Builds all pipes, each with all descriptions of it.
    pub(super) fn pipes(&mut self) -> Result<()> {
        let mut pipes: BTreeMap<u64, Vec<End<'_>>> = BTreeMap::new();
        for (id, description) in self.manifest.descriptions.iter().enumerate() {
            let (pipe, file) = match &description.kind {
                Kind::Pipe(pipe) => (pipe, None),
                Kind::Fifo { file, pipe } => (pipe, Some(*file)),
                _ => continue,
            };
            let ends = pipes.entry(pipe.pipe).or_default();
            ends.push((id as DescriptionId, pipe, file));
        }
        for ends in pipes.into_values() {
            let Some(&(first, pipe, file)) = ends.first() else {
                continue;
            };
            self.pipe(pipe, file, &ends)
                .with_context(|| self.who(first))?;
        }
        Ok(())
    }

    fn pipe(&mut self, pipe: &Pipe, file: Option<u32>, ends: &[End<'_>]) -> Result<()> {
        // Both ends are held until all descriptions are open: the first to come would wait for its partner, the
        // last to go takes the content along.
        let (read, write) = match file {
            None => nix::unistd::pipe2(OFlag::O_CLOEXEC).context("pipe2")?,
            Some(file) => {
                let both = paths::open(&self.file_ref(file)?.path, libc::O_RDWR)?;
                let node = File::from(both.try_clone()?).metadata()?;
                if !node.file_type().is_fifo() {
                    bail!("{} is no FIFO any more", self.file_ref(file)?.path);
                }
                (paths::reopen(both.as_fd(), libc::O_RDONLY)?, both)
            }
        };
        let had = fds::pipe_size(write.as_fd()).context("F_GETPIPE_SZ")?;
        if had != pipe.capacity as usize
            && let Err(e) = fds::set_pipe_size(write.as_fd(), pipe.capacity as usize)
        {
            self.built.warnings.push(format!(
                "a pipe holds {had} bytes instead of {} (F_SETPIPE_SZ: {e}; see /proc/sys/fs/pipe-max-size)",
                pipe.capacity
            ));
        }
        self.fill(&write, ends)?;
        let mut given = [false; 2];
        for &(id, end, _) in ends {
            let Some(description) = self.manifest.descriptions.get(id as usize) else {
                continue;
            };
            let original = if end.write_end { &write } else { &read };
            let mode = if end.write_end {
                libc::O_WRONLY
            } else {
                libc::O_RDONLY
            };
            // The ends as pipe(2) gave them go to the first that ask; others were opened through /proc.
            let first = !std::mem::replace(&mut given[usize::from(end.write_end)], true);
            let plain = description.flags & libc::O_ACCMODE == mode;
            let fd = if first && plain && file.is_none() {
                original.try_clone()?
            } else {
                paths::reopen(original.as_fd(), description.flags)?
            };
            status_flags(fd.as_fd(), description.flags)?;
            self.keep(id, fd)?;
        }
        Ok(())
    }

    /// Writes the stored content; packets as packets.
    fn fill(&mut self, write: &OwnedFd, ends: &[End<'_>]) -> Result<()> {
        let Some((_, pipe, _)) = ends.iter().find(|(_, p, _)| !p.content.is_empty()) else {
            return Ok(());
        };
        let packets = pipe.content.len() > 1
            || ends.iter().any(|&(id, end, _)| {
                end.write_end
                    && self
                        .manifest
                        .descriptions
                        .get(id as usize)
                        .is_some_and(|d| d.flags & libc::O_DIRECT != 0)
            });
        let mut flags = libc::O_NONBLOCK;
        if packets {
            flags |= libc::O_DIRECT;
        }
        fds::set_flags(write.as_fd(), flags).context("F_SETFL")?;
        let mut writer = File::from(write.try_clone()?);
        for piece in &pipe.content {
            writer
                .write_all(piece)
                .context("what stood in the pipe does not fit into the new one")?;
        }
        fds::set_flags(write.as_fd(), 0).context("F_SETFL")?;
        Ok(())
    }
}
