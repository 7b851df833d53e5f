//! The two ends of a stream.

use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
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

const PATTERN: &str = "Noise_NNpsk0_25519_AESGCM_SHA256";
/// Longest message of Noise, and what it may hold.
const SEALED: usize = 65535;
const PLAIN: usize = SEALED - TAG;
/// Bytes written and read at once: few calls, and they stay in a second-level cache between the socket and the cipher.
const AT_ONCE: usize = 256 << 10;
/// Of a message: its length in front of it.
const LENGTH: usize = 2;
/// Of a frame whose body stands apart: what each of its messages holds, but the last; whole pages.
const CUT: usize = 15 << 12;
/// Bodies shorter than this are sent together with their heads: a copy costs less than more messages.
const APART: usize = 32 << 10;
/// Bytes that such a frame mostly begins with: length, header, what is in front, tag.
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is; the ends agree on it.
    pub kind: u8,
    /// What it holds.
    pub body: Vec<u8>,
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

    /// Sends a frame; packed if that is faster than the link. It may stay here until [`Stream::flush`].
    ///
    /// # Errors
    /// When the connection breaks, or the frame is longer than [`LONGEST`].
    pub fn send(&mut self, kind: u8, body: &[u8]) -> Result<()> {
        self.send_behind(kind, &[], body)
    }

    /// The same, of a frame that begins with `head`: what comes behind it is not copied together with it.
    ///
    /// # Errors
    /// As for [`Stream::send`].
    pub fn send_behind(&mut self, kind: u8, head: &[u8], body: &[u8]) -> Result<()> {
        let raw = head.len() + body.len();
        if raw > LONGEST || head.len() > PLAIN - HEADER {
            bail!("a frame of {raw} bytes is too long");
        }
        match self.packer.pack(head, body, &self.tcp) {
            Some((packing, packed)) => self.frame(kind, packing, raw, &[], &packed),
            None => self.frame(kind, Packing::None, raw, head, body),
        }
    }

    /// The same, of a body that may be sealed where it stands: it is worth nothing any more then.
    ///
    /// # Errors
    /// As for [`Stream::send`].
    pub fn send_in_place(&mut self, kind: u8, head: &[u8], body: &mut [u8]) -> Result<()> {
        let raw = head.len() + body.len();
        if body.len() < APART || raw > LONGEST || head.is_empty() || head.len() > u8::MAX.into() {
            return self.send_behind(kind, head, body);
        }
        if let Some((packing, packed)) = self.packer.pack(head, body, &self.tcp) {
            return self.frame(kind, packing, raw, &[], &packed);
        }
        let header = Header {
            kind,
            packing: Packing::None,
            front: head.len(),
            packed: raw,
            raw,
        };
        self.seal([&header.bytes(), head])?;
        // Between two messages the tag of one and the length of the next.
        let mut tag: &[u8] = &[];
        let mut seams = Vec::with_capacity(body.len() / CUT + 2);
        let mut tags = Vec::with_capacity(body.len() / CUT + 1);
        for text in body.chunks_mut(CUT) {
            tags.push(self.outgoing.seal(text)?);
        }
        for (text, next) in body.chunks(CUT).zip(&tags) {
            let len = ((text.len() + TAG) as u16).to_be_bytes();
            seams.push([tag, &len].concat());
            tag = next;
        }
        let waits = self.out.get(..self.waiting).unwrap_or_default();
        let mut parts = vec![IoSlice::new(waits)];
        for (text, seam) in body.chunks(CUT).zip(&seams) {
            parts.extend([IoSlice::new(seam), IoSlice::new(text)]);
        }
        parts.push(IoSlice::new(tag));
        let bytes = parts.iter().map(|part| part.len()).sum();
        write_all(&mut self.tcp, &mut parts)
            .with_context(|| format!("cannot write to {}", self.peer))?;
        self.wrote(bytes);
        self.totals.raw += raw as u64;
        Ok(())
    }

    fn frame(
        &mut self,
        kind: u8,
        packing: Packing,
        raw: usize,
        head: &[u8],
        body: &[u8],
    ) -> Result<()> {
        let header = Header {
            kind,
            packing,
            front: 0,
            packed: head.len() + body.len(),
            raw,
        };
        let room = PLAIN - HEADER - head.len();
        let (with_it, behind) = body.split_at(body.len().min(room));
        self.seal([&header.bytes(), head, with_it])?;
        for part in behind.chunks(PLAIN) {
            self.seal([part])?;
        }
        self.totals.raw += raw as u64;
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
        self.recv_into(Vec::new())
    }

    /// The same, into a buffer that has been used before: memory that is new has to be cleared by the kernel first.
    ///
    /// # Errors
    /// As for [`Stream::recv`].
    pub fn recv_into(&mut self, body: Vec<u8>) -> Result<Option<Frame>> {
        match self.begin(body)? {
            Some(Begun::Whole(frame)) => Ok(Some(frame)),
            Some(Begun::Apart { kind, front, rest }) => {
                let mut body = front;
                let at = body.len();
                body.resize(at + rest, 0);
                self.rest(body.get_mut(at..).unwrap_or_default())?;
                Ok(Some(Frame { kind, body }))
            }
            None => Ok(None),
        }
    }

    /// The next frame, or its front when it has one: then [`Stream::rest`] has to be called next.
    ///
    /// # Errors
    /// As for [`Stream::recv`].
    pub fn begin(&mut self, mut body: Vec<u8>) -> Result<Option<Begun>> {
        let Some(first) = self.open()? else {
            return Ok(None);
        };
        let header = Header::read(first)?;
        let data = first.get(HEADER..).unwrap_or_default();
        if data.len() > header.packed {
            bail!("a frame is longer than it says");
        }
        body.clear();
        body.reserve(header.packed);
        body.extend_from_slice(data);
        if header.front > 0 {
            if body.len() != header.front {
                bail!("the front of a frame is longer or shorter than it says");
            }
            self.input.read_ahead(BEGINNING);
            return Ok(Some(Begun::Apart {
                kind: header.kind,
                front: body,
                rest: header.packed - header.front,
            }));
        }
        self.input.read_ahead(AT_ONCE);
        while body.len() < header.packed {
            let Some(part) = self.open()? else {
                bail!("{} closed the stream in the middle of a frame", self.peer);
            };
            body.extend_from_slice(part);
        }
        if body.len() != header.packed {
            bail!("a frame is longer than it says");
        }
        let body = header.packing.unpack(body, header.raw)?;
        Ok(Some(Begun::Whole(Frame {
            kind: header.kind,
            body,
        })))
    }

    /// What stands behind the front of a frame, read and opened in its place. On an error what stands there is worth
    /// nothing.
    ///
    /// # Errors
    /// As for [`Stream::recv`].
    pub fn rest(&mut self, body: &mut [u8]) -> Result<()> {
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

/// What [`Stream::begin`] gives.
#[derive(Debug)]
pub enum Begun {
    /// All of a frame.
    Whole(Frame),
    /// Of a frame of that kind what is in front of so many bytes that are still to come.
    Apart {
        kind: u8,
        front: Vec<u8>,
        rest: usize,
    },
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;

    const LIMIT: Duration = Duration::from_secs(30);

    fn key(seed: u8) -> Key {
        Key::from_hex(&format!("{seed:02x}").repeat(32)).unwrap()
    }

    fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    /// A receiver that knows key 1 and takes the move "m"; what it gets, frame by frame, then how it ended.
    fn receiver(listener: TcpListener) -> mpsc::Receiver<Result<Option<Frame>>> {
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            let mut stream = match Stream::accept(&listener, &key(1), "m", Instant::now() + LIMIT) {
                Ok(stream) => stream,
                Err(e) => return drop(tell.send(Err(e))),
            };
            loop {
                let frame = stream.recv();
                let last = !matches!(frame, Ok(Some(_)));
                if tell.send(frame).is_err() || last {
                    return;
                }
            }
        });
        told
    }

    /// Passes one connection on to `to` and changes what goes there.
    fn between(to: SocketAddr, change: impl Fn(Vec<u8>) -> Vec<u8> + Send + 'static) -> SocketAddr {
        let (listener, address) = listener();
        thread::spawn(move || {
            let (mut from, _) = listener.accept().unwrap();
            let mut there = TcpStream::connect(to).unwrap();
            let (mut back, mut forth) = (there.try_clone().unwrap(), from.try_clone().unwrap());
            thread::spawn(move || std::io::copy(&mut back, &mut forth));
            loop {
                let mut len = [0; 2];
                if from.read_exact(&mut len).is_err() {
                    let _ = there.shutdown(std::net::Shutdown::Write);
                    return;
                }
                let mut message = len.to_vec();
                message.resize(2 + usize::from(u16::from_be_bytes(len)), 0);
                from.read_exact(&mut message[2..]).unwrap();
                let message = change(message);
                if message.is_empty() || there.write_all(&message).is_err() {
                    let _ = there.shutdown(std::net::Shutdown::Both);
                    return;
                }
            }
        });
        address
    }

    fn sender(to: SocketAddr) -> Result<Stream> {
        Stream::connect(to, &key(1), "m", LIMIT)
    }

    #[test]
    fn who_is_sent_away_for_being_slow_knocks_again() {
        let (first, address) = listener();
        let (told, got) = mpsc::channel();
        thread::spawn(move || {
            let (slow, _) = first.accept().unwrap();
            thread::sleep(KNOCK);
            drop(slow);
            told.send(receiver(first)).unwrap();
        });
        let mut stream = sender(address).unwrap();
        stream.send(9, b"late").unwrap();
        stream.flush().unwrap();
        let got = got.recv_timeout(LIMIT).unwrap();
        let frame = got.recv_timeout(LIMIT).unwrap().unwrap().unwrap();
        assert_eq!((frame.kind, &frame.body[..]), (9, &b"late"[..]));
    }

    #[test]
    fn frames_arrive_as_they_were_sent() {
        let (listener, address) = listener();
        let got = receiver(listener);
        let mut stream = sender(address).unwrap();
        let sizes = [
            0,
            1,
            PLAIN - HEADER,
            PLAIN - HEADER + 1,
            65536,
            1 << 20,
            LONGEST,
        ];
        for (kind, size) in sizes.into_iter().enumerate() {
            let body: Vec<u8> = (0..size).map(|at| (at / 3) as u8).collect();
            stream.send(kind as u8, &body).unwrap();
            stream.flush().unwrap();
            let frame = got.recv_timeout(LIMIT).unwrap().unwrap().unwrap();
            assert_eq!(frame.kind, kind as u8);
            assert!(frame.body == body, "{size}");
        }
        assert!(stream.send(1, &vec![0; LONGEST + 1]).is_err());
        drop(stream);
        assert!(got.recv_timeout(LIMIT).unwrap().unwrap().is_none());
    }

    #[test]
    fn whoever_knows_another_key_or_move_gets_nothing_and_the_right_one_still_comes_in() {
        let (listener, address) = listener();
        let got = receiver(listener);
        for (key, id) in [(key(2), "m"), (key(1), "other")] {
            let mut tcp = TcpStream::connect(address).unwrap();
            let mut state = handshake(&key, id, true).unwrap();
            let mut message = [0; 256];
            let len = state.write_message(&[], &mut message).unwrap();
            tcp.write_all(&(len as u16).to_be_bytes()).unwrap();
            tcp.write_all(&message[..len]).unwrap();
            tcp.set_read_timeout(Some(LIMIT)).unwrap();
            let mut answer = Vec::new();
            let _ = tcp.read_to_end(&mut answer);
            assert_eq!(answer, b"");
            let error = Stream::connect(address, &key, id, LIMIT).err().unwrap();
            assert!(
                format!("{error:#}").contains("does not know the key"),
                "{error:#}"
            );
        }
        // Garbage, silence that ends, a length that is none.
        for bytes in [&b"GET / HTTP/1.0\r\n\r\n"[..], &[], &[0xff; 70_000]] {
            let mut tcp = TcpStream::connect(address).unwrap();
            let _ = tcp.write_all(bytes);
        }
        let mut stream = sender(address).unwrap();
        stream.send(9, b"right").unwrap();
        stream.flush().unwrap();
        let frame = got.recv_timeout(LIMIT).unwrap().unwrap().unwrap();
        assert_eq!((frame.kind, &frame.body[..]), (9, &b"right"[..]));
    }

    #[test]
    fn what_was_recorded_opens_nothing() {
        let (inner, address) = listener();
        let got = receiver(inner);
        let (tell, told) = mpsc::channel();
        let middle = between(address, move |message| {
            tell.send(message.clone()).unwrap();
            message
        });
        let mut stream = sender(middle).unwrap();
        stream.send(1, b"secret").unwrap();
        stream.flush().unwrap();
        got.recv_timeout(LIMIT).unwrap().unwrap().unwrap();
        drop(stream);
        let recorded: Vec<u8> = told.try_iter().flatten().collect();
        // The same bytes again, to one who waits for the same move.
        let (again, address) = listener();
        let got = receiver(again);
        let mut tcp = TcpStream::connect(address).unwrap();
        tcp.write_all(&recorded).unwrap();
        drop(tcp);
        let mut stream = sender(address).unwrap();
        stream.send(2, b"fresh").unwrap();
        stream.flush().unwrap();
        let frame = got.recv_timeout(LIMIT).unwrap().unwrap().unwrap();
        assert_eq!(frame.kind, 2);
    }

    /// Sends a frame, its body in place or not.
    type Sends = fn(&mut Stream, u8) -> Result<()>;

    /// Sends three frames through somebody who changes the messages; what arrives.
    fn through(
        send: Sends,
        change: impl Fn(usize, Vec<u8>) -> Vec<u8> + Send + 'static,
    ) -> Vec<Result<Option<u8>>> {
        let (listener, address) = listener();
        let got = receiver(listener);
        let count = std::sync::atomic::AtomicUsize::new(0);
        let middle = between(address, move |message| {
            let number = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            change(number, message)
        });
        let mut stream = sender(middle).unwrap();
        for kind in 1..4 {
            let _ = send(&mut stream, kind).and_then(|()| stream.flush());
        }
        drop(stream);
        let mut all = Vec::new();
        while let Ok(got) = got.recv_timeout(LIMIT) {
            all.push(got.map(|frame| frame.map(|frame| frame.kind)));
        }
        all
    }

    // Message 0 is the handshake, 1 its proof; each frame of these has two, or three where the body stands apart.
    #[test]
    fn what_is_changed_repeated_left_out_or_cut_off_is_an_error() {
        damaged(|stream, kind| stream.send(kind, &[kind; 100_000]), 0);
        damaged(
            |stream, kind| stream.send_in_place(kind, &[1; 12], &mut [kind; 100_000]),
            2,
        );
    }

    #[test]
    fn what_stands_apart_arrives_where_it_is_wanted() {
        let (listener, address) = listener();
        let sizes = [APART, CUT - 1, CUT, CUT + 1, 3 * CUT, 1 << 20];
        let receives = thread::spawn(move || {
            let mut stream =
                Stream::accept(&listener, &key(1), "m", Instant::now() + LIMIT).unwrap();
            for (kind, size) in sizes.into_iter().enumerate() {
                let Some(Begun::Apart {
                    kind: got,
                    front,
                    rest,
                }) = stream.begin(Vec::new()).unwrap()
                else {
                    panic!("{size}");
                };
                assert_eq!((got, &front[..], rest), (kind as u8, &b"front"[..], size));
                let mut body = vec![0; size];
                stream.rest(&mut body).unwrap();
                assert!(body == text(size), "{size}");
                // One that has no front comes between, and one that is too short for it.
                for short in [&b"short"[..], b"frontshort"] {
                    let frame = stream.recv().unwrap().unwrap();
                    assert_eq!((frame.kind, &frame.body[..]), (9, short));
                }
            }
            assert!(stream.recv().unwrap().is_none());
        });
        let mut stream = sender(address).unwrap();
        for (kind, size) in sizes.into_iter().enumerate() {
            let mut body = text(size);
            stream
                .send_in_place(kind as u8, b"front", &mut body)
                .unwrap();
            assert!(body != text(size));
            stream.send(9, b"short").unwrap();
            stream
                .send_in_place(9, b"front", &mut b"short".to_vec())
                .unwrap();
        }
        assert_eq!(
            stream.totals().raw as usize,
            sizes.iter().map(|s| s + 20).sum::<usize>()
        );
        stream.flush().unwrap();
        drop(stream);
        receives.join().unwrap();
    }

    fn text(size: usize) -> Vec<u8> {
        (0..size).map(|at| (at / 3) as u8).collect()
    }

    /// What becomes of frames of which something is done to the message number 4, or that many behind it.
    fn damaged(send: Sends, more: usize) {
        let fine = through(send, |_, message| message);
        let kinds: Vec<_> = fine.into_iter().map(Result::unwrap).collect();
        assert_eq!(kinds, [Some(1), Some(2), Some(3), None]);
        type Change = fn(usize, Vec<u8>) -> Vec<u8>;
        let ways: [(&str, Change); 5] = [
            ("changed", |n, mut message| {
                if n == 4 {
                    message[50] ^= 1;
                }
                message
            }),
            ("repeated", |n, message| match n {
                3 => message.repeat(2),
                _ => message,
            }),
            ("left out", |n, message| match n {
                4 => vec![0, 0],
                _ => message,
            }),
            (
                "cut between the messages of a frame",
                |n, message| match n {
                    5 => Vec::new(),
                    _ => message,
                },
            ),
            ("cut within a message", |n, message| match n {
                4 => message[..30].to_vec(),
                5 => Vec::new(),
                _ => message,
            }),
        ];
        for (way, change) in ways {
            // The second frame, whatever it is cut into.
            let got = through(send, move |n, message| {
                change(n.saturating_sub(more), message)
            });
            let kinds: Vec<_> = got.iter().filter_map(|g| g.as_ref().ok()).collect();
            assert_eq!(kinds, [&Some(1)], "{way}");
            assert!(got.last().unwrap().is_err(), "{way}");
        }
    }
}
