//! Stripping a body to our code, and giving it the program's address space.

use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};

use super::Opened;
use super::aio;
use super::bulk::Bulk;
use super::memory::{self, is_droppable};
use super::shared::SharedObjects;
use crate::image::memory::{Backing, ChangedFlags, SpaceId, Vma};
use crate::image::pages::PagesReader;
use crate::image::process::Process;
use crate::kernel::arch::{Asm, Call, PAGE, TASK_SIZE};
use crate::kernel::caps;
use crate::kernel::maps::{self, Name};
use crate::kernel::mem::Mem;
use crate::kernel::remote::{self, Arg, Remote};
use crate::kernel::vdso;

/// Space behind the area for the kernel's own mappings while everything else is replaced.
const PARKING: u64 = 256 * 1024;

/// A free range for the area and the parking place, in the program's address space and in ours.
pub fn area(processes: &[Process]) -> Result<u64> {
    let ours = maps::ours().context("reading our own mappings")?;
    let mut taken: Vec<(u64, u64)> = ours.iter().map(|m| (m.start, m.end)).collect();
    taken.extend(
        processes
            .iter()
            .flat_map(|p| &p.vmas)
            .map(|v| (v.start, v.end)),
    );
    taken.sort_unstable();
    let len = remote::AREA + PARKING;
    let mut at = 1 << 32;
    for (start, end) in taken {
        if start >= at + len {
            break;
        }
        at = at.max(end);
    }
    if at + len > TASK_SIZE {
        bail!("the address space has no free {len} bytes for the restorer");
    }
    Ok(at)
}

/// The kernel's own mappings of a process: [vvar], [vvar_vclock], [vdso], from low to high.
#[derive(Debug, Clone)]
struct Group {
    parts: Vec<(u64, u64)>,
    vdso: (u64, u64),
}

