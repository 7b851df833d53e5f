//! Where the tid table of a pvmd lies: next to the socket that pvmd listens on, in a file whose name
//! holds what tells this pvmd from an earlier one at the same path. So two virtual machines of one
//! user, or two of them one after the other, never see each other's table.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use crate::table;

/// The file in which a pvmd leaves its address: `$PVM_TMP/pvmd.UID[.VMID]`, as libpvm's
/// `pvmdsockfile()` makes it. `tmp` and `vmid` are the environment's PVM_TMP and PVM_VMID.
pub fn address_file(tmp: Option<&OsStr>, uid: u32, vmid: Option<&OsStr>) -> PathBuf {
    let mut name = OsString::from(format!("pvmd.{uid}"));
    if let Some(vmid) = vmid {
        name.push(".");
        name.push(vmid);
    }
    Path::new(tmp.unwrap_or(OsStr::new("/tmp"))).join(name)
}

/// The address file of the pvmd that this process would enrol with.
pub fn own_address_file() -> PathBuf {
    // SAFETY: geteuid has no preconditions and cannot fail.
    let uid = unsafe { libc::geteuid() };
    let (tmp, vmid) = (std::env::var_os("PVM_TMP"), std::env::var_os("PVM_VMID"));
    address_file(tmp.as_deref(), uid, vmid.as_deref())
}

/// What to name the table after: the pvmd's Unix socket (`pvmsock`, the environment's PVMSOCK, if it
/// is a path; else the first line of `address_file`, if that is one), else the address file itself.
pub fn anchor(pvmsock: Option<&OsStr>, address_file: &Path) -> PathBuf {
    if let Some(path) = pvmsock.filter(|path| path.as_bytes().starts_with(b"/")) {
        return PathBuf::from(path);
    }
    let mut line = Vec::new();
    if let Ok(file) = File::open(address_file)
        && BufReader::new(file).read_until(b'\n', &mut line).is_ok()
        && line.starts_with(b"/")
    {
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        return PathBuf::from(OsString::from_vec(line));
    }
    address_file.to_owned()
}

/// Path of the table that belongs to `anchor`: its name, `.mist-`, and a hash of inode and change
/// time, which differ for a pvmd started later at the same path.
///
/// # Errors
/// When `anchor` cannot be looked at; most often no pvmd runs there.
pub fn table_path(anchor: &Path) -> io::Result<PathBuf> {
    let meta = fs::metadata(anchor)?;
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325; // FNV-1a
    for word in [meta.ino(), meta.ctime() as u64, meta.ctime_nsec() as u64] {
        for byte in word.to_le_bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
    let mut path = anchor.as_os_str().to_owned();
    path.push(format!(".mist-{hash:016x}"));
    Ok(PathBuf::from(path))
}

/// Opens the table at `path` for reading and writing; makes it (readable by this user alone) when it
/// is not there.
///
/// # Errors
/// Those of open; PermissionDenied when the file is someone else's or others may use it.
pub fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
        .open(path)?;
    let meta = file.metadata()?;
    // SAFETY: geteuid has no preconditions and cannot fail.
    let uid = unsafe { libc::geteuid() };
    if !meta.is_file() || meta.uid() != uid || meta.mode() & 0o077 != 0 {
        return Err(io::Error::from(io::ErrorKind::PermissionDenied));
    }
    if meta.len() < table::SIZE as u64 {
        file.set_len(table::SIZE as u64)?;
    }
    Ok(file)
}

