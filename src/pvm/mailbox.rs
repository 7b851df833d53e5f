//! PVM's mailbox (TM_DB): packed messages under names, kept by the master pvmd.

use anyhow::{Context, Result, bail};
use pvm_abi::{MBOX_HANDED_OVER, MBOX_INDEX_SHIFT, MBOX_MULTI_INSTANCE, mbox_flags};

use crate::pvm::client::Client;
use crate::pvm::tid::Tid;
use crate::pvm::virtual_machine::error_name;
use crate::pvm::wire::{Body, Message, Reader, XDR, tm};

const PUT: i32 = 1;
const REMOVE: i32 = 2;
const GET: i32 = 3;
const NAMES: i32 = 4;

/// pvm3.h: PvmMboxPersistent. The entry outlives its owner.
pub const PERSISTENT: i32 = 1;
/// pvm3.h: PvmMboxMultiInstance. Others may use the same name.
pub const MULTI_INSTANCE: i32 = MBOX_MULTI_INSTANCE;
/// pvm3.h: PvmMboxOverWritable. Others may write it over, and take it away.
pub const OVERWRITABLE: i32 = 4;
/// The name under which those are that `reset` of PVM's console spares.
pub const NO_RESET: &str = "###_PVM_NO_RESET_###";
/// PvmNotFound, PvmNoEntry
const NO_ENTRY: i32 = -32;
/// Names and entries that are read from one answer.
const MOST: i32 = 1 << 20;

/// An entry, without its message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The name.
    pub name: String,
    /// Its number among those of that name.
    pub index: i32,
    /// Whose it is; only its owner may take it away, unless it can be written over.
    pub owner: Tid,
    /// pvm3.h: PvmMbox... flags.
    pub flags: i32,
}

impl Entry {
    /// It goes with its owner.
    pub fn vanishes(&self) -> bool {
        self.flags & PERSISTENT == 0
    }

    /// It goes with its owner, or nobody else may take it away: who misses it later is in another virtual machine.
    pub fn is_missed_later(&self) -> bool {
        self.vanishes() || self.flags & OVERWRITABLE == 0
    }
}

impl Client {
    /// Puts a packed message (as [`Client::mailbox_get`] gives it, or [`packed`]) under a name, owned by `owner`.
    /// `index` is the number it should have, if not the first one that is free (0). The number it got.
    ///
    /// # Errors
    /// When the pvmd refuses, with its reason.
    pub fn mailbox_put(
        &mut self,
        owner: Tid,
        name: &str,
        index: i32,
        flags: i32,
        message: &[u8],
    ) -> Result<i32> {
        let code = self
            .mailbox(put(owner, name, index, flags, message))?
            .reader()
            .int()?;
        checked(code).with_context(|| format!("cannot put '{name}' into the mailbox for {owner}"))
    }

    /// Takes an entry of `owner` away; false if there was none.
    ///
    /// # Errors
    /// When the pvmd refuses, with its reason.
    pub fn mailbox_remove(&mut self, owner: Tid, name: &str, index: i32) -> Result<bool> {
        let answer = self.mailbox(request(REMOVE, owner, name, index, 0))?;
        match answer.reader().int()? {
            NO_ENTRY => Ok(false),
            code => checked(code).map(|_| true).with_context(|| {
                format!("cannot take '{name}' ({index}) of {owner} out of the mailbox")
            }),
        }
    }

    /// Makes an entry another's; false if it was not the owner's any more. It is written over where it is (mb_insert, pvmd's
    /// msgbox.c: what is put without PvmMboxMultiInstance replaces what is its owner's, or what anybody may write over), so
    /// that who looks for it right then finds it. Requests leave at once: whatever becomes of us, the last follows the
    /// first. A pvmd takes one of a task at a time, and others' in between.
    ///
    /// # Errors
    /// When the pvmd refuses, with its reason.
    pub fn mailbox_hand_over(&mut self, entry: &Entry, to: Tid) -> Result<bool> {
        let (name, index, owner) = (&entry.name, entry.index, entry.owner);
        let Some(message) = self.mailbox_get(name, index)? else {
            return Ok(false);
        };
        // One of several of its name says so in another way from then on.
        let flags = match entry.flags & MULTI_INSTANCE {
            0 => entry.flags,
            _ => entry.flags & !MULTI_INSTANCE | MBOX_HANDED_OVER,
        };
        let put_to = put(to, name, index, flags, &message);
        let asking = "cannot ask for the mailbox of the virtual machine";
        let what = || format!("cannot hand '{name}' over from {owner} to {to}");
        if entry.flags & OVERWRITABLE == 0 {
            // Nobody but its owner can write it over: he makes it one that anybody may.
            let free = put(owner, name, index, flags | OVERWRITABLE, &message);
            let [freed, put] = self.ask_several(tm::DB, [free, put_to]).context(asking)?;
            for answer in [freed, put] {
                checked(answer.reader().int()?).with_context(what)?;
            }
            return Ok(true);
        }
        // Anybody may have written it over, or taken it away. What there was right before tells.
        let tid = self.tid();
        let look = [
            request(NAMES, tid, name, 0, 0),
            request(GET, tid, name, index, 0),
        ];
        let [entries, kept] = look;
        let [entries, kept, done] = self
            .ask_several(tm::DB, [entries, kept, put_to])
            .context(asking)?;
        checked(done.reader().int()?).with_context(what)?;
        let before = names(&mut entries.reader())?;
        let before = before.iter().find(|e| e.name == *name && e.index == index);
        let kept = read(&kept, name)?;
        match (before, kept) {
            (Some(before), _) if before.owner == owner => Ok(true),
            (Some(before), Some(kept)) => {
                self.mailbox_put_over(before, &kept)?;
                Ok(false)
            }
            _ => {
                self.mailbox_remove(to, name, index)?;
                Ok(false)
            }
        }
    }

