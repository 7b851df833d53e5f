//! The mover's line to its agent.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::protocol::{FromMover, Job, ToMover};
use crate::error::Failure;
use crate::pvm::agent::control::{Answer, Peer, Request, What};

/// The line.
pub struct Link {
    reader: BufReader<UnixStream>,
    next: u64,
    /// Answers that nobody has asked for yet.
    kept: HashMap<u64, What>,
    /// A line that has not come to its end.
    line: Vec<u8>,
}

impl Link {
    /// Takes up the line over `stream`, and the job that the agent gives.
    ///
    /// # Errors
    /// When the agent is gone, or gives none.
    pub fn new(stream: UnixStream) -> Result<(Link, Job)> {
        let mut link = Link {
            reader: BufReader::new(stream),
            next: 1,
            kept: HashMap::new(),
            line: Vec::new(),
        };
        match link.hear(Some(Instant::now() + Duration::from_secs(10)))? {
            Some(ToMover::Job(job)) => Ok((link, job)),
            _ => bail!("the agent gives no job"),
        }
    }

    /// Asks an agent.
    ///
    /// # Errors
    /// Those of the agent, or that it does not answer in time.
    pub fn ask(&mut self, to: &Peer, request: Request, limit: Duration) -> Result<Answer> {
        let id = self.begin(to, request)?;
        self.end(to, id, limit)
    }

    /// Asks something of several agents at once.
    ///
    /// # Errors
    /// The first of any of them, when all have answered.
    pub fn ask_all(
        &mut self,
        to: &[Peer],
        request: &Request,
        limit: Duration,
    ) -> Result<Vec<Answer>> {
        let ids: Vec<u64> = to
            .iter()
            .map(|agent| self.begin(agent, request.clone()))
            .collect::<Result<_>>()?;
        let mut all = Ok(Vec::new());
        for (agent, id) in to.iter().zip(ids) {
            match (self.end(agent, id, limit), &mut all) {
                (Ok(answer), Ok(all)) => all.push(answer),
                (Err(e), Ok(_)) => all = Err(e),
                (_, Err(_)) => {}
            }
        }
        all
    }

    /// Asks the agent to decide that the task goes; returns when that is so. It may take as long as it takes: what has
    /// been asked for cannot be taken back.
    ///
    /// # Errors
    /// When it does not, or is gone: then [`crate::pvm::table::decided`] tells.
    pub fn commit(&mut self, r2: u32) -> Result<()> {
        self.say(&FromMover::Commit { r2 })?;
        loop {
            match self.hear(None)? {
                Some(ToMover::GoOn) => return Ok(()),
                Some(ToMover::GoBack) => bail!("the agent of this host has given the move up"),
                Some(ToMover::Answer { id, what }) => drop(self.kept.insert(id, what)),
                Some(ToMover::Job(_)) | None => {}
            }
        }
    }

    /// Says something that is not answered.
    ///
    /// # Errors
    /// When the agent is gone.
    pub fn say(&mut self, what: &FromMover) -> Result<()> {
        let mut line = serde_json::to_vec(what).context("JSON")?;
        line.push(b'\n');
        self.reader
            .get_mut()
            .write_all(&line)
            .context("the agent of this host is gone")
    }

    /// The first half of [`Link::ask`]: the question's number.
    ///
    /// # Errors
    /// When the agent of this host is gone.
    pub fn begin(&mut self, to: &Peer, request: Request) -> Result<u64> {
        let id = self.next;
        self.next += 1;
        self.say(&FromMover::Ask {
            id,
            to: to.tid,
            request,
        })?;
        Ok(id)
    }

    /// The second half: what is answered to question number `wanted`.
    ///
    /// # Errors
    /// As for [`Link::ask`].
    pub fn end(&mut self, to: &Peer, wanted: u64, limit: Duration) -> Result<Answer> {
        let until = Instant::now() + limit;
        let what = loop {
            if let Some(what) = self.kept.remove(&wanted) {
                break what;
            }
            let heard = self
                .hear(Some(until))
                .with_context(|| format!("waiting for mistctl's agent on {}", to.name))?;
            match heard {
                Some(ToMover::Answer { id, what }) => drop(self.kept.insert(id, what)),
                Some(_) => {}
                None => {
                    return Err(Failure::Busy.because(format!(
                        "mistctl's agent on {} has not done its part within {} s: its host is down, cut off, or has \
                         too much else to do; try again when it has not",
                        to.name,
                        limit.as_secs()
                    )));
                }
            }
        };
        match what {
            What::Answer(answer) => Ok(answer),
            What::Failed(failed) => Err(failed.into_error()),
            What::Request(_) => bail!("the agent of {} asks instead of answering", to.name),
        }
    }

    /// What the agent says next; none when the time is over. What has been said of a line by then is kept.
    fn hear(&mut self, until: Option<Instant>) -> Result<Option<ToMover>> {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        self.reader
            .get_ref()
            .set_read_timeout(left.map(|left| left.max(Duration::from_millis(1))))
            .context("SO_RCVTIMEO")?;
        match self.reader.read_until(b'\n', &mut self.line) {
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e).context("reading what the agent of this host says"),
        }
        let line = std::mem::take(&mut self.line);
        if line.last() != Some(&b'\n') {
            bail!("the agent of this host is gone");
        }
        serde_json::from_slice(&line)
            .map(Some)
            .context("the agent says what makes no sense")
    }
}
