//! What an agent and the lander it has had started say to each other.
//!
//! The lander connects to the agent's socket (a Unix stream socket of this user's, `--agent PATH`) and says
//! [`ToAgent::Hello`] with the number of the move (`--move ID`). From then on each line is one JSON object.
//!
//! ```text
//! lander                      agent
//!   Hello            ---->          (R2 is known: add_incarnation(R2, V) on every host)
//!                    <----    Order (restore an image, or receive a stream)
//!   Parked           ---->          everything stands; it waits for the commit
//!                    <----    Run   (a move: it is decided; the task runs when R1 has ended, too)
//!   Running          ---->          open_gate(V, R2) on every host
//! ```
//!
//! * [`ToAgent::Failed`] instead of any of the lander's messages: nothing is left, its process ends.
//! * [`ToLander::Abandon`] at any time before Running, or the connection's end before Parked: it exits.
//! * Parked, the connection may end: of a move it is then asked on the host that V leaves what is decided, as it is
//!   when the lease ends; a restore that was not told to run exits.
//! * It is to be spawned without anybody who collects its output or traces (tid 0): what it says itself is for
//!   pvmd's log. Before Parked it tells its pvmd where the task's own output goes.
//! * What stood unread in V's connection is in R2's before Parked is said: whatever reaches R2 later comes
//!   behind it.

use std::io::{BufRead, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Longest line that is taken.
const LONGEST: u64 = 1 << 20;

/// What a lander says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub enum ToAgent {
    /// It has enrolled as `r`, in the process `pid` that pvmd forked (as its host counts). `port`: where it
    /// listens for the stream (TCP, all addresses of its host).
    Hello {
        id: String,
        r: u32,
        pid: i32,
        port: u16,
    },
    /// The task stands, and waits for the commit.
    Parked { warnings: Vec<String> },
    /// The task runs; `resume_us`: since the commit was seen.
    Running { resume_us: u64 },
    /// It came to nothing, and nothing is left. `failure` is the name of the class ([`crate::error::Failure`]).
    Failed { why: String, failure: String },
}

/// What an agent says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub enum ToLander {
    Order(Order),
    /// A restore: the gates know R2, go. A move: it is decided.
    Run,
    /// Exit, and leave nothing.
    Abandon,
}

/// What a lander is to become.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// The task's virtual tid: must be the image's.
    pub v: u32,
    pub source: Source,
    /// Run at once, fill memory behind.
    pub lazy: bool,
    /// Whoever collects its output has seen its end (a restore of this task alone), and is told that it begins.
    /// In a restore that is not so, the virtual machine has been started anew: tids of the image that its table
    /// does not know are other tasks'.
    #[serde(default)]
    pub announce: bool,
    pub commit: Commit,
}

/// Where the task comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Source {
    /// An image on this host's disks.
    Image { path: PathBuf },
    /// A stream that a mover sends to the port told; `key`: the stream's key, in hexadecimal.
    Stream { key: String },
}

/// When it may run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Commit {
    /// When told [`ToLander::Run`].
    WhenTold,
    /// When it is decided, and pvmd says that R1 has ended. `lease_ms` after Parked it asks what is decided, and where nobody can
    /// be asked, its pvmd: R1 alive, it exits; dead, it runs. So the mover may kill V only well inside of that time, counted
    /// from before the last data it sent.
    WhenEnded { r1: u32, lease_ms: u64 },
}

/// Writes one line.
///
/// # Errors
/// When the other side is gone.
pub fn say<T: Serialize>(to: &mut impl Write, message: &T) -> Result<()> {
    let mut line = serde_json::to_vec(message).context("JSON")?;
    line.push(b'\n');
    to.write_all(&line)
        .and_then(|()| to.flush())
        .context("writing to the other side of a landing")
}

/// Reads one line; none when the other side has closed.
///
/// # Errors
/// When it says what makes no sense.
pub fn hear<T: DeserializeOwned>(from: &mut impl BufRead) -> Result<Option<T>> {
    let mut line = Vec::new();
    let mut limited = std::io::Read::take(from, LONGEST);
    limited
        .read_until(b'\n', &mut line)
        .context("reading from the other side of a landing")?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        bail!("the other side of a landing broke off in the middle of a line");
    }
    serde_json::from_slice(&line)
        .map(Some)
        .with_context(|| format!("no message: {}", String::from_utf8_lossy(&line)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_heard() {
        let order = ToLander::Order(Order {
            v: 0x40002,
            source: Source::Stream { key: "00ff".into() },
            lazy: true,
            announce: false,
            commit: Commit::WhenEnded {
                r1: 0x40002,
                lease_ms: 5000,
            },
        });
        let mut line = Vec::new();
        say(&mut line, &order).unwrap();
        say(&mut line, &ToLander::Abandon).unwrap();
        let mut reader = line.as_slice();
        assert_eq!(hear(&mut reader).unwrap(), Some(order));
        assert_eq!(hear(&mut reader).unwrap(), Some(ToLander::Abandon));
        assert_eq!(hear::<ToLander>(&mut reader).unwrap(), None);
    }

    #[test]
    fn half_a_line_is_no_message() {
        let mut reader = &b"{\"say\":\"run\"}"[..];
        assert!(hear::<ToLander>(&mut reader).is_err());
    }
}