    /// Puts an entry where one is that anybody may write over.
    fn mailbox_put_over(&mut self, entry: &Entry, message: &[u8]) -> Result<()> {
        let flags = entry.flags & !MULTI_INSTANCE;
        let body = put(entry.owner, &entry.name, entry.index, flags, message);
        checked(self.mailbox(body)?.reader().int()?)
            .map(drop)
            .with_context(|| format!("cannot put '{}' back for {}", entry.name, entry.owner))
    }

    /// The packed message of an entry; none if it is not there.
    ///
    /// # Errors
    /// When the pvmd refuses, with its reason.
    pub fn mailbox_get(&mut self, name: &str, index: i32) -> Result<Option<Vec<u8>>> {
        let tid = self.tid();
        let answer = self.mailbox(request(GET, tid, name, index, 0))?;
        read(&answer, name)
    }

    /// All entries whose name matches `pattern` (`*`: all).
    ///
    /// # Errors
    /// When the pvmd does not answer, or not in PVM's way.
    pub fn mailbox_names(&mut self, pattern: &str) -> Result<Vec<Entry>> {
        let tid = self.tid();
        let answer = self.mailbox(request(NAMES, tid, pattern, 0, 0))?;
        names(&mut answer.reader())
    }

    /// Makes `tid` survive a reset by PVM's console, as PvmNoReset does. Its entry is the first free one behind 0: that is a
    /// program's, for libpvm takes it away (lpvm.c, pvm_setopt), whoever's it is.
    ///
    /// # Errors
    /// When the pvmd refuses.
    pub fn spare_from_reset(&mut self, tid: Tid) -> Result<()> {
        self.mailbox_put(tid, NO_RESET, 1, MULTI_INSTANCE, &spared(tid))
            .map(drop)
    }

    fn mailbox(&mut self, body: Body) -> Result<Message> {
        self.ask(tm::DB, body)
            .context("cannot ask for the mailbox of the virtual machine")
    }
}

fn request(op: i32, tid: Tid, name: &str, index: i32, flags: i32) -> Body {
    Body::new()
        .int(op)
        .uint(tid.0)
        .string(name.as_bytes())
        .int(index)
        .int(flags)
}

fn put(owner: Tid, name: &str, index: i32, flags: i32, message: &[u8]) -> Body {
    let flags = flags & ((1 << MBOX_INDEX_SHIFT) - 1) | index.wrapping_shl(MBOX_INDEX_SHIFT);
    let body = request(PUT, owner, name, -1, flags);
    match name {
        // A reset goes by what these say, not by whose they are.
        NO_RESET => body.bytes(&spared(owner)),
        _ => body.bytes(message),
    }
}

/// What [`NO_RESET`] says of a task.
fn spared(tid: Tid) -> Vec<u8> {
    packed(tid, &tid.0.to_be_bytes())
}

/// The pvmd adds an empty piece in front each time an entry passes it.
fn without_empty_pieces(mut message: Reader<'_>) -> Result<Vec<u8>> {
    let mut bytes = message.bytes(8 * 4)?.to_vec();
    while !message.rest().is_empty() {
        let len = message.uint()?;
        if len > 0 {
            bytes.extend(len.to_be_bytes());
            bytes.extend(message.bytes(len as usize)?);
        }
    }
    Ok(bytes)
}

/// The packed message in an answer to a GET; none if there is none.
fn read(answer: &Message, name: &str) -> Result<Option<Vec<u8>>> {
    let mut reader = answer.reader();
    match reader.int()? {
        NO_ENTRY => Ok(None),
        code => {
            checked(code).with_context(|| format!("cannot read '{name}' of the mailbox"))?;
            without_empty_pieces(reader).map(Some)
        }
    }
}

fn checked(code: i32) -> Result<i32> {
    if code < 0 {
        bail!("{}", error_name(code));
    }
    Ok(code)
}

fn names(reader: &mut Reader<'_>) -> Result<Vec<Entry>> {
    checked(reader.int()?).context("cannot list the mailbox")?;
    let mut entries = Vec::new();
    for _ in 0..count(reader.int()?)? {
        let name = reader.text()?;
        for _ in 0..count(reader.int()?)? {
            entries.push(Entry {
                name: name.clone(),
                index: reader.int()?,
                owner: reader.tid()?,
                flags: mbox_flags(reader.int()?),
            });
        }
    }
    Ok(entries)
}

fn count(count: i32) -> Result<i32> {
    if !(0..=MOST).contains(&count) {
        bail!("the pvmd tells of {count} entries in the mailbox, which cannot be");
    }
    Ok(count)
}

/// Who sent a message that the mailbox keeps.
pub fn sender(message: &[u8]) -> Option<Tid> {
    let word = message.get(6 * 4..)?.first_chunk::<4>()?;
    Some(Tid(u32::from_be_bytes(*word)))
}

/// The first piece of a message as the mailbox keeps it; none if there is none that is whole.
pub fn unpacked(message: &[u8]) -> Option<&[u8]> {
    let (len, rest) = message.get(8 * 4..)?.split_first_chunk::<4>()?;
    rest.get(..u32::from_be_bytes(*len) as usize)
}

/// A message of tag 0 as the mailbox keeps it: length, context, tag, wait id, encoding, checksum, sender, receiver;
/// then its pieces, each with its length.
pub fn packed(sender: Tid, body: &[u8]) -> Vec<u8> {
    let len = body.len() as u32;
    let words = [len, 0, 0, 0, XDR, 0, sender.0, 0, len];
    let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
    bytes.extend(body);
    bytes
}
