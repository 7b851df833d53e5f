//! redis-server with a client connected, which is not saved and whose connection goes on.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::common::wait_for;
use crate::steps::{Test, go_on_dumps};
use crate::{LIMIT, Mode};

pub const NAME: &str = "redis";
pub const COMMAND: &[&str] = &[
    "/usr/bin/redis-server",
    "--port",
    "6390",
    "--save",
    "",
    "--appendonly",
    "yes",
    "--enable-debug-command",
    "local",
];

/// A connection that speaks redis's protocol (RESP 2).
struct Client {
    reader: BufReader<TcpStream>,
    writer: TcpStream,
}

impl Client {
    fn connect() -> std::io::Result<Self> {
        let writer = TcpStream::connect("127.0.0.1:6390")?;
        writer.set_read_timeout(Some(LIMIT))?;
        writer.set_write_timeout(Some(LIMIT))?;
        let reader = BufReader::new(writer.try_clone()?);
        Ok(Self { reader, writer })
    }

    fn send(&mut self, words: &[&str]) -> Result<()> {
        let mut text = format!("*{}\r\n", words.len());
        for word in words {
            let _ = write!(text, "${}\r\n{word}\r\n", word.len());
        }
        self.writer
            .write_all(text.as_bytes())
            .with_context(|| format!("sending {words:?}"))
    }

    /// One reply: its text, or that of its parts one after the other.
    fn reply(&mut self) -> Result<String> {
        let mut line = String::new();
        let n = self.reader.read_line(&mut line).context("a reply")?;
        ensure!(n > 0, "the connection has ended");
        let line = line.trim_end();
        let (kind, rest) = line.split_at_checked(1).context("an empty reply")?;
        match kind {
            "+" | ":" => Ok(rest.to_owned()),
            "$" if rest == "-1" => Ok("(nil)".to_owned()),
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>()? + 2];
                self.reader.read_exact(&mut bytes).context("a reply")?;
                bytes.truncate(bytes.len() - 2);
                Ok(String::from_utf8(bytes)?)
            }
            "*" => {
                let parts: Result<Vec<_>> =
                    (0..rest.parse::<usize>()?).map(|_| self.reply()).collect();
                Ok(parts?.join(" "))
            }
            _ => bail!("redis said {line}"),
        }
    }

    fn ask(&mut self, words: &[&str]) -> Result<String> {
        self.send(words)?;
        let what = words.first().copied().unwrap_or_default();
        self.reply().with_context(|| what.to_owned())
    }

    fn expect(&mut self, words: &[&str], wanted: &str) -> Result<()> {
        let got = self.ask(words)?;
        ensure!(got == wanted, "{words:?}, wanted {wanted}, got {got}");
        Ok(())
    }
}

/// The value under key `i`.
fn value(i: u64) -> String {
    format!("value {i} ").repeat(40 + usize::try_from(i % 50).unwrap_or_default())
}

/// A client that writes and reads all the while.
fn busy(steps: &AtomicU64, over: &AtomicBool) -> Result<Client> {
    let mut client = Client::connect()?;
    let mut i = 0;
    while !over.load(Ordering::SeqCst) {
        i += 1;
        // Several requests at once: they are in the queues when the server stands still.
        client.send(&["SET", &format!("busy {i}"), &value(i)])?;
        client.send(&["INCR", "busy"])?;
        client.send(&["RPUSH", "list", &i.to_string()])?;
        client.send(&["GET", &format!("busy {}", i / 2 + 1)])?;
        let replies = [client.reply()?, client.reply()?, client.reply()?];
        let n = i.to_string();
        ensure!(
            replies == ["OK", &n, &n],
            "the busy client's step {i}, got {replies:?}"
        );
        ensure!(
            client.reply()? == value(i / 2 + 1),
            "what was written under busy {}",
            i / 2 + 1
        );
        steps.store(i, Ordering::SeqCst);
        thread::sleep(std::time::Duration::from_millis(1));
    }
    Ok(client)
}

