//! The two ends of a stream.

use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use snow::HandshakeState;

use super::cipher::{Cipher, TAG};
use super::header::{HEADER, Header, LONGEST};
use super::input::Input;
use super::key::Key;
use super::rate::{Packer, Packing};
use crate::error::Failure;
use crate::kernel::buffer::Buffer;

pub(super) const PATTERN: &str = "Noise_NNpsk0_25519_AESGCM_SHA256";
/// Longest message of Noise.
const SEALED: usize = 65535;
/// Bytes written and read at once: few calls, and they stay in a second-level cache between the socket and the cipher.
const AT_ONCE: usize = 256 << 10;
/// Of a message: its length in front of it.
const LENGTH: usize = 2;
/// Bodies shorter than this come in one message with their heads: a copy costs less than more messages.
const APART: usize = 32 << 10;
/// Of others: what each of their messages holds, but the last; whole pages.
const CUT: usize = 15 << 12;
/// Of those so much is sealed or opened at once: it is in a second-level cache still when it is written, or opened.
const AT_HAND: usize = 2 * CUT;
/// Bytes that frames of pages begin with, if those stand apart: length, header, head, tag.
const BEGINNING: usize = LENGTH + HEADER + 12 + TAG;
/// How long a handshake may take: nothing is computed in it that takes long.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long who knocks may take to show that he knows the key. Nothing tells a stranger who says nothing from a mover whose
/// packets are lost, and while one is heard nobody else comes in: the least that three packets lost one after the other
/// need. A mover that is sent away so knocks again.
pub const KNOCK: Duration = Duration::from_secs(2);
/// How often a mover knocks.
const KNOCKS: usize = 5;

/// What was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Bytes given to [`Stream::send`].
    pub raw: u64,
    /// Bytes that went over the wire for them.
    pub wire: u64,
}

/// A frame that arrived.
#[derive(Debug)]
pub struct Frame {
    /// What it is; the ends agree on it.
    pub kind: u8,
    /// What its body is about.
    pub head: Vec<u8>,
    /// What it holds.
    pub body: Buffer,
}

