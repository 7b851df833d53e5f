//! What goes over the connection between a task and its pvmd (PVM 3.4, protocol 1318), as plain data.
//!
//! ```text
//! fragment:  dst, src, length of what follows (4 bytes each), flags (1: first, 2: last), 3 unused
//! the first fragment of a message goes on with
//! header:    encoding, tag, context, unused, wait id, checksum, 2 unused (4 bytes each)
//! body:      the rest of all its fragments
//! ```
//! Everything is big-endian. In the bodies of daemon messages an integer has 4 bytes; a string has its length
//! with the NUL, its bytes, the NUL, and is filled up to a multiple of 4.
//!
//! What arrives is not trusted: every length is checked before anything is set aside for it.

use std::collections::HashMap;

use anyhow::{Context, Result, bail};

use crate::pvm::tid::Tid;

/// Version of the task-pvmd protocol.
pub const PROTOCOL: i32 = 1318;
/// Bytes of a fragment's header.
pub const FRAGMENT_HEADER: usize = 16;
/// Bytes of a message's header, in its first fragment.
pub const MESSAGE_HEADER: usize = 32;
/// Encoding of daemon messages, and of what `PvmDataDefault` packs: XDR.
pub const XDR: u32 = 0x1000_0000;
/// Longest fragment that is taken. libpvm's own are as long as the program's PvmFragSize says, 1 MB at most.
pub const LONGEST_FRAGMENT: usize = 16 << 20;
/// Messages that may be half complete at a time.
pub const MOST_PARTIAL: usize = 4096;

const FIRST: u8 = 1;
const LAST: u8 = 2;

/// Tags of messages between a task and its pvmd, context [`pvm_abi::CTX_TM`].
pub mod tm {
    const BASE: u32 = 0x8001_0000;
    /// Start of an enrolment.
    pub const CONNECT: u32 = BASE + 1;
    /// Its end.
    pub const CONN2: u32 = BASE + 2;
    /// The task leaves.
    pub const EXIT: u32 = BASE + 3;
    /// Adds hosts.
    pub const ADDHOST: u32 = BASE + 4;
    /// Which hosts there are.
    pub const CONFIG: u32 = BASE + 6;
    /// Ends the virtual machine.
    pub const HALT: u32 = BASE + 8;
    /// Starts tasks.
    pub const SPAWN: u32 = BASE + 10;
    /// Whether a task lives.
    pub const PSTAT: u32 = BASE + 11;
    /// Sends a signal to a task.
    pub const SENDSIG: u32 = BASE + 12;
    /// Which tasks there are.
    pub const TASK: u32 = BASE + 13;
    /// Asks to be told of an event.
    pub const NOTIFY: u32 = BASE + 15;
    /// The mailbox.
    pub const DB: u32 = BASE + 16;
    /// Sets an option that the pvmd keeps.
    pub const SETOPT: u32 = BASE + 22;
    /// What such options are.
    pub const GETOPT: u32 = BASE + 23;
    /// Gives out a context id, or takes one back.
    pub const CONTEXT: u32 = BASE + 24;
}

/// Tags of messages from libpvm to libpvm, context [`pvm_abi::CTX_TC`].
pub mod tc {
    const BASE: u32 = 0x8003_0000;
    /// Asks for a direct route.
    pub const CONREQ: u32 = BASE + 1;
    /// Grants or refuses one.
    pub const CONACK: u32 = BASE + 2;
    /// A direct route ends.
    pub const TASKEXIT: u32 = BASE + 3;
    /// Nothing: libpvm discards it unseen.
    pub const NOOP: u32 = BASE + 4;
    /// Output of a task, to whoever collects it.
    pub const OUTPUT: u32 = BASE + 5;
}

/// A whole message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who sent it; a pvmd puts the tid of the connection here, whatever was written.
    pub src: Tid,
    /// Whom it is for.
    pub dst: Tid,
    /// What it is about.
    pub tag: u32,
    /// Its context; programs' messages have 0 unless they ask for another.
    pub ctx: u32,
    /// Request that this answers; 0 for none.
    pub wait: u32,
    /// How the body is encoded, see [`XDR`].
    pub encoding: u32,
    /// The body.
    pub body: Vec<u8>,
}

