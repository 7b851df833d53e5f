//! What a mover sends and a lander makes an image of: pages, carried files, and at last the manifest.

use std::fs::File;
use std::io::{Seek, Write};
use std::ops::{Deref, Range};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::frames::{Frame, Stream, Totals};
use super::header::LONGEST;
use crate::dump::Sink;
use crate::image::rounds::Populated;
use crate::image::{ChangedFlags, Manifest, RoundsWriter, SpaceId};
use crate::kernel::arch;
use crate::kernel::buffer::Buffer;
use crate::restore::{Announced, Placed, Placing};

/// Kinds of frames.
mod kind {
    /// Whole pages; head: space (4 bytes), address (8), big-endian.
    pub const PAGES: u8 = 1;
    /// A piece of a carried file.
    pub const OBJECT: u8 = 2;
    /// Its end: its name, which is the hash of its content.
    pub const OBJECT_END: u8 = 3;
    /// A piece of the manifest.
    pub const MANIFEST: u8 = 4;
    /// Its end, and the stream's.
    pub const END: u8 = 5;
    /// Length (8): pages of zeros; head as for pages.
    pub const ZEROS: u8 = 6;
    /// A round is over.
    pub const ROUND: u8 = 7;
    /// Mappings whose pages are to come: start, end, 1 where MAP_NORESERVE (8 bytes each).
    pub const MAPPINGS: u8 = 10;
    /// Behind the stream's end: a piece of what of the manifest is otherwise, and its end again.
    pub const CHANGED_FLAGS: u8 = 9;
    /// Runs of pages that hold something: from, to (8 each); head: space.
    pub const POPULATED: u8 = 8;
}

/// Address space of a task in its image: it is the only process.
pub const SPACE: SpaceId = 0;
const PAGE: usize = arch::PAGE as usize;
/// Space and address in front of pages.
const PLACE: usize = 12;
/// Bytes sent in one frame.
const PIECE: usize = 1 << 20;
/// Most bytes of a carried file, and of a manifest.
const LARGEST_OBJECT: u64 = 1 << 40;
const LARGEST_MANIFEST: usize = 1 << 30;

/// Sends an image. Threads share it.
pub struct ImageSender {
    stream: Mutex<Stream>,
}

impl ImageSender {
    /// Sends over `stream`.
    pub fn new(stream: Stream) -> ImageSender {
        ImageSender {
            stream: Mutex::new(stream),
        }
    }

