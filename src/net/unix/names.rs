//! Names of unix sockets: bound, reached from another directory, or bound where nobody sees them.

use std::ffi::OsStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, bail};

use super::{PATH_MAX, address, display, is_path};
use crate::image::sockets::Unix;
use crate::kernel::socket;

/// Runs `f` in a thread of its own, whose directory and mounts it may change.
pub(super) fn aside<T: Send>(f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let helper = thread::Builder::new().spawn_scoped(scope, f);
        let helper = helper.context(crate::kernel::ONE_MORE)?;
        helper
            .join()
            .unwrap_or_else(|_| bail!("a helping thread panicked"))
    })
}

pub(super) fn path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// The directory a name lives in: of a relative name, below `base`.
fn directory(name: &[u8], base: &[u8]) -> PathBuf {
    let full = path(base).join(path(name));
    full.parent()
        .map_or_else(|| PathBuf::from("/"), Path::to_path_buf)
}

pub(super) fn base_of(u: &Unix) -> Vec<u8> {
    u.file
        .as_ref()
        .and_then(|f| f.directory.as_ref())
        .map(|d| d.to_vec())
        .unwrap_or_default()
}

/// Binds to a name. A path whose socket file is stale (nobody listens behind it) is replaced.
pub(super) fn bind(fd: &OwnedFd, u: &Unix) -> Result<()> {
    if u.name.is_empty() {
        return Ok(());
    }
    let addr = address(&u.name);
    let in_use = || format!("bind to unix socket name {}", display(&u.name));
    if !is_path(&u.name) {
        return socket::bind(fd, &addr)
            .with_context(|| format!("{}; end the program that has it now", in_use()));
    }
    let base = base_of(u);
    if u.file.as_ref().is_some_and(|f| f.unlinked) {
        return bind_unseen(fd, &u.name, &base).with_context(in_use);
    }
    let kind = crate::kernel::sockopt::get_int(fd, libc::SOL_SOCKET, libc::SO_TYPE)?;
    aside(|| {
        if !base.is_empty() {
            socket::private_directory(path(&base))
                .with_context(|| format!("directory {}", path(&base).display()))?;
        }
        let file = path(&u.name);
        match socket::bind(fd, &addr) {
            Err(e) if e.raw_os_error() == Some(libc::EADDRINUSE) && stale(file, kind, &addr) => {
                std::fs::remove_file(file)
                    .with_context(|| format!("unlink stale socket file {}", file.display()))?;
                socket::bind(fd, &addr).with_context(in_use)?;
            }
            other => other.with_context(|| {
                format!(
                    "{}; end the program that has it now, or make its directory",
                    in_use()
                )
            })?,
        }
        if let Some(f) = &u.file {
            use std::os::unix::fs::PermissionsExt;
            // What a socket file allows is part of what the program set up; owner changes need root.
            let _ = std::os::unix::fs::lchown(file, Some(f.uid), Some(f.gid));
            std::fs::set_permissions(file, std::fs::Permissions::from_mode(f.mode & 0o7777))
                .with_context(|| format!("chmod of {}", file.display()))?;
        }
        Ok(())
    })
}

/// Whether a path is a socket file that nobody has bound any more.
fn stale(file: &Path, kind: i32, addr: &[u8]) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::symlink_metadata(file).is_ok_and(|m| m.file_type().is_socket())
        && socket::socket(libc::AF_UNIX, kind, 0).is_ok_and(|probe| {
            socket::set_nonblocking(&probe, true).is_ok()
                && socket::connect(&probe, addr)
                    .is_err_and(|e| e.raw_os_error() == Some(libc::ECONNREFUSED))
        })
}

/// Binds to a path without touching the file system everybody sees, and unlinks it there.
pub(super) fn bind_unseen(fd: &OwnedFd, name: &[u8], base: &[u8]) -> Result<()> {
    if !is_path(name) {
        return Ok(socket::bind(fd, &address(name))?);
    }
    aside(|| {
        enter_unseen(name, base)?;
        socket::bind(fd, &address(name))?;
        let _ = std::fs::remove_file(path(name));
        Ok(())
    })
}

pub(super) fn enter_unseen(name: &[u8], base: &[u8]) -> Result<()> {
    let directory = directory(name, base);
    socket::private_mount(&directory)
        .with_context(|| format!("a private tmpfs over {}", directory.display()))?;
    if !base.is_empty() {
        // The directory may be the one that was covered: enter it again, through the cover.
        std::env::set_current_dir(path(base))?;
    }
    Ok(())
}

/// Address of a bound socket from here: a relative name is reached through its directory.
/// The descriptor must live as long as the address is used.
pub(super) fn reach(name: &[u8], base: &[u8]) -> Result<(Option<std::fs::File>, Vec<u8>)> {
    if base.is_empty() || !is_path(name) {
        return Ok((None, address(name)));
    }
    let directory = std::fs::File::open(path(base))
        .with_context(|| format!("open directory {}", path(base).display()))?;
    let mut short = format!("/proc/self/fd/{}/", directory.as_raw_fd()).into_bytes();
    short.extend_from_slice(name);
    if short.len() > PATH_MAX {
        bail!(
            "unix socket name {} is too long to be reached",
            display(name)
        );
    }
    Ok((Some(directory), address(&short)))
}