/// What a frame is to hold: to be copied, or to be sealed where it stands.
enum Body<'a> {
    Kept(&'a [u8]),
    Spent(&'a mut [u8]),
}

/// One end of a stream whose other end has proved that it knows the key.
pub struct Stream {
    tcp: TcpStream,
    input: Input,
    peer: String,
    outgoing: Cipher,
    incoming: Cipher,
    /// Sealed messages that wait to be written: so many bytes of it.
    out: Box<[u8]>,
    waiting: usize,
    packer: Packer,
    totals: Totals,
}

impl Stream {
    /// Connects to a lander and shows that we know the key; `id` names the move on both sides.
    ///
    /// # Errors
    /// When nobody listens there or who does knows another key or names another move; [`Failure::Busy`] when that cannot
    /// be told, because one of both is too slow.
    pub fn connect(to: SocketAddr, key: &Key, id: &str, limit: Duration) -> Result<Stream> {
        let mut knocks = 0;
        let mut stream = loop {
            let began = Instant::now();
            let tcp = TcpStream::connect_timeout(&to, limit)
                .with_context(|| format!("cannot connect to {to}"))?;
            tcp.set_read_timeout(Some(HANDSHAKE))
                .context("SO_RCVTIMEO")?;
            knocks += 1;
            match Stream::shake(tcp, to.to_string(), handshake(key, id, true)?) {
                Ok(stream) => break stream,
                // Whom the key does not fit is sent away at once.
                Err(e) if began.elapsed() < KNOCK => {
                    return Err(e.context(format!(
                        "{to} does not know the key; is ~/.mist/key the same file on both hosts?"
                    )));
                }
                Err(_) if knocks < KNOCKS => {}
                Err(_) => {
                    return Err(Failure::Busy.because(format!(
                        "{to} and this host have not come to terms within {} s each, {knocks} times over: one of them, or \
                         the network between them, has too much else to do; try again when it has not",
                        KNOCK.as_secs()
                    )));
                }
            }
        };
        // So that a repeated first message opens nothing.
        stream.seal([])?;
        stream.flush()?;
        stream.timeless()
    }

    /// Waits for the mover that knows the key and names the move `id`. Others are sent away without a word.
    ///
    /// # Errors
    /// When none came until then.
    pub fn accept(listener: &TcpListener, key: &Key, id: &str, until: Instant) -> Result<Stream> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("nobody who knows the key came for the move {id}");
            }
            let ms = left.as_millis().clamp(1, 60_000) as u16;
            let ready = poll(
                &mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)],
                PollTimeout::from(ms),
            );
            match ready {
                Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
                other => other.context("poll of the listening socket")?,
            };
            let Ok((tcp, from)) = listener.accept() else {
                continue; // it is gone again
            };
            let limit = left.min(KNOCK);
            if tcp.set_read_timeout(Some(limit)).is_err() {
                continue;
            }
            let proved = handshake(key, id, false).and_then(|state| {
                let mut stream = Stream::shake(tcp, from.to_string(), state)?;
                match stream.open()? {
                    Some([]) => {}
                    _ => bail!("no proof"),
                }
                stream.timeless()
            });
            if let Ok(stream) = proved {
                return Ok(stream);
            }
        }
    }

    fn shake(mut tcp: TcpStream, peer: String, mut state: HandshakeState) -> Result<Stream> {
        let mut message = [0; 256];
        let mut scratch = [0; 256];
        tcp.set_nodelay(true).context("TCP_NODELAY")?;
        while !state.is_handshake_finished() {
            if state.is_my_turn() {
                let len = state
                    .write_message(&[], &mut message)
                    .context("handshake")?;
                let mut bytes = (len as u16).to_be_bytes().to_vec();
                bytes.extend(message.get(..len).unwrap_or_default());
                tcp.write_all(&bytes).context("handshake")?;
            } else {
                let mut len = [0; 2];
                tcp.read_exact(&mut len).context("handshake")?;
                let part = message
                    .get_mut(..usize::from(u16::from_be_bytes(len)))
                    .ok_or_else(|| anyhow!("no handshake"))?;
                tcp.read_exact(part).context("handshake")?;
                state
                    .read_message(part, &mut scratch)
                    .context("handshake")?;
            }
        }
        // What has been read so far was exactly the handshake.
        let (outgoing, incoming) = Cipher::pair(state).context("handshake")?;
        Ok(Stream {
            tcp,
            input: Input::new(AT_ONCE),
            peer,
            outgoing,
            incoming,
            out: vec![0; AT_ONCE + LENGTH + SEALED].into(),
            waiting: 0,
            packer: Packer::new(),
            totals: Totals::default(),
        })
    }

    fn timeless(self) -> Result<Stream> {
        self.tcp.set_read_timeout(None).context("SO_RCVTIMEO")?;
        Ok(self)
    }

    /// How long a read or write may take from now on; none: as long as it takes.
    ///
    /// # Errors
    /// Those of setsockopt.
    pub fn set_patience(&mut self, limit: Option<Duration>) -> Result<()> {
        self.tcp.set_read_timeout(limit).context("SO_RCVTIMEO")?;
        self.tcp.set_write_timeout(limit).context("SO_SNDTIMEO")
    }

    /// Sends a frame: what it holds behind a short `head`, packed if that is faster than the link. It may stay here until
    /// [`Stream::flush`].
    ///
    /// # Errors
    /// When the connection breaks, or the frame is too long (head 255 bytes, body [`LONGEST`]).
    pub fn send(&mut self, kind: u8, head: &[u8], body: &[u8]) -> Result<()> {
        self.frame(kind, head, Body::Kept(body))
    }

    /// The same, of a body that may be sealed where it stands: it is worth nothing any more then.
    ///
    /// # Errors
    /// As for [`Stream::send`].
    pub fn send_in_place(&mut self, kind: u8, head: &[u8], body: &mut [u8]) -> Result<()> {
        self.frame(kind, head, Body::Spent(body))
    }

    fn frame(&mut self, kind: u8, head: &[u8], body: Body) -> Result<()> {
        let raw = body.len();
        let (Ok(front), true) = (u8::try_from(head.len()), raw <= LONGEST) else {
            bail!("a frame of {} and {raw} bytes is too long", head.len());
        };
        let mut packed = self.packer.pack(&body, &self.tcp);
        let (packing, body) = match &mut packed {
            Some((packing, packed)) => (*packing, Body::Spent(packed)),
            None => (Packing::None, body),
        };
        let packed = body.len();
        let header = Header {
            kind,
            packing,
            front,
            packed,
            raw,
        };
        if packed < APART {
            self.seal([&header.bytes(), head, &body])?;
        } else {
            self.seal([&header.bytes(), head])?;
            match body {
                Body::Kept(body) => body.chunks(CUT).try_for_each(|text| self.seal([text]))?,
                Body::Spent(body) => body
                    .chunks_mut(AT_HAND)
                    .try_for_each(|texts| self.seal_in_place(texts))?,
            }
        }
        self.totals.raw += (head.len() + raw) as u64;
        Ok(())
    }

    /// Seals messages where they stand, and writes them behind all that waits.
    fn seal_in_place(&mut self, body: &mut [u8]) -> Result<()> {
        // In front of each message the tag of the one before, and its own length.
        let (mut seams, mut seam) = (Vec::with_capacity(body.len() / CUT + 1), Vec::new());
        for text in body.chunks_mut(CUT) {
            let tag = self.outgoing.seal(text)?;
            seam.extend(((text.len() + TAG) as u16).to_be_bytes());
            seams.push(std::mem::replace(&mut seam, tag.to_vec()));
        }
        let waits = self.out.get(..self.waiting).unwrap_or_default();
        let mut parts = vec![IoSlice::new(waits)];
        for (seam, text) in seams.iter().zip(body.chunks(CUT)) {
            parts.extend([IoSlice::new(seam), IoSlice::new(text)]);
        }
        parts.push(IoSlice::new(&seam));
        let bytes = parts.iter().map(|part| part.len()).sum();
        write_all(&mut self.tcp, &mut parts)
            .with_context(|| format!("cannot write to {}", self.peer))?;
        self.wrote(bytes);
        Ok(())
    }

    /// Writes what waits.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn flush(&mut self) -> Result<()> {
        let out = self.out.get(..self.waiting).unwrap_or_default();
        self.tcp
            .write_all(out)
            .with_context(|| format!("cannot write to {}", self.peer))?;
        self.wrote(self.waiting);
        Ok(())
    }

    /// Takes note of what went to the kernel, what waited included.
    fn wrote(&mut self, bytes: usize) {
        self.totals.wire += bytes as u64;
        self.packer.wrote(bytes);
        self.waiting = 0;
    }

    /// Whether the other side has closed it, or the connection broke.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        !matches!(
            recv(self.tcp.as_raw_fd(), &mut [0], flags),
            Ok(1..) | Err(Errno::EAGAIN)
        )
    }

    /// What was sent so far.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// The next frame; none when the other end has closed between two frames.
    ///
    /// # Errors
    /// When the connection breaks, or what arrives was not sealed by the other end in this order.
    pub fn recv(&mut self) -> Result<Option<Frame>> {
        self.recv_into(Buffer::default())
    }

    /// The same, into a buffer that has been used before: memory that is new has to be cleared by the kernel first.
    ///
    /// # Errors
    /// As for [`Stream::recv`].
    pub fn recv_into(&mut self, mut body: Buffer) -> Result<Option<Frame>> {
        let Some(first) = self.open()? else {
            return Ok(None);
        };
        let header = Header::read(first)?;
        let behind = first.get(HEADER..).unwrap_or_default();
        let Some((head, with_it)) = behind.split_at_checked(header.front.into()) else {
            bail!("a frame's head is shorter than it says");
        };
        let head = head.to_vec();
        let apart = header.packed >= APART;
        if with_it.len() != if apart { 0 } else { header.packed } {
            bail!("a frame is longer or shorter than it says");
        }
        body.resize(header.packed);
        if apart {
            self.input.read_ahead(BEGINNING);
            body.chunks_mut(AT_HAND)
                .try_for_each(|texts| self.open_apart(texts))?;
        } else {
            body.copy_from_slice(with_it);
            self.input.read_ahead(AT_ONCE);
        }
        let body = header.packing.unpack(body, header.raw)?;
        let kind = header.kind;
        Ok(Some(Frame { kind, head, body }))
    }

    /// A body that stands apart, read and opened in its place. On an error what stands there is worth nothing.
    fn open_apart(&mut self, body: &mut [u8]) -> Result<()> {
        // Between two messages the tag of one and the length of the next.
        let mut seams = vec![[0; TAG + LENGTH]; body.len().div_ceil(CUT) + 1];
        let last = seams.len() - 1;
        let mut parts = Vec::with_capacity(2 * seams.len());
        let mut texts = body.chunks_mut(CUT);
        for (at, seam) in seams.iter_mut().enumerate() {
            let seam = match at {
                0 => &mut seam[TAG..],
                at if at == last => &mut seam[..TAG],
                _ => &mut seam[..],
            };
            parts.push(IoSliceMut::new(seam));
            parts.extend(texts.next().map(IoSliceMut::new));
        }
        self.input
            .scatter(&self.tcp, &mut parts)
            .map_err(|e| broken(&self.peer, e))?;
        let behind = seams.iter().skip(1);
        for ((text, before), behind) in body.chunks_mut(CUT).zip(&seams).zip(behind) {
            let [.., a, b] = *before;
            if usize::from(u16::from_be_bytes([a, b])) != text.len() + TAG {
                bail!("a frame is not cut as agreed");
            }
            let tag = behind.first_chunk().copied().unwrap_or_default();
            let opened = self.incoming.open(text, tag);
            opened.map_err(|_| not_sealed(&self.peer))?;
        }
        Ok(())
    }

    /// Seals a message that holds these parts.
    fn seal<const N: usize>(&mut self, parts: [&[u8]; N]) -> Result<()> {
        let begin = self.waiting + LENGTH;
        let mut at = begin;
        for part in parts {
            let end = at + part.len();
            let place = self.out.get_mut(at..end).context("a message is too long")?;
            place.copy_from_slice(part);
            at = end;
        }
        let text = self.out.get_mut(begin..at).unwrap_or_default();
        let tag = self.outgoing.seal(text)?;
        let len = (text.len() + TAG) as u16;
        if let Some(place) = self.out.get_mut(at..at + TAG) {
            place.copy_from_slice(&tag);
        }
        if let Some(place) = self.out.get_mut(self.waiting..begin) {
            place.copy_from_slice(&len.to_be_bytes());
        }
        self.waiting = at + TAG;
        if self.waiting >= AT_ONCE {
            self.flush()?;
        }
        Ok(())
    }

    /// Opens the next message; none at the end of the stream.
    fn open(&mut self) -> Result<Option<&[u8]>> {
        let peer = &self.peer;
        let broken = |e| broken(peer, e);
        if !self.input.need(&mut self.tcp, LENGTH).map_err(broken)? {
            return Ok(None);
        }
        let length = (*self.input.take(LENGTH)).try_into().unwrap_or_default();
        let len = usize::from(u16::from_be_bytes(length));
        if !self.input.need(&mut self.tcp, len).map_err(broken)? && len > 0 {
            return Err(broken(ErrorKind::UnexpectedEof.into()));
        }
        let Some((text, tag)) = self.input.take(len).split_last_chunk_mut::<TAG>() else {
            return Err(not_sealed(peer));
        };
        let opened = self.incoming.open(text, *tag);
        opened.map_err(|_| not_sealed(peer))?;
        Ok(Some(text))
    }
}