    /// Whether the receiver has closed the stream.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.stream().has_ended()
    }

    fn stream(&self) -> MutexGuard<'_, Stream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends pages; the receiver may get the same ones again, and keeps the last.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn put(&self, space: SpaceId, addr: u64, data: &[u8]) -> Result<()> {
        self.each(space, addr, data, |stream, place, data, part| {
            let pages = data.get(part).unwrap_or_default();
            stream.send(kind::PAGES, place, pages)
        })
    }

    /// The same, of pages that nobody needs here any more.
    ///
    /// # Errors
    /// As for [`ImageSender::put`].
    pub fn give(&self, space: SpaceId, addr: u64, data: &mut [u8]) -> Result<()> {
        self.each(space, addr, data, |stream, place, data, part| {
            let pages = data.get_mut(part).unwrap_or_default();
            stream.send_in_place(kind::PAGES, place, pages)
        })
    }

    /// Sends zeros as such, and has `send` send the other parts.
    fn each<D: Deref<Target = [u8]>>(
        &self,
        space: SpaceId,
        addr: u64,
        mut data: D,
        send: impl Fn(&mut Stream, &[u8], &mut D, Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let mut at = 0;
        while let Some(rest) = data.get(at..).filter(|rest| !rest.is_empty()) {
            let (zero, len) = alike(rest);
            let place = place_of(space, addr + at as u64);
            let mut stream = self.stream();
            if zero {
                stream.send(kind::ZEROS, &place, &(len as u64).to_be_bytes())?;
            } else {
                send(&mut stream, &place, &mut data, at..at + len)?;
            }
            at += len;
        }
        Ok(())
    }

    /// Says which large mappings the task has, before any of their pages.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn announce(&self, mappings: &[Announced]) -> Result<()> {
        let words = |m: &Announced| [m.start, m.end, m.no_reserve.into()];
        let body: Vec<u8> = mappings
            .iter()
            .flat_map(words)
            .flat_map(u64::to_be_bytes)
            .collect();
        self.stream().send(kind::MAPPINGS, &[], &body)
    }

    /// Says that a round is over, and waits until all of it has arrived; the receiver does what can be done now.
    ///
    /// # Errors
    /// When the connection breaks, or the receiver says anything else.
    pub fn round(&self) -> Result<()> {
        let mut stream = self.stream();
        stream.send(kind::ROUND, &[], &[])?;
        stream.flush()?;
        match stream.recv()? {
            Some(Frame {
                kind: kind::ROUND, ..
            }) => Ok(()),
            Some(_) => bail!("the receiver says something odd"),
            None => bail!("the receiver has gone"),
        }
    }

    /// Says which pages of a space hold something: of what was sent only those count.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn populated(&self, space: SpaceId, runs: &[(u64, u64)]) -> Result<()> {
        for part in runs.chunks(PIECE / 16) {
            let mut body = Vec::with_capacity(part.len() * 16);
            for (from, to) in part {
                body.extend(from.to_be_bytes());
                body.extend(to.to_be_bytes());
            }
            let space = space.to_be_bytes();
            self.stream().send(kind::POPULATED, &space, &body)?;
        }
        Ok(())
    }

    /// Sends the content of a file; its name, which is its BLAKE3 hash.
    ///
    /// # Errors
    /// When the connection breaks, or the file cannot be read.
    pub fn object(&self, file: &File) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        let mut piece = vec![0; PIECE];
        let mut stream = self.stream();
        let mut at = 0;
        loop {
            let count = file
                .read_at(&mut piece, at)
                .context("reading a file to carry")?;
            let Some(read) = piece.get(..count).filter(|read| !read.is_empty()) else {
                break;
            };
            hasher.update(read);
            stream.send(kind::OBJECT, &[], read)?;
            at += count as u64;
        }
        let name = hasher.finalize().to_hex().to_string();
        stream.send(kind::OBJECT_END, &[], name.as_bytes())?;
        Ok(name)
    }

    /// Sends what there is but pages and files: the last of it.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn finish(&self, manifest: &Manifest) -> Result<()> {
        let text = serde_json::to_vec(manifest).context("the manifest as JSON")?;
        let mut stream = self.stream();
        for piece in text.chunks(PIECE) {
            stream.send(kind::MANIFEST, &[], piece)?;
        }
        stream.send(kind::END, &[], &[])?;
        stream.flush()
    }

    /// Sends, behind all the rest, what only then is known.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn changed_flags(&self, changed: &ChangedFlags) -> Result<()> {
        let text = serde_json::to_vec(changed).context("flags as JSON")?;
        let mut stream = self.stream();
        for piece in text.chunks(PIECE) {
            stream.send(kind::CHANGED_FLAGS, &[], piece)?;
        }
        stream.send(kind::END, &[], &[])?;
        stream.flush()
    }

    /// What was sent so far.
    pub fn totals(&self) -> Totals {
        self.stream().totals()
    }
}

impl Sink for ImageSender {
    fn put(&self, space: SpaceId, addr: u64, data: &[u8]) -> Result<()> {
        ImageSender::put(self, space, addr, data)
    }

    fn object(&self, file: &File) -> Result<String> {
        ImageSender::object(self, file)
    }
}

