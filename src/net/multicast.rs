//! Multicast groups that a socket has joined, and the interface it sends to such groups by. No call lists them: the
//! kernel tells which groups a host receives, and of each whether a socket is in it (ip(7), RFC 3678).

use std::net::Ipv6Addr;
use std::os::fd::OwnedFd;

use nix::net::if_::{if_indextoname, if_nametoindex};

use super::inet::make_address;
use super::{Met, SocketDumper};
use crate::image::Bytes;
use crate::image::sockets::{Inet, Membership};
use crate::kernel::{proc_file, sockopt};

const IP_MULTICAST_IF: i32 = 32;
const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_MSFILTER: i32 = 48;
const MCAST_EXCLUDE: u32 = 0;
const MCAST_INCLUDE: u32 = 1;
/// struct sockaddr_storage.
const STORAGE: usize = 128;
/// struct group_filter before its sources.
const FILTER: usize = 16 + STORAGE;
/// Sources of one group that are asked for at once.
const SOURCES: usize = 64;

/// A group that this host receives: the interface's index, and the address.
type Candidate = (u32, Vec<u8>);

/// Candidates of a dump, read when a socket that may have joined one is met.
#[derive(Default)]
pub(crate) struct Candidates(std::cell::OnceCell<Vec<Candidate>>);

impl Candidates {
    fn get(&self) -> &[Candidate] {
        self.0.get_or_init(|| {
            let text = |path| proc_file::text(path).unwrap_or_default();
            let mut all = parse_igmp(&text("/proc/self/net/igmp"));
            all.extend(parse_igmp6(&text("/proc/self/net/igmp6")));
            all
        })
    }
}

/// Lines of interfaces begin with an index, those of groups with a tab (net/ipv4/igmp.c, igmp_mc_seq_show).
fn parse_igmp(text: &str) -> Vec<Candidate> {
    let (mut index, mut all) = (None, Vec::new());
    for line in text.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if line.starts_with('\t') {
            let group = u32::from_str_radix(first, 16).ok();
            if let (Some(index), Some(group)) = (index, group) {
                all.push((index, group.to_ne_bytes().to_vec()));
            }
        } else {
            index = first.parse().ok();
        }
    }
    all
}

/// Index, name, address, users (net/ipv6/mcast.c, igmp6_mc_seq_show).
fn parse_igmp6(text: &str) -> Vec<Candidate> {
    let one = |line: &str| {
        let mut words = line.split_whitespace();
        let index = words.next()?.parse().ok()?;
        let group = u128::from_str_radix(words.nth(1)?, 16).ok()?;
        Some((index, Ipv6Addr::from(group).octets().to_vec()))
    };
    text.lines().filter_map(one).collect()
}

/// The option level of a group's address.
fn level(host: &[u8]) -> i32 {
    match host.len() {
        16 => libc::IPPROTO_IPV6,
        _ => libc::IPPROTO_IP,
    }
}

fn storage(host: &[u8]) -> Vec<u8> {
    let mut address = make_address(host, 0);
    address.resize(STORAGE, 0);
    address
}

/// struct group_filter.
fn filter(index: u32, group: &[u8], mode: u32, sources: &[Vec<u8>], room: usize) -> Vec<u8> {
    let mut all = Vec::with_capacity(FILTER + room * STORAGE);
    all.extend(index.to_ne_bytes());
    all.extend([0; 4]);
    all.extend(storage(group));
    all.extend(mode.to_ne_bytes());
    all.extend((room as u32).to_ne_bytes());
    for source in sources {
        all.extend(storage(source));
    }
    all.resize(FILTER + room * STORAGE, 0);
    all
}

/// The groups of a socket, and the interface it sends by where that can be known.
pub(crate) fn read(d: &SocketDumper, met: &Met, inet: &mut Inet) {
    let v4 = |host: &[u8]| host.len() == 4;
    let fits = |c: &&Candidate| v4(&c.1) || met.family == libc::AF_INET6;
    let all = d.multicast.get().iter().filter(fits);
    inet.memberships = all.filter_map(|c| membership(met, c)).collect();
    // getsockopt tells the address that it was chosen by, and none where it was chosen by index.
    let index = d.multicast_index(met);
    inet.multicast_interface = index.and_then(name);
}

