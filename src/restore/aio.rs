//! Contexts of asynchronous I/O. The id of a context is where its ring is mapped, and moves with the mapping
//! (aio_ring_mremap in fs/aio.c). Where the next event goes the kernel keeps for itself: as many requests as have ended are
//! made anew, reads of an empty file, and the events of the last ones become those that the program has not read yet.
//! So the kernel's count of free places is right, too.

use anyhow::{Context, Result, bail};

use crate::image::aio::{EVENT, IoRing};
use crate::image::memory::{Backing, Vma};
use crate::image::process::Process;
use crate::kernel::arch::{Call, PAGE};
use crate::kernel::body;
use crate::kernel::remote::{Arg, Remote};

/// Requests at once, of which half the smallest ring has room for.
const MANY: u32 = 32;
/// Bytes of a struct iocb.
const IOCB: usize = 64;

/// Makes the contexts of a process. Everything else is mapped.
pub fn setup(body: &mut Remote, p: &Process) -> Result<()> {
    for (i, v) in p.vmas.iter().enumerate() {
        if let Backing::Aio { ring } = &v.backing {
            let room = p.vmas.get(i + 1).map_or(u64::MAX, |next| next.start);
            one(body, v, ring, room)
                .with_context(|| format!("asynchronous I/O context at {:#x}", v.start))?;
        }
    }
    Ok(())
}

/// `room`: up to where nothing else is mapped.
fn one(body: &mut Remote, v: &Vma, ring: &IoRing, room: u64) -> Result<()> {
    // Nothing that the kernel maps meanwhile gets into its place.
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let reserve = |body: &mut Remote, from: u64, to: u64| {
        body.must(
            "keeping its place free",
            libc::SYS_mmap,
            &[
                from.into(),
                (to - from).into(),
                libc::PROT_NONE.into(),
                flags.into(),
                (-1).into(),
                0u64.into(),
            ],
        )
    };
    reserve(body, v.start, v.end)?;
    let made = body.call(
        libc::SYS_io_setup,
        &[requests(ring, v.len()).into(), Arg::In(&[0; 8])],
    )?;
    body::check(
        "io_setup (fs.aio-max-nr limits how many requests all programs may have)",
        made,
    )?;
    let id = body.output(0, 8)?.try_into().map_or(0, u64::from_le_bytes);
    // struct aio_ring: id, nr.
    let mut events = [0; 4];
    body.mem().read(id + 4, &mut events)?;
    let len = (u64::from(u32::from_le_bytes(events)) + 1) * EVENT;
    // It is as long as half the processors want it at least.
    let end = v.start.saturating_add(len.next_multiple_of(PAGE));
    if end < v.end || end > room {
        bail!(
            "this kernel makes it {len} bytes long, and there is room for {} (its length goes by the number of processors)",
            v.len()
        );
    }
    if end > v.end {
        reserve(body, v.end, end)?;
    }
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    body.must(
        "moving it to its place",
        libc::SYS_mremap,
        &[
            id.into(),
            len.into(),
            len.into(),
            flags.into(),
            v.start.into(),
        ],
    )?;
    let file = body.call(libc::SYS_memfd_create, &[Arg::In(b"\0"), 0.into()])?;
    body::check("memfd_create", file)?;
    let events = (len / EVENT - 1) as u32;
    // In a longer ring places have other numbers.
    let head = if end == v.end { ring.head } else { 0 };
    let mut left = head;
    while left > 0 {
        let n = left.min(MANY);
        submit(body, v.start, file, n)?;
        let room = [0; MANY as usize * EVENT as usize];
        let count = u64::from(n);
        body.must(
            "io_getevents",
            libc::SYS_io_getevents,
            &[
                v.start.into(),
                count.into(),
                count.into(),
                Arg::In(&room),
                0u64.into(),
            ],
        )?;
        left -= n;
    }
    let mut left = ring.count();
    while left > 0 {
        let n = left.min(MANY);
        submit(body, v.start, file, n)?;
        left -= n;
    }
    body.must("closing a file", libc::SYS_close, &[(file as u64).into()])?;
    body.flush()?;
    let mut tail = [0; 4];
    body.mem().read(v.start + 12, &mut tail)?;
    if u32::from_le_bytes(tail) != (head + ring.count()) % events {
        bail!("the kernel did not take as many requests as there are events to be read");
    }
    for (i, event) in ring.unread.chunks_exact(EVENT as usize).enumerate() {
        let place = (u64::from(head) + i as u64) % u64::from(events);
        body.mem().write(v.start + EVENT * (1 + place), event)?;
    }
    if v.prot != libc::PROT_READ | libc::PROT_WRITE {
        body.must(
            "its protection",
            libc::SYS_mprotect,
            &[v.start.into(), (end - v.start).into(), v.prot.into()],
        )?;
    }
    body.flush()
}

/// What io_setup is to be asked for: what it was asked for then, but as many at least as make the ring so long. It has
/// room for twice as many, and two (fs/aio.c, ioctx_alloc and aio_setup_ring).
fn requests(ring: &IoRing, len: u64) -> u64 {
    let shorter = len.saturating_sub(PAGE) / EVENT;
    u64::from(ring.requests).max((shorter / 2).saturating_sub(1))
}

/// `n` reads of nothing.
fn submit(body: &mut Remote, id: u64, file: i64, n: u32) -> Result<()> {
    body.must_with("io_submit", IOCB + 8 * n as usize, &|at| {
        // aio_data, aio_key and flags; opcode (IOCB_CMD_PREAD) and priority, descriptor; buffer, bytes, offset.
        let mut bytes = vec![0; IOCB];
        bytes[20..24].copy_from_slice(&(file as i32).to_le_bytes());
        for _ in 0..n {
            bytes.extend(at.to_le_bytes());
        }
        let list = at + IOCB as u64;
        (
            bytes,
            Call::new(libc::SYS_io_submit, &[id, u64::from(n), list]),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_gets_as_long_as_it_was() {
        let pages = |requests: u64| ((2 * requests + 3) * EVENT).div_ceil(PAGE);
        for requests in [1, 8, 62, 63, 64, 126, 127, 200, 3000, 65536] {
            let ring = IoRing {
                requests: 1,
                events: 0,
                head: 0,
                unread: Vec::new().into(),
            };
            let asked = super::requests(&ring, pages(requests) * PAGE);
            assert_eq!(pages(asked), pages(requests), "{requests}");
            assert!(asked <= requests, "{asked} for {requests}");
        }
    }
}