/// Receives an image into the directory `path`, which must not exist; it is complete when this returns, but for memory
/// that has been placed in this process.
///
/// # Errors
/// When the connection breaks or ends before the image does, or what arrives makes no sense. What was received
/// so far is gone then.
pub fn receive(stream: &mut Stream, path: &Path) -> Result<Placed> {
    let writer = RoundsWriter::create(path)?;
    let mut store = Store::new(&writer);
    let mut buffer = Buffer::default();
    loop {
        let Some(Frame { kind, head, body }) = stream.recv_into(buffer)? else {
            bail!("the stream ended before the task was whole");
        };
        match kind {
            kind::END => break,
            kind::ROUND => {
                writer.settle()?;
                stream.send(kind::ROUND, &[], &[])?;
                stream.flush()?;
            }
            kind => store.take(kind, &head, &body)?,
        }
        buffer = body;
    }
    let Store {
        placing,
        mut populated,
        manifest,
        ..
    } = store;
    let manifest: Manifest =
        serde_json::from_slice(&manifest).context("the manifest that arrived is none")?;
    RoundsWriter::check(&manifest)?;
    let placed = match manifest.processes.first() {
        Some(first) => placing.settle(first, &mut populated, &writer)?,
        None => Placed::default(),
    };
    // It is needed for this move only.
    writer.finish(&manifest, &populated, false)?;
    Ok(placed)
}

/// Receives what [`ImageSender::changed_flags`] sends.
///
/// # Errors
/// When the connection breaks or ends before, or what arrives makes no sense.
pub fn receive_changed_flags(stream: &mut Stream) -> Result<ChangedFlags> {
    let mut text = Vec::new();
    loop {
        match stream.recv()? {
            Some(Frame {
                kind: kind::END, ..
            }) => break,
            Some(Frame {
                kind: kind::CHANGED_FLAGS,
                body,
                ..
            }) => text.extend_from_slice(&body),
            Some(_) => bail!("something odd arrived behind the manifest"),
            None => bail!("the stream ended before the task was whole"),
        }
        if text.len() > LARGEST_MANIFEST {
            bail!("what arrived behind the manifest is too long");
        }
    }
    serde_json::from_slice(&text).context("the flags that arrived are none")
}

/// What arrives, on its way into an image.
struct Store<'a> {
    writer: &'a RoundsWriter,
    placing: Placing,
    populated: Populated,
    manifest: Vec<u8>,
    object: Option<File>,
}

