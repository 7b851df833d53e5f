//! What agents are asked, and what they answer: JSON in a PVM message, or in a line between an agent and its own
//! movers. Nothing in it is secret; all of it is checked.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::Failure;
use crate::pvm::local::Seen;

/// Tag of control messages: "MIST".
pub const TAG: i32 = 0x4d49_5354;
/// Version of what is in them. Agents of another version refuse.
pub const VERSION: u32 = 6;
/// Longest message that is taken.
pub const LONGEST: usize = 4 << 20;

/// A control message.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Envelope {
    /// [`VERSION`]
    pub version: u32,
    /// Number of the request, chosen by who asks; its answer bears the same.
    pub id: u64,
    pub what: What,
}

/// A request or the answer to one.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    Request(Request),
    Answer(Answer),
    Failed(Failed),
}

/// Why a request came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// Name of its class.
    pub failure: String,
    pub why: String,
}

impl Failed {
    /// What an error says.
    pub fn of(error: &anyhow::Error) -> Failed {
        Failed {
            failure: Failure::of(error).name().to_owned(),
            why: format!("{error:#}"),
        }
    }

    /// As the error that it was.
    pub fn into_error(self) -> anyhow::Error {
        Failure::named(&self.failure).because(self.why)
    }
}

/// What an agent is asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum Request {
    /// Are you an agent? And: what everybody sent to this host by way of my pvmd before is here.
    Hello,
    /// Hide these tasks (agents) from pvm_tasks on your host.
    Hide { tids: Vec<u32> },
    /// All that your table knows.
    Table,
    /// What another agent's table knows: what yours lacks is added. Whoever has got this knows what the others do.
    Learn {
        entries: Vec<Known>,
        incarnations: Vec<(u32, u32)>,
    },
    /// See [`crate::pvm::table::TidTable`].
    AddIncarnation { r: u32, v: u32 },
    /// Close the gate of `v`, whose incarnation is `from` and may become `next`; answer when nobody on your host is
    /// inside a send to it and what was sent before has been read by your pvmd. When the lease ends, ask pvmd who
    /// lives, and open it yourself when that tells.
    CloseGate {
        v: u32,
        from: u32,
        next: u32,
        lease_ms: u64,
        /// It is saved, and about to be ended: when it has, its partners wait until it comes back.
        #[serde(default)]
        saved: bool,
    },
    /// Open the gate: `r` is the present incarnation. Tasks that may wait for it are nudged.
    OpenGate { v: u32, r: u32 },
    /// A move has an outcome: open its gate, if it still is this move's.
    Settle(Outcome),
    /// What has become of this move of a task of your host?
    Fate { v: u32, next: u32 },
    /// Has this incarnation ended, or its host left, as far as your pvmd knows?
    Gone { r: u32 },
    /// What tasks of your host print goes to incarnation `r` of their collector `v` from here on; answer when your pvmd
    /// knows.
    Redirect { v: u32, r: u32 },
    /// Send marker `number` to the incarnation `r`, behind all that came before on its way there.
    Marker { r: u32, number: u32 },
    /// Which of these files are missing on your host, or different?
    Compare { files: Vec<FileLook> },
    /// Start a lander on your host and give it its order.
    Land { order: Landing },
    /// Answer when the lander stands parked.
    Parked { id: String },
    /// Answer when it runs.
    Running { id: String },
    /// It was told to wait for this.
    Run { id: String },
    /// Call the lander of this move off, or the one that is this incarnation.
    Abandon { id: String, r: u32 },
    /// What can be seen of the tasks on your host.
    Status,
    /// Use up so many context ids of your pvmd: at least one, and not too many at once.
    UseUpContexts { count: u32 },
    /// Move a task of your host: `tid` is virtual or real; the other agents by host.
    Migrate {
        tid: u32,
        to: String,
        agents: Vec<Peer>,
    },
    /// Call the move of a task of your host off, if it is not decided.
    CallOff { tid: u32 },
}