/// How a socket is in a group; None: it is not.
fn membership(met: &Met, (index, group): &Candidate) -> Option<Membership> {
    let mut room = SOURCES;
    loop {
        let mut value = filter(*index, group, 0, &[], room);
        sockopt::get_with(&met.fd, level(group), MCAST_MSFILTER, &mut value).ok()?;
        let word = |at: usize| {
            value
                .get(at..)?
                .first_chunk()
                .copied()
                .map(u32::from_ne_bytes)
        };
        let (mode, count) = (word(FILTER - 8)?, word(FILTER - 4)? as usize);
        if count > room {
            room = count;
            continue;
        }
        let sources = value.get(FILTER..)?.chunks_exact(STORAGE).take(count);
        return Some(Membership {
            group: Bytes(group.clone()),
            interface: name(*index)?,
            only: mode == MCAST_INCLUDE,
            sources: sources.map(|a| Bytes(super::host(a).to_vec())).collect(),
        });
    }
}

/// Whether a membership of an image has addresses of one kind.
pub(crate) fn is_sound(m: &Membership) -> bool {
    let len = m.group.len();
    matches!(len, 4 | 16) && m.sources.iter().all(|s| s.len() == len)
}

fn name(index: u32) -> Option<String> {
    if_indextoname(index).ok()?.into_string().ok()
}

impl SocketDumper {
    /// Index of the interface that a socket sends to IPv4 groups by, if one was chosen and the kernel can be asked.
    fn multicast_index(&self, met: &Met) -> Option<u32> {
        let chosen = sockopt::get_int(&met.fd, libc::IPPROTO_IP, IP_MULTICAST_IF);
        if chosen.is_ok_and(|address| address != 0) || self.multicast.get().is_empty() {
            return None;
        }
        let reader = self.unaccepted().ok()?;
        let sock = reader.sock(std::os::fd::AsFd::as_fd(&met.fd)).ok()?;
        let at = reader.kernel.field(sock, "inet_sock", "mc_index").ok()?;
        reader.kernel.u32(at).ok().filter(|index| *index != 0)
    }
}

/// Joins the groups again.
pub(crate) fn apply(fd: &OwnedFd, inet: &Inet, warnings: &mut Vec<String>) {
    for m in &inet.memberships {
        if let Err(e) = join(fd, m) {
            warnings.push(format!(
                "multicast group {} on interface {} is not joined ({e}): what is sent to it does not arrive any more",
                super::inet::display_host(&m.group),
                m.interface
            ));
        }
    }
    if let Some(name) = &inet.multicast_interface
        && let Err(e) = send_by(fd, name)
    {
        warnings.push(format!(
            "a socket no longer sends to multicast groups by interface {name} ({e})"
        ));
    }
}

fn index(name: &str) -> std::io::Result<u32> {
    Ok(if_nametoindex(name)?)
}

fn join(fd: &OwnedFd, m: &Membership) -> std::io::Result<()> {
    let (level, index) = (level(&m.group), index(&m.interface)?);
    // struct group_req.
    let mut request = index.to_ne_bytes().to_vec();
    request.extend([0; 4]);
    request.extend(storage(&m.group));
    sockopt::set(fd, level, MCAST_JOIN_GROUP, &request)?;
    if !m.only && m.sources.is_empty() {
        return Ok(());
    }
    let mode = match m.only {
        true => MCAST_INCLUDE,
        false => MCAST_EXCLUDE,
    };
    let sources: Vec<Vec<u8>> = m.sources.iter().map(|s| s.to_vec()).collect();
    let value = filter(index, &m.group, mode, &sources, sources.len());
    sockopt::set(fd, level, MCAST_MSFILTER, &value)
}

/// struct ip_mreqn: no group, no address, an index.
fn send_by(fd: &OwnedFd, name: &str) -> std::io::Result<()> {
    let mut value = vec![0; 8];
    value.extend(index(name)?.to_ne_bytes());
    sockopt::set(fd, libc::IPPROTO_IP, IP_MULTICAST_IF, &value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_the_host_are_read() {
        let text = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                    1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n\
                    2\teth0      :     2      V3\n\t\t\t\tFB0000E0     1 0:00000000\t\t0\n";
        let groups = parse_igmp(text);
        assert_eq!(groups, [(1, vec![224, 0, 0, 1]), (2, vec![224, 0, 0, 251])]);
        let text = "1    lo              ff020000000000000000000000000001     1 0000000C 0\n";
        let groups = parse_igmp6(text);
        assert_eq!(groups.len(), 1);
        assert_eq!(groups[0].1[..2], [0xff, 2]);
    }
}
