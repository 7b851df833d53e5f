//! Where a pvmd listens, and reaching it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use pvm_abi::place;

use super::PATIENCE;

/// Where a pvmd listens.
#[derive(Clone, Debug)]
pub struct Pvmd {
    address: Address,
    /// For errors: the address, and where it was found.
    pub(super) name: String,
    /// Folder for the files by which task and pvmd prove who they are.
    pub(super) tmp: PathBuf,
}

#[derive(Clone, Debug)]
enum Address {
    Unix(PathBuf),
    Tcp(SocketAddrV4),
}

impl Pvmd {
    /// The pvmd that a task with this process's environment (PVMSOCK, PVM_TMP, PVM_VMID) enrols with; none when
    /// no pvmd has left its address. It may have died since.
    ///
    /// # Errors
    /// When the file with the address cannot be read, or holds none.
    pub fn find() -> Result<Option<Pvmd>> {
        let sock = std::env::var_os("PVMSOCK").filter(|sock| !sock.is_empty());
        Pvmd::find_at(sock.as_deref(), &place::own_address_file())
    }

    /// The same, given PVMSOCK and the file in which the pvmd leaves its address.
    ///
    /// # Errors
    /// As for [`Pvmd::find`].
    pub fn find_at(sock: Option<&OsStr>, file: &Path) -> Result<Option<Pvmd>> {
        let tmp = file.parent().unwrap_or(Path::new("/tmp")).to_owned();
        let (line, from) = match sock {
            Some(sock) => (sock.to_owned(), "PVMSOCK".to_owned()),
            None => match first_line(file) {
                Ok(line) => (line, file.display().to_string()),
                Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
                Err(e) => {
                    return Err(e).with_context(|| {
                        format!("cannot read the pvmd's address from {}", file.display())
                    });
                }
            },
        };
        let address = Address::of(&line).with_context(|| {
            format!(
                "{from} holds no address of a pvmd: '{}'",
                line.to_string_lossy()
            )
        })?;
        let name = format!("the pvmd at {} ({from})", line.to_string_lossy());
        Ok(Some(Pvmd { address, name, tmp }))
    }

    /// Path of the tid table of this pvmd's tasks, see docs/shim.md.
    ///
    /// # Errors
    /// When the pvmd is gone.
    pub fn table_path(&self) -> Result<PathBuf> {
        let sock = match &self.address {
            Address::Unix(path) => Some(path.as_os_str()),
            Address::Tcp(_) => None,
        };
        crate::pvm::table::path_for(sock, &place::own_address_file())
    }

    /// Connects; the socket does not block.
    pub(super) fn connect(&self, limit: Duration) -> Result<OwnedFd> {
        let family = match self.address {
            Address::Unix(_) => AddressFamily::Unix,
            Address::Tcp(_) => AddressFamily::Inet,
        };
        let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
            .context("cannot make a socket")?;
        // connect(2) heeds it too; a listener whose queue is full would let it wait for ever.
        let limit = TimeVal::milliseconds(limit.as_millis().clamp(1, 3_600_000) as i64);
        setsockopt(&fd, sockopt::SendTimeout, &limit).context("cannot set SO_SNDTIMEO")?;
        match &self.address {
            Address::Unix(path) => connect(fd.as_raw_fd(), &UnixAddr::new(path.as_path())?),
            Address::Tcp(to) => connect(fd.as_raw_fd(), &SockaddrIn::from(*to)),
        }
        .with_context(|| format!("cannot connect to {}", self.name))?;
        if matches!(self.address, Address::Tcp(_)) {
            setsockopt(&fd, sockopt::TcpNoDelay, &true).context("cannot set TCP_NODELAY")?;
        }
        nix::fcntl::fcntl(
            &fd,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )
        .context("cannot set O_NONBLOCK")?;
        Ok(fd)
    }

    /// Whether nobody listens there any more: the pvmd died and left its files behind.
    ///
    /// # Errors
    /// When that cannot be told.
    pub fn is_dead(&self) -> Result<bool> {
        match self.connect(PATIENCE) {
            Ok(_) => Ok(false),
            Err(e) => match e.downcast_ref::<Errno>() {
                Some(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(true),
                _ => Err(e),
            },
        }
    }
}

fn first_line(file: &Path) -> std::io::Result<OsString> {
    let mut text = Vec::new();
    File::open(file)?.take(4096).read_to_end(&mut text)?;
    let line = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
    Ok(OsStr::from_bytes(line).to_owned())
}

impl Address {
    /// A path, or an internet address and port in hexadecimal: 7f000001:e10a.
    fn of(line: &OsStr) -> Option<Address> {
        if line.as_bytes().starts_with(b"/") {
            return Some(Address::Unix(PathBuf::from(line)));
        }
        let (host, port) = line.to_str()?.split_once(':')?;
        let host = u32::from_str_radix(host, 16).ok()?;
        let port = u16::from_str_radix(port, 16).ok()?;
        Some(Address::Tcp(SocketAddrV4::new(Ipv4Addr::from(host), port)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pvm::client::Client;

    #[test]
    fn addresses_are_paths_or_hexadecimal() {
        let of = |text: &str| Address::of(OsStr::new(text));
        assert!(matches!(of("/tmp/x"), Some(Address::Unix(path)) if path == Path::new("/tmp/x")));
        assert!(matches!(
            of("7f000001:e10a"),
            Some(Address::Tcp(to)) if to == SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0xe10a)
        ));
        for wrong in ["", "x", "7f000001", "7f000001:", ":1", "7f000001:10000"] {
            assert!(of(wrong).is_none(), "{wrong}");
        }
    }

    #[test]
    fn no_file_means_no_pvmd_and_nonsense_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pvmd.7");
        assert!(Pvmd::find_at(None, &file).unwrap().is_none());
        std::fs::write(&file, "what\n").unwrap();
        let error = Pvmd::find_at(None, &file).unwrap_err().to_string();
        assert!(error.contains("pvmd.7 holds no address"), "{error}");
        std::fs::write(&file, "/nonexistent/socket\n").unwrap();
        assert!(
            Pvmd::find_at(None, &file)
                .unwrap()
                .unwrap()
                .is_dead()
                .unwrap()
        );
    }

    #[test]
    fn a_listener_that_says_nothing_is_no_pvmd() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut peer, _) = listener.accept().unwrap();
            let mut some = [0; 10];
            peer.read_exact(&mut some).unwrap();
            // Here the connection ends.
        });
        let sock = path.as_os_str().to_owned();
        let pvmd = Pvmd::find_at(Some(&sock), &dir.path().join("pvmd.7"))
            .unwrap()
            .unwrap();
        let error = format!("{:#}", Client::enrol(&pvmd, 0).err().unwrap());
        server.join().unwrap();
        assert!(error.contains("cannot enrol with the pvmd at"), "{error}");
        assert!(error.contains("(PVMSOCK)"), "{error}");
        let left = std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(left, 1, "only the socket is left");
    }
}
