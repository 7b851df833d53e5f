//! What the image of a PVM task holds besides the process: who it is in the virtual machine, and what its
//! pvmds would forget with it.

use serde::{Deserialize, Serialize};

use super::{Bytes, DescriptionId};

/// A PVM task under the shim; it is the first process of its image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PvmTask {
    /// The virtual tid: what the program and its partners know for ever.
    pub v: u32,
    /// The incarnation that was dumped.
    pub r: u32,
    /// The name it was spawned under (as `ps -a` shows it); empty for one that was started by hand.
    pub program: String,
    /// Who spawned it (virtual tid); 0: nobody.
    #[serde(default)]
    pub parent: u32,
    /// Host (name in the virtual machine) it was on.
    pub host: String,
    /// The socket to its pvmd, among the image's descriptions.
    pub connection: DescriptionId,
    /// Standard output and error, where pvmd collects them: description and descriptor.
    pub output: Vec<DescriptionId>,
    /// What its pvmd had sent and the task had not read: whole fragments, in order, markers left out. In the
    /// image's `objects/` when it is more than a few KiB.
    pub unread: Unread,
    /// Where pvmd sends its output and traces: tid (real), context, tag.
    pub output_to: (u32, u32, i32),
    pub trace_to: (u32, u32, i32),
    /// Its partners wait for it, and have not been told of its end.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub away: bool,
    /// What it waits for an answer to, and is to be asked again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked: Option<Asked>,
    /// The highest context id of each host that it may know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub contexts: Vec<u32>,
    /// Mailbox entries it owns that vanish with it; in a dump those, too, that outlive it and that nobody else may take
    /// away.
    pub mailbox: Vec<MailboxEntry>,
    /// Where the shim's block and libpvm's variables are in its memory.
    pub block: u64,
    /// Where the tid table is mapped: address, length.
    pub table: (u64, u64),
}

/// Bytes that were on their way to the task.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Unread {
    /// When they are few.
    #[serde(default)]
    pub inline: Bytes,
    /// Name (hash) of the carried object that holds them otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
}

/// A question about the mailbox (TM_DB) whose answer comes when somebody puts the entry there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// libpvm knows the answer by it.
    pub wait_id: u32,
    /// Its second word is the tid of the incarnation that asks.
    pub body: Bytes,
}

/// One entry of PVM's mailbox (pvm_putinfo).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MailboxEntry {
    pub class: String,
    pub index: i32,
    pub flags: i32,
    /// The packed message, as TM_DB carries it.
    pub message: Bytes,
}