impl Deref for Body<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Body::Kept(body) => body,
            Body::Spent(body) => body,
        }
    }
}

fn broken(peer: &str, e: std::io::Error) -> anyhow::Error {
    match e.kind() {
        ErrorKind::UnexpectedEof => anyhow!(e).context(format!("{peer} broke off")),
        _ => anyhow!(e).context(format!("cannot read from {peer}")),
    }
}

fn not_sealed(peer: &str) -> anyhow::Error {
    anyhow!("what arrived from {peer} was not sealed with the key")
}

/// Writes these, one after the other.
fn write_all(tcp: &mut TcpStream, mut parts: &mut [IoSlice<'_>]) -> std::io::Result<()> {
    IoSlice::advance_slices(&mut parts, 0);
    while !parts.is_empty() {
        match tcp.write_vectored(parts) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => IoSlice::advance_slices(&mut parts, n),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn handshake(key: &Key, id: &str, first: bool) -> Result<HandshakeState> {
    let builder = snow::Builder::new(PATTERN.parse().context("Noise")?)
        .psk(0, key.bytes())
        .and_then(|b| b.prologue(id.as_bytes()))
        .context("Noise")?;
    let state = if first {
        builder.build_initiator()
    } else {
        builder.build_responder()
    };
    state.context("Noise")
}

const _: () = assert!(HEADER + u8::MAX as usize + APART + TAG <= SEALED && CUT + TAG <= SEALED);

#[cfg(test)]
mod tests;