impl<'a> Store<'a> {
    fn new(writer: &'a RoundsWriter) -> Store<'a> {
        Store {
            writer,
            placing: Placing::new(SPACE),
            populated: Populated::new(),
            manifest: Vec::new(),
            object: None,
        }
    }

    fn take(&mut self, kind: u8, head: &[u8], body: &[u8]) -> Result<()> {
        match kind {
            kind::PAGES => {
                let (space, addr) = place(head)?;
                self.placing.put(self.writer, space, addr, body)?;
            }
            kind::ZEROS => {
                let (space, addr) = place(head)?;
                let len = zeros(body)?;
                self.placing.put_zeros(self.writer, space, addr, len)?;
            }
            kind::MAPPINGS => {
                for mapping in mappings(body)? {
                    self.placing.announce(&mapping)?;
                }
            }
            kind::POPULATED => {
                let (space, runs) = runs(head, body)?;
                let all = self.populated.entry(space).or_default();
                let (last, next) = (all.last(), runs.first());
                if last.zip(next).is_some_and(|(last, next)| next.0 < last.1) {
                    bail!("frames of runs are out of order");
                }
                all.extend(runs);
            }
            kind::OBJECT => {
                let mut file = self.object()?;
                file.write_all(body).context("keeping a carried file")?;
                if file.stream_position().context("lseek")? > LARGEST_OBJECT {
                    bail!("a carried file is too long");
                }
                self.object = Some(file);
            }
            kind::OBJECT_END => {
                let name = self.writer.add_object(&self.object()?)?;
                if name.as_bytes() != body {
                    bail!("a carried file has not the content it should have");
                }
            }
            kind::MANIFEST => {
                self.manifest.extend_from_slice(body);
                if self.manifest.len() > LARGEST_MANIFEST {
                    bail!("the manifest is too long");
                }
            }
            kind => bail!("a frame of an unknown kind ({kind}) arrived"),
        }
        Ok(())
    }

    /// The file that is arriving, which may be the first one's beginning.
    fn object(&mut self) -> Result<File> {
        match self.object.take() {
            Some(file) => Ok(file),
            None => {
                let file = memfd_create(c"mist-object", MFdFlags::MFD_CLOEXEC);
                Ok(File::from(file.context("memfd_create")?))
            }
        }
    }
}

/// What stands in front of pages.
fn place_of(space: SpaceId, addr: u64) -> [u8; PLACE] {
    let mut place = [0; PLACE];
    let (in_space, at_addr) = place.split_at_mut(4);
    in_space.copy_from_slice(&space.to_be_bytes());
    at_addr.copy_from_slice(&addr.to_be_bytes());
    place
}

/// Whether what begins with a page begins with zeros, and how many bytes of it are all zero, or pages that are not.
fn alike(data: &[u8]) -> (bool, usize) {
    let mut pages = data.chunks(PAGE).take(PIECE / PAGE);
    let zero = pages.next().is_some_and(is_zero);
    let same = 1 + pages.take_while(|page| is_zero(page) == zero).count();
    (zero, data.len().min(same * PAGE))
}

/// What [`place_of`] was made of.
fn place(head: &[u8]) -> Result<(SpaceId, u64)> {
    let Ok([a, b, c, d, e, f, g, h, i, j, k, l]) = <[u8; PLACE]>::try_from(head) else {
        bail!("a frame of pages does not say where they are");
    };
    let space = SpaceId::from_be_bytes([a, b, c, d]);
    Ok((space, u64::from_be_bytes([e, f, g, h, i, j, k, l])))
}

/// How many bytes are zero.
fn zeros(body: &[u8]) -> Result<u64> {
    let len = u64::from_be_bytes(body.try_into().context("a frame of zeros is no number")?);
    if len > PIECE as u64 || !len.is_multiple_of(PAGE as u64) {
        bail!("a frame tells of {len} zeros at once");
    }
    Ok(len)
}

fn mappings(body: &[u8]) -> Result<Vec<Announced>> {
    let mapping = |words: &[u8]| {
        let [start, end, no_reserve] = [0, 8, 16].map(|at| word(words, at));
        Some(Announced {
            start: start?,
            end: end?,
            no_reserve: no_reserve? != 0,
        })
    };
    let all = body.chunks(24).map(mapping).collect::<Option<_>>();
    all.context("a frame of mappings ends in the middle of one")
}

/// Eight bytes of these.
fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..at + 8)?.try_into().ok()?;
    Some(u64::from_be_bytes(word))
}

fn runs(head: &[u8], body: &[u8]) -> Result<(SpaceId, Vec<(u64, u64)>)> {
    let space = head
        .try_into()
        .context("a frame of runs does not say of which space")?;
    let runs = body.chunks(16).map(|run| word(run, 0).zip(word(run, 8)));
    let runs: Vec<(u64, u64)> = runs
        .collect::<Option<_>>()
        .context("a frame of runs ends in the middle of one")?;
    let mut end = 0;
    for (from, to) in &runs {
        let aligned = from % PAGE as u64 == 0 && to % PAGE as u64 == 0;
        if !aligned || *from < end || to <= from {
            bail!("the run {from:#x}-{to:#x} is none, or in the wrong place");
        }
        end = *to;
    }
    Ok((SpaceId::from_be_bytes(space), runs))
}

fn is_zero(page: &[u8]) -> bool {
    page.iter().all(|byte| *byte == 0)
}

const _: () = assert!(PIECE <= LONGEST);
