//! A TCP peer outside of what is dumped.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A TCP peer that mist knows nothing of: it sends back each byte, plus one.
pub struct Peer {
    pub address: SocketAddr,
    thread: thread::JoinHandle<Result<u64>>,
}

impl Peer {
    pub fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let thread = thread::spawn(move || {
            let (stream, _) = listener.accept()?;
            Self::echo(stream)
        });
        Ok(Self { address, thread })
    }

    fn echo(mut stream: TcpStream) -> Result<u64> {
        let mut total = 0;
        let mut buffer = vec![0; 65536];
        loop {
            let n = stream.read(&mut buffer).context("the peer's read")?;
            if n == 0 {
                return Ok(total);
            }
            for byte in &mut buffer[..n] {
                *byte = byte.wrapping_add(1);
            }
            stream.write_all(&buffer[..n]).context("the peer's write")?;
            total += n as u64;
        }
    }

    /// Waits for the end of the connection, which it takes as the program's farewell.
    pub fn finish(self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        while !self.thread.is_finished() {
            if Instant::now() > deadline {
                bail!("the peer outside saw no end-of-file");
            }
            thread::sleep(Duration::from_millis(5));
        }
        match self.thread.join() {
            Ok(outcome) => outcome.map(drop).context("the peer outside"),
            Err(_) => bail!("the peer outside panicked"),
        }
    }
}