impl Message {
    /// The bytes that carry it, in fragments of `fragment` bytes with their header.
    pub fn encode(&self, fragment: usize) -> Vec<u8> {
        let room = fragment
            .clamp(FRAGMENT_HEADER + MESSAGE_HEADER + 4, LONGEST_FRAGMENT)
            .saturating_sub(FRAGMENT_HEADER);
        let mut whole = Vec::with_capacity(MESSAGE_HEADER + self.body.len());
        for word in [self.encoding, self.tag, self.ctx, 0, self.wait, 0, 0, 0] {
            whole.extend(word.to_be_bytes());
        }
        whole.extend(&self.body);
        let count = whole.len().div_ceil(room);
        let mut bytes = Vec::with_capacity(whole.len() + count * FRAGMENT_HEADER);
        for (at, part) in whole.chunks(room).enumerate() {
            let first = if at == 0 { FIRST } else { 0 };
            let last = if at + 1 == count { LAST } else { 0 };
            for word in [self.dst.0, self.src.0, part.len() as u32] {
                bytes.extend(word.to_be_bytes());
            }
            bytes.extend([first | last, 0, 0, 0]);
            bytes.extend(part);
        }
        bytes
    }

    /// Reads the body from its beginning.
    pub fn reader(&self) -> Reader<'_> {
        Reader::new(&self.body)
    }
}

/// Puts messages together out of bytes as they come. Fragments of several senders may alternate.
pub struct Assembler {
    bytes: Vec<u8>,
    partial: HashMap<Tid, Message>,
    partial_bytes: usize,
    limit: usize,
}

impl Assembler {
    /// One that holds up to `limit` bytes of bodies that are not complete yet.
    pub fn new(limit: usize) -> Assembler {
        Assembler {
            bytes: Vec::new(),
            partial: HashMap::new(),
            partial_bytes: 0,
            limit,
        }
    }

    /// Takes bytes that were read.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Whether all that was pushed has been given back as messages.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.partial.is_empty() && self.bytes.is_empty()
    }

    /// The next message that is complete, if any is.
    ///
    /// # Errors
    /// When the bytes are none of the protocol. Nothing more can be read then.
    pub fn message(&mut self) -> Result<Option<Message>> {
        let mut used = 0;
        let mut found = None;
        while found.is_none() {
            match next_fragment(self.bytes.get(used..).unwrap_or_default())? {
                Some((fragment, len)) => {
                    used += len;
                    let Assembler {
                        partial,
                        partial_bytes,
                        limit,
                        ..
                    } = self;
                    found = add(fragment, partial, partial_bytes, *limit)?;
                }
                None => break,
            }
        }
        self.bytes.drain(..used);
        Ok(found)
    }
}

/// A fragment; `data` begins with the message's header if it is the first.
struct Fragment {
    dst: Tid,
    src: Tid,
    flags: u8,
    data: Vec<u8>,
}

/// The fragment at the beginning of `bytes`, and its length with the header; none while it is incomplete.
fn next_fragment(bytes: &[u8]) -> Result<Option<(Fragment, usize)>> {
    let Some(header) = bytes.get(..FRAGMENT_HEADER) else {
        return Ok(None);
    };
    let mut words = Reader::new(header);
    let (dst, src, len) = (words.uint()?, words.uint()?, words.uint()? as usize);
    let flags = header.get(12).copied().unwrap_or_default();
    if len > LONGEST_FRAGMENT {
        bail!("a fragment from t{src:x} claims to have {len} bytes: this is not PVM's protocol");
    }
    let end = FRAGMENT_HEADER + len;
    Ok(bytes.get(FRAGMENT_HEADER..end).map(|data| {
        let fragment = Fragment {
            dst: Tid(dst),
            src: Tid(src),
            flags,
            data: data.to_vec(),
        };
        (fragment, end)
    }))
}