/// What came of a move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Names the move; empty for one whose agent has ended.
    pub id: String,
    pub v: u32,
    /// The incarnation that there was, and the one that there was to be.
    pub from: u32,
    pub next: u32,
    /// The task goes on as `next`, or as it was.
    pub moved: bool,
    /// It was away, and has been restored as `next`: what it was has ended long since.
    #[serde(default)]
    pub restored: bool,
}

impl Outcome {
    /// The incarnation that the task has now.
    #[must_use]
    pub fn present(&self) -> u32 {
        if self.moved { self.next } else { self.from }
    }
}

/// An agent: the host's tid and name, and its own tid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    pub host: u32,
    pub name: String,
    pub tid: u32,
}

/// An entry of a tid table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    pub v: u32,
    pub r: u32,
    pub hidden: bool,
    /// It has been saved, and its partners wait until it is restored.
    pub away: bool,
}

/// What one host knows of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileLook {
    pub path: PathBuf,
    /// Bytes; none for what is no regular file.
    pub size: Option<u64>,
    /// BLAKE3 of that many bytes, in hexadecimal, of regular files.
    pub hash: Option<String>,
    /// The task may be writing to it: where both hosts see the same file, it is longer at the second look.
    pub written: bool,
    /// The device, for device nodes.
    pub rdev: Option<u64>,
}

/// What to land.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Landing {
    /// Names the move; on no host twice.
    pub id: String,
    pub v: u32,
    /// Who spawned it; 0: nobody.
    #[serde(default)]
    pub parent: u32,
    /// What `ps -a` of PVM's console is to show.
    pub program: String,
    /// Moves: the incarnation whose end is the commit, and the lease; none: an image is restored.
    pub moves: Option<(u32, u64)>,
    /// Restores: the image.
    pub image: Option<PathBuf>,
    /// It runs before all of its memory is in place.
    pub lazy: bool,
    /// Restores: whoever collects its output has seen its end.
    #[serde(default)]
    pub announce: bool,
}

/// What an agent answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    Done,
    /// Those whose output goes to the new incarnation now: to the old one pvmd has told that it is at its end. And which
    /// it was not done for, and why.
    Redirected {
        tids: Vec<u32>,
        left: Vec<String>,
    },
    /// The gate is closed, and nobody is behind it.
    Closed {
        /// Tasks of this host print, or tell of themselves, to who moves.
        collects: bool,
    },
    /// The process of the agent.
    Hello {
        pid: i32,
        /// It has been told what the others know.
        learned: bool,
    },
    /// Whether it is decided that the task goes on as the new incarnation; none while that is open.
    Fate {
        moved: Option<bool>,
    },
    /// None when that cannot be told yet.
    Gone {
        gone: Option<bool>,
    },
    Table {
        entries: Vec<Known>,
        incarnations: Vec<(u32, u32)>,
        /// There are others, of tasks whose move is at its end.
        moving: bool,
    },
    /// Of what was to be compared, and why each is not the same.
    Compared {
        different: Vec<(PathBuf, String)>,
    },
    /// The lander has enrolled as `r`, and waits for a stream at this port, if it is to have one.
    Landed {
        r: u32,
        port: u16,
    },
    Parked {
        warnings: Vec<String>,
    },
    Running {
        resume_us: u64,
    },
    Status {
        tasks: Vec<Seen>,
    },
    /// The last context id that was used up.
    Context {
        last: u32,
    },
    Moved(Moved),
    /// Whether it was not decided yet: the task stays. None when no move of it is under way.
    CalledOff {
        in_time: Option<bool>,
    },
}

/// What a move did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// Virtual tid, the one it had, the one it has.
    pub v: u32,
    pub from: u32,
    pub to: u32,
    /// Bytes of memory and files that were sent, and what went over the wire for them.
    pub bytes: u64,
    pub bytes_wire: u64,
    /// Times that memory was gone through, the last one under the stop.
    pub rounds: u32,
    pub total_us: u64,
    /// From the task's stop to its first step on the other host.
    pub blackout_us: u64,
    pub warnings: Vec<String>,
}