pub fn carry_out(test: &mut Test) -> Result<()> {
    test.start(&[])?;
    let mut client = wait_for("redis-server to listen", LIMIT, || {
        Ok(Client::connect().ok())
    })?;
    // Some memory, in redis's own allocator (jemalloc), and a connection that only listens.
    client.expect(&["DEBUG", "POPULATE", "50000", "key", "200"], "OK")?;
    client.expect(&["SET", "before", "the dump"], "OK")?;
    let digest = client.ask(&["DEBUG", "DIGEST-VALUE", "key:1", "key:49999", "before"])?;
    let mut listener = Client::connect()?;
    ensure!(
        listener
            .ask(&["SUBSCRIBE", "news"])?
            .starts_with("subscribe")
    );

    let (steps, over) = (
        Arc::new(AtomicU64::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let writer = {
        let (steps, over) = (Arc::clone(&steps), Arc::clone(&over));
        thread::spawn(move || busy(&steps, &over))
    };
    let works = || {
        let before = steps.load(Ordering::SeqCst);
        wait_for("requests served", LIMIT, || {
            if writer.is_finished() {
                // Its error is told below.
                return Ok(Some(()));
            }
            Ok((steps.load(Ordering::SeqCst) > before + 20).then_some(()))
        })
    };
    works()?;
    let mut restore = None;
    for round in 0..if test.mode == Mode::Twice { 2 } else { 1 } {
        if test.mode == Mode::GoOn {
            for _ in 0..go_on_dumps() {
                test.dump(false)?;
                works()?;
            }
            continue;
        }
        test.dump(true)?;
        // Into the void: it arrives when there is a server again.
        client.send(&["APPEND", "before", "!"])?;
        if test.mode == Mode::Twice && round == 0 {
            test.restore_detached()?;
        } else {
            restore = Some(test.restore()?);
        }
        let length = "the dump".len() + round + 1;
        let got = client.reply().context("the reply across the restore")?;
        ensure!(
            got == length.to_string(),
            "APPEND, wanted {length}, got {got}"
        );
        works()?;
    }

    over.store(true, Ordering::SeqCst);
    let joined = writer.join().map_err(|_| anyhow!("the busy client"))?;
    drop(joined.context("the busy client")?);
    client.expect(&["LLEN", "list"], &steps.load(Ordering::SeqCst).to_string())?;
    client.expect(&["PUBLISH", "news", "the server is back"], "1")?;
    let heard = listener.reply()?;
    ensure!(heard == "message news the server is back", "heard {heard}");
    if test.mode == Mode::GoOn {
        let now = client.ask(&["DEBUG", "DIGEST-VALUE", "key:1", "key:49999", "before"])?;
        ensure!(now == digest, "digests, wanted {digest}, got {now}");
    }
    // A new connection, a child that writes the database, and the file of all commands.
    let mut fresh = Client::connect()?;
    fresh.expect(&["GET", "key:49999"], &client.ask(&["GET", "key:49999"])?)?;
    fresh.ask(&["BGREWRITEAOF"])?;
    let info = |client: &mut Client, key: &str| -> Result<String> {
        let text = client.ask(&["INFO", "persistence"])?;
        let line = text.lines().find_map(|l| l.strip_prefix(key));
        Ok(line.context("INFO without it")?.trim().to_owned())
    };
    wait_for("the end of redis's child", LIMIT, || {
        let left = [
            info(&mut fresh, "aof_rewrite_in_progress:")?,
            info(&mut fresh, "aof_rewrite_scheduled:")?,
        ];
        Ok((left == ["0", "0"]).then_some(()))
    })?;
    ensure!(info(&mut fresh, "aof_last_bgrewrite_status:")? == "ok");
    let digest = fresh.ask(&["DEBUG", "DIGEST"])?;
    // Reads all it has written, and has to find the same.
    fresh.expect(&["DEBUG", "LOADAOF"], "OK")?;
    fresh.expect(&["DEBUG", "DIGEST"], &digest)?;
    fresh.send(&["SHUTDOWN", "NOSAVE"])?;
    test.ended(restore)
}
