//! What an agent and its mover say to each other: one JSON object a line, over the mover's standard input.

use serde::{Deserialize, Serialize};

use crate::pvm::agent::Hashes;
use crate::pvm::agent::control::{Failed, Moved, Peer, Request, What};

/// What is to be moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Names the move.
    pub id: String,
    pub v: u32,
    /// The incarnation that is here, and its process.
    pub r1: u32,
    pub pid: i32,
    /// The agent of the host it goes to.
    pub to: Peer,
    /// The agents of all hosts, this one's too.
    pub agents: Vec<Peer>,
    /// What files hold, as far as that is known.
    pub hashes: Hashes,
}

/// What a mover says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub enum FromMover {
    /// Ask an agent; `id` is the answer's.
    Ask { id: u64, to: u32, request: Request },
    /// It has read files.
    Hashed { hashes: Hashes },
    /// The lander is parked: from [`ToMover::GoOn`] on the task ends here, whatever becomes of the mover.
    Commit { r2: u32 },
    /// It is done.
    Done(Moved),
    /// It came to nothing: the task runs here as before.
    Failed(Failed),
}

/// What an agent says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub enum ToMover {
    Job(Job),
    Answer {
        id: u64,
        what: What,
    },
    /// It is decided.
    GoOn,
    /// It cannot be: the task stays.
    GoBack,
}
