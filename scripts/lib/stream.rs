//! The yardstick of a large move: what one encrypted stream (`pvm::stream`) carries of bytes that are at hand.
//!
//!     stream receive PORT
//!     stream send ADDRESS:PORT BYTES      prints the seconds it took

use std::net::{TcpListener, ToSocketAddrs};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mistctl::pvm::stream::{Key, Stream};

const LIMIT: Duration = Duration::from_secs(60);
const ID: &str = "bench";
const FRAME: usize = 1 << 20;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let key = Key::from_hex(&"5a".repeat(32))?;
    match words[..] {
        ["receive", port] => receive(&key, port.parse()?),
        ["send", to, bytes] => send(&key, to, bytes.parse()?),
        _ => bail!("usage: see the head of scripts/lib/stream.rs"),
    }
}

fn receive(key: &Key, port: u16) -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    let mut stream = Stream::accept(&listener, key, ID, Instant::now() + LIMIT)?;
    let mut buffer = Default::default();
    while let Some(frame) = stream.recv_into(buffer)? {
        if frame.kind == 1 {
            stream.send(1, &[], &[])?;
            stream.flush()?;
        }
        buffer = frame.body;
    }
    Ok(())
}

fn send(key: &Key, to: &str, bytes: usize) -> Result<()> {
    let to = to.to_socket_addrs()?.next().context("no address")?;
    let began = Instant::now();
    let mut stream = loop {
        match Stream::connect(to, key, ID, LIMIT) {
            Ok(stream) => break stream,
            Err(e) if began.elapsed() > LIMIT => return Err(e),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    // Nothing that could be packed.
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_le_bytes()
    });
    let data: Vec<u8> = words.take(FRAME / 8).flatten().collect();
    let began = Instant::now();
    let mut left = bytes;
    while left > 0 {
        let len = left.min(FRAME);
        stream.send(0, &[], data.get(..len).unwrap_or_default())?;
        left -= len;
    }
    stream.send(1, &[], &[])?;
    stream.flush()?;
    stream.recv()?.context("the receiver has gone")?;
    println!("{}", began.elapsed().as_secs_f64());
    Ok(())
}
