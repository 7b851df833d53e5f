//! Connections that a listening socket has not given out yet. No system call tells what is in them, and to accept
//! one cannot be undone; so their queues are read where they are, in kernel memory. Messages without bytes
//! ([`super::messages`]) too.

use std::os::fd::BorrowedFd;

use anyhow::{Context, Result, bail};

use crate::image::Bytes;
use crate::image::sockets::UnixMessage;
use crate::kernel::kmem::KernelMemory;
use crate::kernel::kmem::threads::Threads;

/// More in one connection is not believed.
const MOST_BYTES: usize = 1 << 30;
const MOST_PIECES: usize = 1 << 20;

/// Reads queues.
pub(crate) struct Reader {
    pub(super) kernel: &'static KernelMemory,
    /// A process in the pid namespace of the dumped ones, when that is not ours.
    inside: Option<i32>,
}

/// The accepting end of a TCP connection.
pub(crate) struct Child {
    /// The client: address (4 or 16 bytes) and port.
    pub host: Vec<u8>,
    pub port: u16,
    pub data: Vec<u8>,
    /// The sequence number it awaits.
    pub next: u32,
}

impl Reader {
    /// # Errors
    /// No privilege, or a kernel that cannot.
    pub fn new(inside: Option<i32>) -> Result<Self> {
        Ok(Self {
            kernel: KernelMemory::get()?,
            inside,
        })
    }

    /// The struct sock behind a descriptor of this process.
    pub(super) fn sock(&self, fd: BorrowedFd<'_>) -> Result<u64> {
        let k = &self.kernel;
        let socket = k.pointer(k.file(fd)?, "file", "private_data")?;
        k.pointer(socket, "socket", "sk")
    }

    /// Whether a program chooses among the sockets that share a port with this one.
    pub(super) fn is_chosen_by_program(&self, fd: BorrowedFd<'_>) -> Result<bool> {
        let k = &self.kernel;
        let group = k.pointer(self.sock(fd)?, "sock", "sk_reuseport_cb")?;
        Ok(group != 0 && k.pointer(group, "sock_reuseport", "prog")? != 0)
    }

    /// Whether a TCP socket has keys to sign with (TCP_MD5SIG). Kernels that cannot do so say no.
    pub(super) fn is_signed(&self, fd: BorrowedFd<'_>) -> bool {
        let k = &self.kernel;
        let look = || -> Result<bool> {
            let keys = k.pointer(self.sock(fd)?, "tcp_sock", "md5sig_info")?;
            Ok(keys != 0 && k.pointer(keys, "tcp_md5sig_info", "head")? != 0)
        };
        look().unwrap_or(false)
    }

    /// The buffers in the receive queue of a struct sock.
    fn queue(&self, sock: u64) -> Result<Vec<u64>> {
        self.list(self.kernel.field(sock, "sock", "sk_receive_queue")?)
    }

    /// The buffers in a struct sk_buff_head.
    pub(super) fn list(&self, head: u64) -> Result<Vec<u64>> {
        let next = self.kernel.field(0, "sk_buff", "next")?;
        let mut all = Vec::new();
        let mut at = self.kernel.u64(head)?;
        while at != head {
            all.push(at);
            at = self.kernel.u64(at.wrapping_add(next))?;
            if all.len() > MOST_PIECES {
                bail!("a queue without an end");
            }
        }
        Ok(all)
    }