/// Takes away the tables in the folder of `table` that are this user's and whose pvmd is gone, or is
/// another one by now. What cannot be looked at or removed stays.
pub fn sweep(table: &Path) {
    let Some(entries) = table.parent().and_then(|dir| fs::read_dir(dir).ok()) else {
        return;
    };
    // SAFETY: geteuid has no preconditions and cannot fail.
    let uid = unsafe { libc::geteuid() };
    for entry in entries.flatten() {
        let path = entry.path();
        let name = path.as_os_str().as_bytes();
        let Some(at) = name.windows(6).rposition(|part| part == b".mist-") else {
            continue;
        };
        let anchor = Path::new(OsStr::from_bytes(name.get(..at).unwrap_or_default()));
        let gone = match table_path(anchor) {
            Ok(present) => present != path,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        let ours = entry
            .metadata()
            .is_ok_and(|meta| meta.uid() == uid && meta.is_file());
        let length = entry
            .metadata()
            .is_ok_and(|meta| meta.len() == table::SIZE as u64);
        if gone && ours && length {
            // It may have been removed meanwhile; either way it is gone.
            let _ = fs::remove_file(&path);
        }
    }
}

/// The folder of a lander's in the agent's (`dir`, the table's path with `.d`): it bears the name of the move, and who
/// spawned the task.
pub fn folder(dir: &Path, id: &str, parent: u32) -> PathBuf {
    dir.join(format!("{id}.{parent:x}"))
}

/// Where a lander is started: in its [`folder`] a link that bears the name of the task, as pvmd is to know it:
/// [`spawned_as`] finds both again.
pub fn link(dir: &Path, id: &str, parent: u32, program: &str) -> PathBuf {
    let mut path = folder(dir, id, parent).into_os_string();
    // pvmd has no name for a task that was started by hand; and one that leads elsewhere would be no link of ours.
    let plain = Path::new(program)
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::RootDir));
    let name = match Path::new(program).file_name() {
        _ if program.is_empty() || program.ends_with('/') => OsStr::new(NAMELESS),
        Some(_) if plain => OsStr::new(program),
        Some(name) => name,
        None => OsStr::new(NAMELESS),
    };
    path.push("/");
    path.push(name);
    PathBuf::from(path)
}

/// What stands for no name in [`link`].
const NAMELESS: &str = "-";

/// Who spawned a task whose name for its pvmd is `name`, and what as, if that is a [`link`]: for its pvmd an agent has.
pub fn spawned_as(name: &[u8]) -> Option<(u32, &[u8])> {
    const FOLDER: &[u8] = b".mist-";
    const HASH: usize = 16;
    let at = name.windows(FOLDER.len()).position(|part| part == FOLDER)?;
    let (hash, rest) = name.get(at + FOLDER.len()..)?.split_at_checked(HASH)?;
    let rest = rest.strip_prefix(b".d/")?;
    let end = rest.iter().position(|byte| *byte == b'/')?;
    let (folder, rest) = rest.split_at_checked(end)?;
    let (_, parent) = std::str::from_utf8(folder).ok()?.split_once('.')?;
    let parent = u32::from_str_radix(parent, 16).ok()?;
    if !hash.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    match rest.get(1..)? {
        program if program == NAMELESS.as_bytes() => Some((parent, b"")),
        program => Some((parent, program)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_has_the_name_it_had_before_it_came() {
        let dir = Path::new("/tmp/pvmd.7.mist-0123456789abcdef.d");
        let named = |program: &str| {
            let path = link(dir, "4-5-6", 0x40002, program);
            let (parent, name) = spawned_as(path.as_os_str().as_bytes()).expect("a link");
            assert_eq!(parent, 0x40002);
            String::from_utf8(name.to_vec()).unwrap()
        };
        for same in ["", "ring", "/usr/bin/ring", "sub/ring"] {
            assert_eq!(named(same), same);
        }
        assert_eq!(named("../../ring"), "ring");
        assert_eq!(named(".."), "");
        for other in [
            "",
            "ring",
            "/usr/bin/ring",
            "/x.mist-/ring",
            "/x.mist-0123456789abcdef.d/1",
            "/x.mist-0123456789abcdef.d/1.z/ring",
        ] {
            assert_eq!(spawned_as(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn the_address_file_is_where_libpvm_looks() {
        let path = |tmp, vmid| {
            address_file(
                Option::map(tmp, OsStr::new),
                7,
                Option::map(vmid, OsStr::new),
            )
        };
        assert_eq!(path(None::<&str>, None::<&str>), Path::new("/tmp/pvmd.7"));
        assert_eq!(path(Some("/x"), Some("a")), Path::new("/x/pvmd.7.a"));
    }

    #[test]
    fn pvmsock_wins_only_when_it_is_a_path() {
        let nowhere = Path::new("/nonexistent/pvmd.7");
        assert_eq!(
            anchor(Some(OsStr::new("/tmp/s")), nowhere),
            Path::new("/tmp/s")
        );
        assert_eq!(anchor(Some(OsStr::new("7f000001:1234")), nowhere), nowhere);
    }

    #[test]
    fn a_socket_made_anew_has_another_table() {
        let dir = std::env::temp_dir().join(format!("mist-place-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let anchor = dir.join("socket");
        fs::write(&anchor, "").unwrap();
        let first = table_path(&anchor).unwrap();
        assert_eq!(first, table_path(&anchor).unwrap());
        fs::write(dir.join("other"), "").unwrap();
        fs::rename(dir.join("other"), &anchor).unwrap();
        assert_ne!(first, table_path(&anchor).unwrap());
        fs::remove_dir_all(&dir).unwrap();
    }
}