impl Group {
    fn of(maps: impl Iterator<Item = (u64, u64, &'static str)>) -> Option<Self> {
        let mut parts = Vec::new();
        let mut vdso = None;
        for (start, end, which) in maps {
            parts.push((start, end));
            if which == "vdso" {
                vdso = Some((start, end));
            }
        }
        parts.sort_unstable();
        Some(Self { parts, vdso: vdso? })
    }

    fn start(&self) -> u64 {
        self.parts.first().map_or(0, |p| p.0)
    }

    fn end(&self) -> u64 {
        self.parts.last().map_or(0, |p| p.1)
    }

    fn len(&self) -> u64 {
        self.end() - self.start()
    }

    /// Same parts at the same distances.
    fn same_shape(&self, other: &Self) -> bool {
        let shape = |g: &Self| -> Vec<(u64, u64)> {
            g.parts
                .iter()
                .map(|p| (p.0 - g.start(), p.1 - g.start()))
                .collect()
        };
        shape(self) == shape(other) && self.vdso.0 - self.start() == other.vdso.0 - other.start()
    }

    fn moved_to(&self, start: u64) -> Self {
        let to = |a: u64| a - self.start() + start;
        Self {
            parts: self.parts.iter().map(|p| (to(p.0), to(p.1))).collect(),
            vdso: (to(self.vdso.0), to(self.vdso.1)),
        }
    }
}

fn group_of_body(pid: i32) -> Result<Group> {
    let maps = maps::read(pid).context("reading the body's mappings")?;
    let named = maps.iter().filter_map(|m| {
        let which = match m.name() {
            Name::Special("vdso") => "vdso",
            Name::Special("vvar") => "vvar",
            Name::Special("vvar_vclock") => "vvar_vclock",
            _ => return None,
        };
        Some((m.start, m.end, which))
    });
    Group::of(named).context("this kernel gives processes no vDSO")
}

fn group_of_image(p: &Process) -> Option<Group> {
    Group::of(p.vmas.iter().filter_map(|v| match &v.backing {
        Backing::Kernel { which } => Some((
            v.start,
            v.end,
            if which == "vdso" { "vdso" } else { "vvar" },
        )),
        _ => None,
    }))
}

/// What the kernel's mappings became.
pub struct Stripped {
    /// The vDSO that works here.
    pub vdso: (u64, u64),
    /// The program's own is ordinary memory that leads there.
    pub redirected: bool,
    /// To put at addresses, once pages are filled: that redirection, or what signal handlers return to.
    pub bytes: Vec<(u64, Vec<u8>)>,
}

/// Unmaps all of the body but the area and what it has filled itself; the kernel's mappings go where the program has them when they are
/// the same, else to a hole, and the program's vDSO is turned into jumps.
pub fn strip(body: &mut Remote, p: &Process, pages: &PagesReader, bulk: &Bulk) -> Result<Stripped> {
    // What our libc registered must be gone before its memory is.
    if let Some(r) = body.tracee.rseq()? {
        const UNREGISTER: u64 = 1;
        body.must(
            "unregistering rseq",
            libc::SYS_rseq,
            &[
                r.pointer.into(),
                u64::from(r.size).into(),
                UNREGISTER.into(),
                u64::from(r.signature).into(),
            ],
        )?;
    }
    let mut group = group_of_body(body.pid())?;
    let parking = body.area() + remote::AREA;
    if group.len() > PARKING {
        bail!(
            "the vDSO and its data are {} bytes long; there is room for {PARKING}",
            group.len()
        );
    }
    group = move_group(body, &group, parking)?;
    let mut keep: Vec<(u64, u64)> = bulk.filled(p).collect();
    keep.push((body.area(), parking + group.len()));
    keep.sort_unstable();
    let mut at = 0;
    for (from, to) in keep {
        unmap(body, at, from)?;
        at = to;
    }
    unmap(body, at, TASK_SIZE)?;
    body.flush()?;
    let Some(wanted) = group_of_image(p) else {
        return Ok(Stripped {
            vdso: group.vdso,
            redirected: false,
            bytes: Vec::new(),
        });
    };
    let here = body
        .mem()
        .read_vec(group.vdso.0, (group.vdso.1 - group.vdso.0) as usize)?;
    let there = vdso_of_image(p.space, wanted.vdso, pages)?;
    if wanted.same_shape(&group) && same_contents(&here, &there)? {
        let group = move_group(body, &group, wanted.start())?;
        body.flush()?;
        // What signal handlers of the program return to.
        let dead = vdso::elf_len(&there)?;
        let kept = there.get(dead as usize..).unwrap_or_default();
        let bytes = match kept.iter().all(|b| *b == 0) {
            true => Vec::new(),
            false => vec![(group.vdso.0 + dead, kept.to_vec())],
        };
        return Ok(Stripped {
            vdso: group.vdso,
            redirected: false,
            bytes,
        });
    }
    let place =
        hole(&p.vmas, body.area(), group.len()).context("no room for this kernel's vDSO")?;
    let group = move_group(body, &group, place)?;
    body.flush()?;
    let mut bytes = vec![(wanted.vdso.0, there.clone())];
    let ours = vdso::symbols(&here)?;
    for (name, at) in vdso::symbols(&there)? {
        let Some((_, target)) = ours.iter().find(|(n, _)| *n == name) else {
            bail!("the program's vDSO has {name}, this kernel's has not");
        };
        let mut a = Asm::new();
        a.jump(group.vdso.0 + target);
        bytes.push((wanted.vdso.0 + at, a.bytes().to_vec()));
    }
    Ok(Stripped {
        vdso: group.vdso,
        redirected: true,
        bytes,
    })
}

fn unmap(body: &mut Remote, from: u64, to: u64) -> Result<()> {
    if to > from {
        body.must(
            "unmapping the body",
            libc::SYS_munmap,
            &[from.into(), (to - from).into()],
        )?;
    }
    Ok(())
}

fn move_group(body: &mut Remote, g: &Group, start: u64) -> Result<Group> {
    let to = g.moved_to(start);
    let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
    if start == g.start() {
        return Ok(to);
    }
    for (old, new) in g.parts.iter().zip(&to.parts) {
        let len = old.1 - old.0;
        body.must(
            "moving the vDSO (kernels that seal it allow no restore)",
            libc::SYS_mremap,
            &[
                old.0.into(),
                len.into(),
                len.into(),
                flags.into(),
                new.0.into(),
            ],
        )?;
    }
    Ok(to)
}

fn vdso_of_image(space: SpaceId, at: (u64, u64), pages: &PagesReader) -> Result<Vec<u8>> {
    let mut out = vec![0u8; (at.1 - at.0) as usize];
    for b in pages.blocks_in(space, at.0, at.1) {
        let b = b?;
        let mut block = vec![0; b.bytes()];
        pages.read(&b, &mut block)?;
        for (i, page) in block.chunks(PAGE as usize).enumerate() {
            let addr = b.addr + i as u64 * PAGE;
            if addr >= at.0 && addr < at.1 {
                let o = (addr - at.0) as usize;
                out[o..o + page.len()].copy_from_slice(page);
            }
        }
    }
    Ok(out)
}

/// ELF contents alone: what stands behind them is dead.
fn same_contents(a: &[u8], b: &[u8]) -> Result<bool> {
    let (la, Ok(lb)) = (vdso::elf_len(a)? as usize, vdso::elf_len(b)) else {
        return Ok(false);
    };
    Ok(la == lb as usize && a[..la] == b[..la])
}

fn hole(vmas: &[Vma], area: u64, len: u64) -> Option<u64> {
    const MARGIN: u64 = 1 << 20;
    let mut at = area + remote::AREA + PARKING;
    for v in vmas.iter().filter(|v| v.end > area) {
        if v.start >= at + len + MARGIN {
            break;
        }
        at = at.max(v.end + MARGIN);
    }
    (at + len < TASK_SIZE).then_some(at)
}

/// Maps everything the program had mapped; private memory is still empty.
pub fn map(
    body: &mut Remote,
    p: &Process,
    opened: &Opened,
    shared: &SharedObjects,
    bulk: &Bulk,
    redirected: bool,
) -> Result<()> {
    let apart = |v: &Vma| bulk.has(p, v);
    let joins = |a: &Vma, b: &Vma| memory::joins(a, b) && !apart(a) && !apart(b);
    for vmas in p.vmas.chunk_by(joins) {
        let mapped = vmas.len() > 1 || vmas.iter().any(apart);
        if vmas.len() > 1 {
            map_as_one(body, vmas)?;
        }
        for v in vmas {
            const MAP_DROPPABLE: i32 = 0x08;
            const MPOL_MF_MOVE: u64 = 2;
            let mut flags = libc::MAP_FIXED_NOREPLACE;
            flags |= if v.shared {
                libc::MAP_SHARED
            } else if is_droppable(v) {
                MAP_DROPPABLE
            } else {
                libc::MAP_PRIVATE
            };
            if v.has("nr") {
                flags |= libc::MAP_NORESERVE;
            }
            if v.has("gd") {
                flags |= libc::MAP_GROWSDOWN;
            }
            if v.has("ht") && v.backing == Backing::Anonymous {
                flags |= libc::MAP_HUGETLB;
            }
            let fd = match &v.backing {
                Backing::Kernel { which } if which == "vdso" && redirected => None,
                Backing::Kernel { .. } | Backing::Aio { .. } => continue,
                Backing::Anonymous => None,
                Backing::File { file } => Some(opened.file(*file, v.may_be_written())?),
                Backing::Shared { memory } => {
                    match (shared.fds.get(memory), shared.segments.get(memory)) {
                        (Some(fd), _) => Some(fd.as_raw_fd()),
                        (None, Some(segment)) => {
                            attach_segment(body, v, segment.id)?;
                            continue;
                        }
                        (None, None) => bail!("shared memory object {memory} was not made"),
                    }
                }
            };
            if fd.is_none() {
                flags |= libc::MAP_ANONYMOUS;
            }
            if mapped {
                if v.prot != libc::PROT_READ | libc::PROT_WRITE {
                    body.must(
                        format!("protecting {:#x}-{:#x}", v.start, v.end),
                        libc::SYS_mprotect,
                        &[v.start.into(), v.len().into(), v.prot.into()],
                    )?;
                }
            } else {
                body.must(
                    format!("mapping {:#x}-{:#x}", v.start, v.end),
                    libc::SYS_mmap,
                    &[
                        v.start.into(),
                        v.len().into(),
                        v.prot.into(),
                        flags.into(),
                        fd.unwrap_or(-1).into(),
                        if fd.is_some() {
                            v.offset.into()
                        } else {
                            0u64.into()
                        },
                    ],
                )?;
            }
            if let Some(policy) = &v.policy {
                body.may(
                    format!("nodes for the memory at {:#x} (mbind)", v.start),
                    libc::SYS_mbind,
                    &[
                        v.start.into(),
                        v.len().into(),
                        u64::from(policy.mode).into(),
                        Arg::In(&policy.mask()),
                        policy.bits().into(),
                        if mapped { MPOL_MF_MOVE } else { 0 }.into(),
                    ],
                )?;
            }
            if let Some(name) = &v.name {
                const PR_SET_VMA: u64 = 0x5356_4d41;
                let text = format!("{name}\0");
                body.may(
                    format!("naming the mapping at {:#x}", v.start),
                    libc::SYS_prctl,
                    &[
                        PR_SET_VMA.into(),
                        0u64.into(),
                        v.start.into(),
                        v.len().into(),
                        Arg::In(text.as_bytes()),
                    ],
                )?;
            }
        }
    }
    body.flush()?;
    aio::setup(body, p)
}

/// Maps private memory that joins ([`memory::joins`]), readable and writable, and has the kernel note that it is one.
fn map_as_one(body: &mut Remote, vmas: &[Vma]) -> Result<()> {
    const MADV_POPULATE_WRITE: u64 = 23;
    let (Some(first), Some(last)) = (vmas.first(), vmas.last()) else {
        return Ok(());
    };
    let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    if first.has("nr") {
        flags |= libc::MAP_NORESERVE;
    }
    body.must(
        format!("mapping {:#x}-{:#x}", first.start, last.end),
        libc::SYS_mmap,
        &[
            first.start.into(),
            (last.end - first.start).into(),
            (libc::PROT_READ | libc::PROT_WRITE).into(),
            flags.into(),
            (-1).into(),
            0u64.into(),
        ],
    )?;
    // It notes that with the first page of it, which may be a huge one and is taken away again. Before Linux 5.14 they
    // stay several.
    let len = last.end - first.start;
    for (len, advice) in [
        (PAGE, MADV_POPULATE_WRITE),
        (len, libc::MADV_DONTNEED as u64),
    ] {
        body.attempt(
            libc::SYS_madvise,
            &[first.start.into(), len.into(), advice.into()],
        )?;
    }
    Ok(())
}

/// A System V segment is mapped whole; what the program has unmapped of it is unmapped again.
fn attach_segment(body: &mut Remote, v: &Vma, id: i32) -> Result<()> {
    let flags = if v.prot & libc::PROT_WRITE == 0 {
        libc::SHM_RDONLY
    } else {
        0
    };
    if v.offset != 0 {
        bail!("the segment at {:#x} is mapped from its middle on", v.start);
    }
    body.must(
        format!("attaching shared memory segment {id} at {:#x}", v.start),
        libc::SYS_shmat,
        &[id.into(), v.start.into(), flags.into()],
    )
}

/// Marks that memory has besides its content: advice, locks, guard pages. Content is in place. `changed`: what is
/// otherwise than in the image.
pub fn advise(body: &mut Remote, p: &Process, changed: &ChangedFlags) -> Result<()> {
    const ADVICE: [(&str, i32); 8] = [
        ("dc", libc::MADV_DONTFORK),
        ("wf", libc::MADV_WIPEONFORK),
        ("dd", libc::MADV_DONTDUMP),
        ("hg", libc::MADV_HUGEPAGE),
        ("nh", libc::MADV_NOHUGEPAGE),
        ("mg", libc::MADV_MERGEABLE),
        ("sr", libc::MADV_SEQUENTIAL),
        ("rr", libc::MADV_RANDOM),
    ];
    const MADV_GUARD_INSTALL: i32 = 102;
    const MLOCK_ONFAULT: u64 = 1;
    for v in p.vmas.iter().filter(|v| !v.is_kernel()) {
        let flags = changed.get(&v.start).unwrap_or(&v.flags);
        let has = |code: &str| flags.iter().any(|flag| flag == code);
        for (code, advice) in ADVICE {
            if has(code) {
                body.may(
                    format!("madvise({advice}) of {:#x}-{:#x}", v.start, v.end),
                    libc::SYS_madvise,
                    &[v.start.into(), v.len().into(), advice.into()],
                )?;
            }
        }
        for (start, end) in &v.guards {
            body.must(
                format!("guard pages at {start:#x}"),
                libc::SYS_madvise,
                &[
                    (*start).into(),
                    (end - start).into(),
                    MADV_GUARD_INSTALL.into(),
                ],
            )?;
        }
        if has("lo") {
            body.may(
                format!("locking {:#x}-{:#x}", v.start, v.end),
                libc::SYS_mlock2,
                &[v.start.into(), v.len().into(), MLOCK_ONFAULT.into()],
            )?;
            if !has("lf") {
                // It fails where there is nothing to be had (no access, the end of a file, guards), and locks all the same.
                body.attempt(libc::SYS_mlock, &[v.start.into(), v.len().into()])?;
            }
        }
    }
    if p.lock_future != 0 {
        body.may(
            "locking what it will map (mlockall)",
            libc::SYS_mlockall,
            &[u64::from(p.lock_future).into()],
        )?;
    }
    if p.merge_memory {
        const PR_SET_MEMORY_MERGE: u64 = 67;
        body.may(
            "merging equal pages (PR_SET_MEMORY_MERGE)",
            libc::SYS_prctl,
            &[PR_SET_MEMORY_MERGE.into(), 1u64.into()],
        )?;
    }
    body.flush()
}

/// Seals what was sealed (mseal(2)): last, for nothing can be done to it any more.
pub fn seal(body: &mut Remote, p: &Process, changed: &ChangedFlags) -> Result<()> {
    const SYS_MSEAL: i64 = 462;
    for v in p.vmas.iter().filter(|v| !v.is_kernel()) {
        let flags = changed.get(&v.start).unwrap_or(&v.flags);
        if flags.iter().any(|flag| flag == "sl") {
            body.may(
                format!("sealing {:#x}-{:#x}", v.start, v.end),
                SYS_MSEAL,
                &[v.start.into(), v.len().into(), 0u64.into()],
            )?;
        }
    }
    body.flush()
}

/// Where code and data, heap, stack, arguments and environment are (prctl(2), PR_SET_MM_MAP), auxv, exe.
pub fn set_mm(body: &mut Remote, p: &Process, exe_fd: Option<i32>, vdso: u64) -> Result<()> {
    const AT_SYSINFO_EHDR: u64 = 33;
    let exe_fd = exe_fd.filter(|_| {
        let may = caps::checkpoint_restore();
        if !may {
            body.warnings.push(format!(
                "process {}: /proc/{}/exe names mistctl (its own program needs CAP_CHECKPOINT_RESTORE)",
                p.pid,
                body.pid()
            ));
        }
        may
    });
    let m = &p.mm;
    let mut auxv = m.auxv.clone();
    for pair in auxv.chunks_mut(2) {
        // The dynamic linker has read it long ago; a program that looks again finds this kernel's.
        if pair.first() == Some(&AT_SYSINFO_EHDR)
            && let Some(v) = pair.get_mut(1)
        {
            *v = vdso;
        }
    }
    let auxv: Vec<u8> = auxv.iter().flat_map(|w| w.to_le_bytes()).collect();
    let words = [
        m.start_code,
        m.end_code,
        m.start_data,
        m.end_data,
        m.start_brk,
        m.brk,
        m.start_stack,
        m.arg_start,
        m.arg_end,
        m.env_start,
        m.env_end,
    ];
    // struct prctl_mm_map: eleven addresses, pointer to auxv, its size, exe_fd. The auxv is passed by
    // address, so it stands in front in the same argument.
    let auxv_len = auxv.len();
    let mut block = auxv;
    block.resize(block.len().next_multiple_of(16), 0);
    let map_offset = block.len() as u64;
    block.extend(words.iter().flat_map(|w| w.to_le_bytes()));
    let len = words.len() as u64 * 8 + 16;
    body.must_with(
        "setting up heap, stack and program addresses (PR_SET_MM_MAP)",
        block.len() + 16,
        &|at| {
            let mut data = block.clone();
            data.extend(at.to_le_bytes());
            data.extend((auxv_len as u32).to_le_bytes());
            data.extend((exe_fd.unwrap_or(-1) as u32).to_le_bytes());
            let args = [
                libc::PR_SET_MM as u64,
                libc::PR_SET_MM_MAP as u64,
                at + map_offset,
                len,
                0,
            ];
            (data, Call::new(libc::SYS_prctl, &args))
        },
    )?;
    body.flush()
}

/// Writes bytes whatever the protection is.
pub fn poke(mem: &Mem, writes: &[(u64, Vec<u8>)]) -> Result<()> {
    for (at, bytes) in writes {
        mem.write(*at, bytes)?;
    }
    Ok(())
}
