//! Netlink sockets: address and groups. What was not read is lost, with a warning: it told of this host.

use anyhow::{Context, Result};

use super::{Met, options};
use crate::image::sockets::{Netlink, Socket};
use crate::kernel::{socket, sockopt};

const SOL_NETLINK: i32 = 270;
const NETLINK_ADD_MEMBERSHIP: i32 = 1;
const NETLINK_LIST_MEMBERSHIPS: i32 = 9;

pub(crate) fn read(met: &Met, warnings: &mut Vec<String>) -> Result<Netlink> {
    let name =
        socket::local_name(&met.fd).with_context(|| format!("{}: getsockname", met.place()))?;
    // struct sockaddr_nl: family, padding, pid, groups.
    let pid = name
        .get(4..8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_ne_bytes);
    // A bitmap in longs; one that is too small for the buffer is an error, so it is generous.
    let bitmap =
        sockopt::get(&met.fd, SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, 512).unwrap_or_default();
    let mut groups = Vec::new();
    for (i, byte) in bitmap.iter().enumerate() {
        for bit in 0..8 {
            if byte & (1 << bit) != 0 {
                groups.push(i as u32 * 8 + bit + 1);
            }
        }
    }
    if socket::poll_now(&met.fd)? & libc::POLLIN != 0 {
        warnings.push(format!(
            "{}: unread netlink messages are not carried",
            met.place()
        ));
    }
    Ok(Netlink { pid, groups })
}

pub(crate) fn build(
    s: &Socket,
    n: &Netlink,
    warnings: &mut Vec<String>,
) -> Result<std::os::fd::OwnedFd> {
    let fd = socket::socket(s.family, s.kind, s.protocol).context("socket(AF_NETLINK)")?;
    let mut addr = [0u8; 12];
    addr[..2].copy_from_slice(&(libc::AF_NETLINK as u16).to_ne_bytes());
    if n.pid != 0 {
        addr[4..8].copy_from_slice(&n.pid.to_ne_bytes());
        if let Err(e) = socket::bind(&fd, &addr) {
            // Another socket has that port id; it only matters to who sends to it by number.
            warnings.push(format!(
                "netlink: port id {} is taken ({e}), another was chosen",
                n.pid
            ));
            addr[4..8].fill(0);
            socket::bind(&fd, &addr).context("bind of a netlink socket")?;
        }
    }
    for group in &n.groups {
        sockopt::set(
            &fd,
            SOL_NETLINK,
            NETLINK_ADD_MEMBERSHIP,
            &group.to_ne_bytes(),
        )
        .with_context(|| format!("joining netlink group {group}"))?;
    }
    options::apply(&fd, s, options::Phase::Early, warnings);
    options::apply(&fd, s, options::Phase::Late, warnings);
    Ok(fd)
}
