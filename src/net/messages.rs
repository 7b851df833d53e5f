//! Queues of messages. They are walked with SO_PEEK_OFF, and a message without bytes that has been peeked at before is passed
//! over then (net/core/datagram.c, __skb_try_recv_from_queue): where it stands only kernel memory tells.

use std::io;
use std::os::fd::AsFd;

use anyhow::{Context, Result, bail};

use super::inet::make_address;
use super::unaccepted::Reader;
use super::unix::PeekOffset;
use super::{Met, SocketDumper};
use crate::error::Failure;
use crate::kernel::maker::Maker;
use crate::kernel::socket::{self, Received};
use crate::kernel::sockopt::{self, Queue};

/// Messages, first come first.
pub(crate) type Peeked = Vec<(Vec<u8>, Received)>;

/// How often a queue may change while it is read.
const ATTEMPTS: usize = 5;

/// What could be read of a queue.
#[derive(Default)]
pub(crate) struct Messages {
    pub all: Peeked,
    /// Without kernel memory, for this reason: some without bytes may be missing.
    pub unaided: Option<String>,
}

/// Every message of a datagram or seqpacket socket. `ended`: its peer sends no more.
pub(crate) fn peek_messages(d: &SocketDumper, met: &Met, ended: bool) -> Result<Messages> {
    let inside = d.inside.as_ref();
    let ended = ended && met.kind == libc::SOCK_SEQPACKET;
    for _ in 0..ATTEMPTS {
        let read = d.unaccepted().and_then(|kernel| {
            let standing = kernel.messages(met).map_err(|e| format!("{e:#}"))?;
            Ok((kernel, standing))
        });
        let mut walk = Walk::new(d, met, inside)?;
        match read {
            Err(why) => {
                return Ok(Messages {
                    all: walk.unaided(ended)?,
                    unaided: Some(why),
                });
            }
            Ok((kernel, standing)) => {
                if let Some(all) = walk.aided(kernel, &standing, ended)? {
                    return Ok(Messages { all, unaided: None });
                }
            }
        }
    }
    bail!("it changes while it is read; who else reads from it?");
}

/// A message in a queue: its struct sk_buff.
struct Standing {
    skb: u64,
    len: usize,
    /// A walk passes over it.
    passed: bool,
}

struct Walk<'a> {
    met: &'a Met,
    inside: Option<&'a Maker>,
    offset: PeekOffset<'a>,
    at: usize,
    buffer: Vec<u8>,
}

impl<'a> Walk<'a> {
    fn new(d: &'a SocketDumper, met: &'a Met, inside: Option<&'a Maker>) -> Result<Self> {
        Ok(Self {
            met,
            inside,
            offset: PeekOffset::new(&met.fd, &d.guardian).context("setsockopt(SO_PEEK_OFF)")?,
            at: 0,
            buffer: vec![0; 256 * 1024],
        })
    }

    /// What the next peek gives; none at the queue's end. At that of a connection it is without bytes.
    fn next(&mut self) -> Result<Option<Received>> {
        loop {
            let r = match socket::receive(&self.met.fd, &mut self.buffer, libc::MSG_PEEK) {
                Ok(r) => r,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e).context("recvmsg(MSG_PEEK)"),
            };
            if r.flags & libc::MSG_TRUNC == 0 {
                return Ok(Some(r));
            }
            self.buffer.resize(self.buffer.len() * 2, 0);
            self.offset.seek(self.at)?;
        }
    }

    /// What stands in front: without an offset it is always seen.
    fn first(&mut self) -> Result<Option<Received>> {
        self.offset.leave()?;
        let first = self.next();
        self.offset.seek(0)?;
        first
    }

    /// Puts it behind the others, with its sender by the id he has inside.
    fn take(&mut self, mut r: Received, all: &mut Peeked) -> Result<()> {
        if let (Some(inside), Some(sender)) = (self.inside, &mut r.credentials)
            // Else it would be the next one's.
            && r.len > 0
        {
            self.offset.seek(self.at)?;
            *sender = inside.sender(&self.met.fd).context("asking for a sender")?;
            self.offset.seek(self.at + r.len)?;
        }
        self.at += r.len;
        all.push((self.buffer.get(..r.len).unwrap_or_default().to_vec(), r));
        Ok(())
    }

    /// None: others stand there.
    fn aided(
        &mut self,
        kernel: &Reader,
        standing: &[Standing],
        ended: bool,
    ) -> Result<Option<Peeked>> {
        let mut all = Peeked::new();
        for s in standing {
            if s.passed {
                let mut r = kernel.empty(self.met, s.skb)?;
                if all.is_empty() {
                    let Some(seen) = self.first()?.filter(|r| r.len == 0) else {
                        return Ok(None);
                    };
                    r.fds = seen.fds;
                } else if self.met.family == libc::AF_UNIX && kernel.carries_descriptors(s.skb)? {
                    return Err(Failure::Refused.because(format!(
                        "a descriptor is in flight in message {} of it, which has no bytes: only the program can take that out; let it read its messages first",
                        all.len() + 1
                    )));
                }
                all.push((Vec::new(), r));
                continue;
            }
            let Some(mut r) = self.next()?.filter(|r| r.len == s.len) else {
                return Ok(None);
            };
            if self.inside.is_some() && r.len == 0 && r.credentials.is_some() {
                r.credentials = kernel.sender(s.skb)?;
            }
            self.take(r, &mut all)?;
        }
        // What has come since.
        while !ended && let Some(r) = self.next()? {
            self.take(r, &mut all)?;
        }
        Ok(Some(all))
    }

    fn unaided(&mut self, ended: bool) -> Result<Peeked> {
        let mut all = Peeked::new();
        // The end of a connection looks like a message without bytes.
        let end = if ended {
            Some(sockopt::queued(&self.met.fd, Queue::In).context("ioctl(SIOCINQ)")? as usize)
        } else {
            None
        };
        let is_end = |r: &Received, at| r.len == 0 && end.is_some_and(|end| at >= end);
        if let Some(r) = self.first()?
            && r.len == 0
            && !is_end(&r, 0)
        {
            self.take(r, &mut all)?;
        }
        while let Some(r) = self.next()? {
            if is_end(&r, self.at) {
                break;
            }
            self.take(r, &mut all)?;
        }
        Ok(all)
    }
}

