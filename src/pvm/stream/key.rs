//! The key by which two hosts of one user know each other: a file that only this user can read.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::error::Failure;

/// Bytes of a key.
const LEN: usize = 32;

/// A secret: of a user (in a file), or of one move, derived from that.
#[derive(Clone, PartialEq, Eq)]
pub struct Key([u8; LEN]);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(secret)")
    }
}

impl Key {
    /// Where the user's key is: $MIST_KEY, else ~/.mist/key.
    ///
    /// # Errors
    /// When neither MIST_KEY nor HOME is set, nor the user known.
    pub fn path() -> Result<PathBuf> {
        if let Some(path) = std::env::var_os("MIST_KEY").filter(|path| !path.is_empty()) {
            return Ok(PathBuf::from(path));
        }
        let home = match std::env::var_os("HOME").filter(|home| !home.is_empty()) {
            Some(home) => PathBuf::from(home),
            None => {
                nix::unistd::User::from_uid(nix::unistd::geteuid())
                    .context("cannot look up this user (getpwuid)")?
                    .context("this user has no home directory; set MIST_KEY")?
                    .dir
            }
        };
        Ok(home.join(".mist/key"))
    }

    /// The user's key; made when there is none.
    ///
    /// # Errors
    /// `Refused` when others can read or change the file, or it is another user's; when it cannot be read or made.
    pub fn of_user() -> Result<Key> {
        Key::at(&Key::path()?)
    }

    /// The key in a file; made when there is none.
    ///
    /// # Errors
    /// As for [`Key::of_user`].
    pub fn at(path: &Path) -> Result<Key> {
        for _ in 0..2 {
            match File::open(path) {
                Ok(file) => return read(file, path),
                Err(e) if e.kind() == ErrorKind::NotFound => make(path)
                    .with_context(|| format!("cannot make the key file {}", path.display()))?,
                Err(e) => {
                    return Err(e)
                        .with_context(|| format!("cannot open the key file {}", path.display()));
                }
            }
        }
        bail!("the key file {} vanishes", path.display())
    }

    /// The key for one purpose, named by `id`: who knows it knows no other.
    pub fn derive(&self, id: &str) -> Key {
        let mut hasher = blake3::Hasher::new_derive_key("mist 2026 stream of a moving task");
        hasher.update(&self.0).update(id.as_bytes());
        Key(*hasher.finalize().as_bytes())
    }

    /// As text.
    pub fn to_hex(&self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }

    /// From text.
    ///
    /// # Errors
    /// When it is no key.
    pub fn from_hex(text: &str) -> Result<Key> {
        match blake3::Hash::from_hex(text) {
            Ok(bytes) => Ok(Key(*bytes.as_bytes())),
            // Whatever it is, it is not printed.
            Err(_) => bail!("a key has {} hexadecimal digits", 2 * LEN),
        }
    }

    pub(super) fn bytes(&self) -> &[u8; LEN] {
        &self.0
    }
}

fn read(file: File, path: &Path) -> Result<Key> {
    let name = path.display();
    let meta = file
        .metadata()
        .with_context(|| format!("cannot look at the key file {name}"))?;
    if meta.uid() != nix::unistd::geteuid().as_raw() {
        return Err(Failure::Refused.because(format!("the key file {name} is another user's")));
    }
    if meta.mode() & 0o077 != 0 {
        return Err(Failure::Refused.because(format!(
            "others can read or change the key file {name} (mode {:o}); whoever could may know the key: `rm {name}` on every host, and a new one is made",
            meta.mode() & 0o7777
        )));
    }
    let mut text = String::new();
    file.take(4096)
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read the key file {name}"))?;
    Key::from_hex(text.trim()).with_context(|| format!("the key file {name} holds no key"))
}

/// Makes one under another name first: whoever finds it finds all of it.
fn make(path: &Path) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("cannot make {}", dir.display()))?;
    let mut bytes = [0; LEN];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .context("/dev/urandom")?;
    let key = Key(bytes);
    let host = nix::unistd::gethostname().unwrap_or_default();
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(
        ".{}.{}",
        host.to_string_lossy(),
        std::process::id()
    ));
    let scratch = path.with_file_name(name);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&scratch)
        .with_context(|| format!("cannot make {}", scratch.display()))?;
    let written = writeln!(file, "{}", key.to_hex())
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::hard_link(&scratch, path));
    let _ = fs::remove_file(&scratch);
    match written {
        // Another has been faster: his counts.
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(()),
        other => other.with_context(|| format!("cannot write {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn it_is_made_once_and_for_this_user_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/key");
        let key = Key::at(&path).unwrap();
        assert_eq!(key, Key::at(&path).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        let left = fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(left, 1);
        assert_ne!(key, Key::at(&dir.path().join("other")).unwrap());
    }

    #[test]
    fn one_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        Key::at(&path).unwrap();
        for mode in [0o640, 0o604, 0o620] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = Key::at(&path).unwrap_err();
            assert_eq!(Failure::of(&error), Failure::Refused, "{error:#}");
        }
    }

    #[test]
    fn one_that_is_none_is_refused_and_not_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .unwrap()
            .write_all(b"hush")
            .unwrap();
        let error = format!("{:#}", Key::at(&path).unwrap_err());
        assert!(
            error.contains("holds no key") && !error.contains("hush"),
            "{error}"
        );
    }

    #[test]
    fn each_move_has_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let key = Key::at(&dir.path().join("key")).unwrap();
        assert_eq!(key.derive("a"), key.derive("a"));
        assert_ne!(key.derive("a"), key.derive("b"));
        assert_eq!(
            Key::from_hex(&key.derive("a").to_hex()).unwrap(),
            key.derive("a")
        );
        assert!(!format!("{key:?}").contains(&key.to_hex()));
    }
}
