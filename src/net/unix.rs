//! Unix sockets: pairs, names, connections that wait, queues with descriptors in flight.

mod dump;
mod fill;
mod names;
mod pieces;
mod restore;

pub use dump::peek_bytes;
pub(crate) use dump::{PeekOffset, in_flight, read, read_queue};
pub(crate) use fill::fill;
pub(crate) use restore::{Plan, build};

/// Longest sun_path (unix(7)).
pub(crate) const PATH_MAX: usize = 108;

/// TCP_ESTABLISHED and TCP_LISTEN, which unix sockets use too (net/tcp_states.h).
pub(crate) const ESTABLISHED: u8 = 1;
pub(crate) const LISTEN: u8 = 10;

/// Whether a name is a path; else it is abstract or empty.
pub(crate) fn is_path(name: &[u8]) -> bool {
    name.first().is_some_and(|b| *b != 0)
}

/// struct sockaddr_un of a name without a path's final zero.
pub(crate) fn address(name: &[u8]) -> Vec<u8> {
    let mut a = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    a.extend_from_slice(name);
    if is_path(name) && name.len() < PATH_MAX {
        a.push(0);
    }
    a
}

/// The name in a struct sockaddr_un.
pub(crate) fn name(address: &[u8]) -> Vec<u8> {
    strip(address.get(2..).unwrap_or_default())
}

/// sun_path without a path's final zero.
pub(crate) fn strip(path: &[u8]) -> Vec<u8> {
    if is_path(path) {
        path.split(|b| *b == 0).next().unwrap_or_default().to_vec()
    } else {
        path.to_vec()
    }
}

/// For people: abstract names with @.
pub(crate) fn display(name: &[u8]) -> String {
    match name.split_first() {
        None => "(unnamed)".to_owned(),
        Some((0, rest)) => format!("@{}", rest.escape_ascii()),
        Some(_) => String::from_utf8_lossy(name).into_owned(),
    }
}