impl Reader {
    /// What stands in the queue of a socket of messages.
    fn messages(&self, met: &Met) -> Result<Vec<Standing>> {
        let k = &self.kernel;
        let sock = self.sock(met.fd.as_fd())?;
        let mut all = Vec::new();
        if met.family != libc::AF_UNIX {
            // Read first: others come here from the other one.
            all = self.list(k.field(sock, "udp_sock", "reader_queue")?)?;
        }
        all.extend(self.list(k.field(sock, "sock", "sk_receive_queue")?)?);
        let len_at = k.field(0, "sk_buff", "len")?;
        let (peeked_at, peeked) = k.flag("sk_buff", "peeked")?;
        let one = |skb: u64| {
            let len = k.u32(skb.wrapping_add(len_at))? as usize;
            let passed = len == 0 && {
                let byte = k.read(skb.wrapping_add(peeked_at), 1)?;
                byte.first().is_some_and(|b| b & peeked != 0)
            };
            Ok(Standing { skb, len, passed })
        };
        all.into_iter().map(one).collect()
    }

    /// What a peek at a message without bytes would give; descriptors excepted.
    fn empty(&self, met: &Met, skb: u64) -> Result<Received> {
        let mut r = Received::default();
        if met.family != libc::AF_UNIX {
            r.from = self.udp_sender(met, skb)?;
            return Ok(r);
        }
        if sockopt::get_int(&met.fd, libc::SOL_SOCKET, libc::SO_PASSCRED)? != 0 {
            r.credentials = self.sender(skb)?;
        }
        let k = &self.kernel;
        let from = k.pointer(skb, "sk_buff", "sk")?;
        let address = match from {
            0 => 0,
            from => k.pointer(from, "unix_sock", "addr")?,
        };
        if address != 0 {
            let len = k.u32(k.field(address, "unix_address", "len")?)? as usize;
            let name = k.field(address, "unix_address", "name")?;
            r.from = k.read(name, len.min(size_of::<libc::sockaddr_un>()))?;
        }
        Ok(r)
    }

    /// Whom a datagram came from, as its headers say.
    fn udp_sender(&self, met: &Met, skb: u64) -> Result<Vec<u8>> {
        const LONGEST: usize = 40;
        const MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
        let k = &self.kernel;
        let head = k.pointer(skb, "sk_buff", "head")?;
        let header = |field, len| {
            // Both are 16 bits.
            let at = k.u32(k.field(skb, "sk_buff", field)?)? & 0xffff;
            k.read(head + u64::from(at), len)
        };
        let ip = header("network_header", LONGEST)?;
        let port = header("transport_header", 2)?;
        let port = port.try_into().map_or(0, u16::from_be_bytes);
        let host = match ip.first().map(|b| b >> 4) {
            Some(4) => ip.get(12..16),
            Some(6) => ip.get(8..24),
            _ => None,
        };
        let host = host.context("a datagram without a sender")?;
        if met.family == libc::AF_INET6 && host.len() == 4 {
            return Ok(make_address(&[&MAPPED[..], host].concat(), port));
        }
        Ok(make_address(host, port))
    }
}