    /// What a buffer holds.
    fn bytes(&self, skb: u64) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        let mut todo = vec![skb];
        while let Some(skb) = todo.pop() {
            self.append(skb, &mut all, &mut todo)?;
            if all.len() > MOST_BYTES {
                bail!("a connection with more than {MOST_BYTES} bytes in it");
            }
        }
        Ok(all)
    }

    fn append(&self, skb: u64, all: &mut Vec<u8>, todo: &mut Vec<u64>) -> Result<()> {
        const FRAGMENT: u64 = 16; // skb_frag_t: page, length, offset
        let k = &self.kernel;
        let number = |field| k.u32(k.field(skb, "sk_buff", field)?);
        let (len, elsewhere, end) = (number("len")?, number("data_len")?, number("end")?);
        let linear = len.saturating_sub(elsewhere) as usize;
        all.extend(k.read(k.pointer(skb, "sk_buff", "data")?, linear)?);
        if elsewhere == 0 {
            return Ok(());
        }
        let info = k.pointer(skb, "sk_buff", "head")? + u64::from(end);
        let fragments = k.read(k.field(info, "skb_shared_info", "nr_frags")?, 1)?;
        let fragments = u64::from(fragments.first().copied().unwrap_or(0));
        let first = k.field(info, "skb_shared_info", "frags")?;
        let mut list = k.pointer(info, "skb_shared_info", "frag_list")?;
        for i in 0..fragments {
            let at = first + i * FRAGMENT;
            let (page, len, offset) = (k.u64(at)?, k.u32(at + 8)?, k.u32(at + 12)?);
            if page & 3 != 0 {
                bail!("its data is in a device's memory");
            }
            all.extend(k.read(k.page(page)? + u64::from(offset), len as usize)?);
        }
        let begin = todo.len();
        while list != 0 && todo.len() < MOST_PIECES {
            todo.push(list);
            list = k.pointer(list, "sk_buff", "next")?;
        }
        if let Some(new) = todo.get_mut(begin..) {
            new.reverse();
        }
        Ok(())
    }

    /// What is in each connection that a listening unix socket has not given out, first come first.
    pub fn unix(&self, listener: BorrowedFd<'_>) -> Result<Vec<Vec<UnixMessage>>> {
        let listener = self.sock(listener)?;
        let mut all = Vec::new();
        for waiting in self.queue(listener)? {
            let end = self.kernel.pointer(waiting, "sk_buff", "sk")?;
            let mut messages = Vec::new();
            for skb in self.queue(end)? {
                messages.push(self.unix_message(skb)?);
            }
            all.push(messages);
        }
        Ok(all)
    }

    fn unix_message(&self, skb: u64) -> Result<UnixMessage> {
        let data = Bytes(self.bytes(skb)?);
        if self.carries_descriptors(skb)? {
            bail!("a descriptor is in flight in it");
        }
        Ok(UnixMessage {
            data,
            credentials: self.sender(skb)?,
            ..UnixMessage::default()
        })
    }

    /// Whether a unix socket's message has descriptors with it.
    pub(super) fn carries_descriptors(&self, skb: u64) -> Result<bool> {
        let k = &self.kernel;
        let cb = k.field(skb, "sk_buff", "cb")?;
        Ok(k.pointer(cb, "unix_skb_parms", "fp")? != 0)
    }

    /// The credentials in a unix socket's message: pid, uid, gid.
    pub(super) fn sender(&self, skb: u64) -> Result<Option<(i32, u32, u32)>> {
        let k = &self.kernel;
        let cb = k.field(skb, "sk_buff", "cb")?;
        let pid = k.pointer(cb, "unix_skb_parms", "pid")?;
        let number = |field| k.u32(k.field(cb, "unix_skb_parms", field)?);
        if pid == 0 {
            return Ok(None);
        }
        Ok(Some((self.pid(pid)?, number("uid")?, number("gid")?)))
    }

    /// The number of a struct pid in our own pid namespace, or inside.
    fn pid(&self, pid: u64) -> Result<i32> {
        let k = &self.kernel;
        let task = match self.inside {
            None => k.current()?,
            Some(tid) => {
                let threads = Threads::get().context("kernel memory cannot be read")?;
                threads.find(tid)?.0
            }
        };
        let own = k.pointer(task, "task_struct", "thread_pid")?;
        let level = u64::from(k.u32(k.field(own, "pid", "level")?)?);
        let numbers = k.field(pid, "pid", "numbers")?;
        let number = numbers + level * k.size("upid")?;
        Ok(k.u32(k.field(number, "upid", "nr")?)? as i32)
    }

    /// The connections that a listening TCP socket has not given out, first come first.
    pub fn tcp(&self, listener: BorrowedFd<'_>) -> Result<Vec<Child>> {
        let k = &self.kernel;
        let listener = self.sock(listener)?;
        let queue = k.field(listener, "inet_connection_sock", "icsk_accept_queue")?;
        let mut request = k.pointer(queue, "request_sock_queue", "rskq_accept_head")?;
        let mut all = Vec::new();
        while request != 0 && all.len() < MOST_PIECES {
            let end = self.kernel.pointer(request, "request_sock", "sk")?;
            all.push(self.child(end).context("a connection not accepted yet")?);
            request = self.kernel.pointer(request, "request_sock", "dl_next")?;
        }
        Ok(all)
    }

    fn child(&self, sock: u64) -> Result<Child> {
        let k = &self.kernel;
        let common = |field, len| k.read(k.field(sock, "sock_common", field)?, len);
        let v6 = common("skc_family", 2)? == (libc::AF_INET6 as u16).to_ne_bytes();
        let host = if v6 {
            common("skc_v6_daddr", 16)?
        } else {
            common("skc_daddr", 4)?
        };
        let port = common("skc_dport", 2)?;
        let port = port.try_into().map_or(0, u16::from_be_bytes);
        let next = k.u32(k.field(sock, "tcp_sock", "rcv_nxt")?)?;
        let mut data = Vec::new();
        let mut expected = None;
        for skb in self.queue(sock)? {
            let bytes = self.bytes(skb)?;
            // struct tcp_skb_cb begins with the sequence number.
            let begin = self.kernel.u32(self.kernel.field(skb, "sk_buff", "cb")?)?;
            let again = expected.unwrap_or(begin).wrapping_sub(begin) as usize;
            data.extend_from_slice(bytes.get(again..).unwrap_or_default());
            let end = begin.wrapping_add(bytes.len() as u32);
            expected = Some(expected.map_or(end, |e: u32| {
                if (end.wrapping_sub(e) as i32) > 0 {
                    end
                } else {
                    e
                }
            }));
        }
        Ok(Child {
            host,
            port,
            data,
            next,
        })
    }
}