/// Adds a fragment to its message; gives the message when it was the last one.
fn add(
    fragment: Fragment,
    partial: &mut HashMap<Tid, Message>,
    partial_bytes: &mut usize,
    limit: usize,
) -> Result<Option<Message>> {
    let Fragment {
        dst,
        src,
        flags,
        data,
    } = fragment;
    let before = partial.remove(&src);
    *partial_bytes = partial_bytes.saturating_sub(before.as_ref().map_or(0, |m| m.body.len()));
    let message = if flags & FIRST != 0 {
        if before.is_some() {
            bail!("{src} began a message before its last one was complete");
        }
        let mut words = Reader::new(&data);
        let mut word = || {
            words
                .uint()
                .with_context(|| format!("the first fragment of a message from {src} is too short"))
        };
        let (encoding, tag, ctx) = (word()?, word()?, word()?);
        let (_unused, wait, _checksum) = (word()?, word()?, word()?);
        let (_, _) = (word()?, word()?);
        let body = data.get(MESSAGE_HEADER..).unwrap_or_default().to_vec();
        Message {
            src,
            dst,
            tag,
            ctx,
            wait,
            encoding,
            body,
        }
    } else {
        let Some(mut message) = before else {
            bail!("{src} sent the middle of a message without its beginning");
        };
        message.body.extend(data);
        message
    };
    if message.body.len() > limit.saturating_sub(*partial_bytes) {
        bail!(
            "a message from {src} (tag {:#x}) is longer than the {limit} bytes that are taken",
            message.tag
        );
    }
    if flags & LAST != 0 {
        return Ok(Some(message));
    }
    if partial.len() >= MOST_PARTIAL {
        bail!("more than {MOST_PARTIAL} tasks have begun messages and not ended them");
    }
    *partial_bytes += message.body.len();
    partial.insert(src, message);
    Ok(None)
}

/// Writes a body.
#[derive(Clone, Debug, Default)]
pub struct Body(Vec<u8>);

impl Body {
    /// An empty one.
    pub fn new() -> Body {
        Body::default()
    }

    /// Adds an integer.
    #[must_use]
    pub fn int(mut self, value: i32) -> Body {
        self.0.extend(value.to_be_bytes());
        self
    }

    /// Adds an integer without sign: a tid, an address.
    #[must_use]
    pub fn uint(mut self, value: u32) -> Body {
        self.0.extend(value.to_be_bytes());
        self
    }

    /// Adds a string. What stands behind a NUL in it is left out: PVM would not see it either.
    #[must_use]
    pub fn string(mut self, text: &[u8]) -> Body {
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        self.0.extend((text.len() as u32 + 1).to_be_bytes());
        self.0.extend(text);
        self.0
            .extend([0; 4].iter().take(padded(text.len() + 1) - text.len()));
        self
    }

    /// Adds bytes as they are.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Body {
        self.0.extend(bytes);
        self
    }

    /// The bytes.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// The next multiple of 4.
fn padded(len: usize) -> usize {
    len.next_multiple_of(4)
}

/// Reads a body.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads `bytes` from the beginning.
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { rest: bytes }
    }

    /// Bytes that have not been read.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// When there are fewer.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8]> {
        let Some((taken, rest)) = self.rest.split_at_checked(count) else {
            bail!(
                "the message ends {} bytes too early",
                count - self.rest.len()
            );
        };
        self.rest = rest;
        Ok(taken)
    }

    /// An integer without sign.
    ///
    /// # Errors
    /// When the body ends before.
    pub fn uint(&mut self) -> Result<u32> {
        let mut word = [0; 4];
        word.copy_from_slice(self.bytes(4)?);
        Ok(u32::from_be_bytes(word))
    }

    /// An integer.
    ///
    /// # Errors
    /// When the body ends before.
    pub fn int(&mut self) -> Result<i32> {
        self.uint().map(|word| word as i32)
    }

    /// A tid.
    ///
    /// # Errors
    /// When the body ends before.
    pub fn tid(&mut self) -> Result<Tid> {
        self.uint().map(Tid)
    }

    /// A string, without its NUL.
    ///
    /// # Errors
    /// When the body ends before, or the length is 0 or negative.
    pub fn string(&mut self) -> Result<&'a [u8]> {
        let len = self.uint()? as usize;
        if len == 0 {
            bail!("a string in the message has no NUL");
        }
        let text = self.bytes(len)?;
        // At the end of a message what fills up may be missing.
        let fill = padded(len).saturating_sub(len).min(self.rest.len());
        self.bytes(fill)?;
        Ok(text.split(|byte| *byte == 0).next().unwrap_or_default())
    }

    /// A string for people, which may hold bytes that are no UTF-8.
    ///
    /// # Errors
    /// As for [`Reader::string`].
    pub fn text(&mut self) -> Result<String> {
        self.string()
            .map(|text| String::from_utf8_lossy(text).into_owned())
    }
}

/// Reads `bytes` as an attacker's pvmd would send them, and every body in every way: for tests and fuzzing.
/// What is wrong with the bytes is no matter here.
pub fn digest(bytes: &[u8], piece: usize) {
    let mut assembler = Assembler::new(1 << 20);
    for part in bytes.chunks(piece.max(1)) {
        assembler.push(part);
        loop {
            match assembler.message() {
                Ok(Some(message)) => {
                    let _ = message.encode(piece);
                    let mut reader = message.reader();
                    while reader.text().is_ok() {}
                    while reader.tid().is_ok() {}
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(src: u32, body: Vec<u8>) -> Message {
        Message {
            src: Tid(src),
            dst: Tid(0x40002),
            tag: 7,
            ctx: 3,
            wait: 5,
            encoding: XDR,
            body,
        }
    }

    fn all(assembler: &mut Assembler) -> Vec<Message> {
        std::iter::from_fn(|| assembler.message().unwrap()).collect()
    }

    #[test]
    fn strings_are_filled_up_to_four_bytes() {
        let body = Body::new().string(b"127.0.0.1").int(-2).into_bytes();
        assert_eq!(body.len(), 4 + 12 + 4);
        let mut reader = Reader::new(&body);
        assert_eq!(reader.string().unwrap(), b"127.0.0.1");
        assert_eq!(reader.int().unwrap(), -2);
        assert!(reader.int().is_err());
        // The last one need not be.
        assert_eq!(Reader::new(b"\0\0\0\x02a\0").string().unwrap(), b"a");
    }

    #[test]
    fn fragments_of_several_senders_alternate() {
        let (a, b) = (message(1, vec![1; 300]), message(2, vec![2; 200]));
        let cut = |m: &Message| {
            let bytes = m.encode(116);
            bytes.chunks(116).map(<[u8]>::to_vec).collect::<Vec<_>>()
        };
        let (mut fa, mut fb) = (cut(&a).into_iter(), cut(&b).into_iter());
        let mut assembler = Assembler::new(1000);
        loop {
            let pair = (fa.next(), fb.next());
            if pair == (None, None) {
                break;
            }
            assembler.push(&pair.0.unwrap_or_default());
            assembler.push(&pair.1.unwrap_or_default());
        }
        assert_eq!(all(&mut assembler), [b, a]);
    }

    #[test]
    fn what_claims_too_much_is_refused_at_once() {
        let mut assembler = Assembler::new(1000);
        assembler.push(&[0, 0, 0, 1, 0, 0, 0, 2, 0xff, 0xff, 0xff, 0xff, 3, 0, 0, 0]);
        let error = assembler.message().unwrap_err().to_string();
        assert!(error.contains("from t2 claims"), "{error}");
        let mut assembler = Assembler::new(1000);
        assembler.push(&message(2, vec![0; 1001]).encode(4080));
        let error = assembler.message().unwrap_err().to_string();
        assert!(error.contains("longer than the 1000 bytes"), "{error}");
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            body in proptest::collection::vec(any::<u8>(), 0..20_000),
            fragment in 0usize..9000,
            piece in 1usize..5000,
        ) {
            let sent = message(0x40001, body);
            let mut assembler = Assembler::new(1 << 20);
            let mut got = Vec::new();
            for part in sent.encode(fragment).chunks(piece) {
                assembler.push(part);
                got.extend(all(&mut assembler));
            }
            prop_assert_eq!(got, [sent]);
        }

        #[test]
        fn texts_come_back(text in "[^\0]{0,40}", after: i32) {
            let body = Body::new().string(text.as_bytes()).int(after).into_bytes();
            let mut reader = Reader::new(&body);
            prop_assert_eq!(reader.text().unwrap(), text);
            prop_assert_eq!(reader.int().unwrap(), after);
            prop_assert!(reader.rest().is_empty());
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(
            bytes in proptest::collection::vec(any::<u8>(), 0..2000),
            piece in 1usize..100,
        ) {
            digest(&bytes, piece);
        }

        #[test]
        fn damaged_messages_are_decoded_or_refused(
            body in proptest::collection::vec(any::<u8>(), 0..500),
            damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            piece in 1usize..100,
        ) {
            let mut bytes = message(1, body).encode(100);
            for (at, value) in damage {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            digest(&bytes, piece);
        }
    }
}
