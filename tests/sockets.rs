//! Sockets are captured from a living process, which is then killed, and rebuilt in the test: what was
//! queued, who it came from, where messages end, who is at the other end.
//!
//! Each test runs in a network namespace of its own: the test binary runs itself again under unshare(1),
//! and once more as the process that is captured.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use mistctl::image::Socket;
use mistctl::image::sockets::SocketState;
use mistctl::kernel::guardian::Guardian;
use mistctl::kernel::socket::{self, Extra};
use mistctl::kernel::{pidfd, sockopt};
use mistctl::net::makers::Makers;
use mistctl::net::{Options, Restorer, SocketDumper};

#[path = "sockets/empties.rs"]
mod empties;
#[path = "sockets/scenes.rs"]
mod scenes;
#[path = "sockets/tcp.rs"]
mod tcp;

/// Runs `test` in a fresh network namespace with lo up.
fn in_namespace(name: &str, test: impl FnOnce() -> Result<()>) {
    if std::env::var_os("MIST_TEST_NAMESPACE").is_some() {
        if let Err(e) = test() {
            panic!("{e:?}");
        }
        return;
    }
    let exe = std::env::current_exe().expect("our own path");
    let output = Command::new("unshare")
        .args(["-n", "sh", "-c", "ip link set lo up && exec \"$0\" \"$@\""])
        .arg(exe)
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env("MIST_TEST_NAMESPACE", "1")
        .output()
        .expect("unshare(1)");
    let said = String::from_utf8_lossy(&output.stdout);
    // Not where the name is that of no test.
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{name} failed in its namespace: {}: {said}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The process that is captured.
struct Target {
    child: Child,
    pidfd: OwnedFd,
    output: BufReader<std::process::ChildStdout>,
}

impl Target {
    /// Starts a scene of scenes.rs; returns the descriptors it names.
    fn start(scene: &str) -> Result<(Self, Vec<i32>)> {
        Self::start_with(scene, 0).map(|(t, fds, _)| (t, fds))
    }

    /// As [`Target::start`], for a peer at `port`; also the numbers the scene told before.
    fn start_with(scene: &str, port: u16) -> Result<(Self, Vec<i32>, Vec<usize>)> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--exact", "as_target", "--nocapture", "--test-threads=1"])
            .env("MIST_TEST_SCENE", scene)
            .env("MIST_TEST_PORT", port.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let pid = i32::try_from(child.id())?;
        let output = BufReader::new(child.stdout.take().context("stdout")?);
        let mut target = Self {
            pidfd: pidfd::open(pid)?,
            child,
            output,
        };
        let mut told = Vec::new();
        loop {
            let line = target.answer()?;
            if let Some(number) = line.strip_prefix("sent ") {
                told.push(number.parse()?);
                continue;
            }
            let fds = line
                .split_whitespace()
                .map(str::parse)
                .collect::<Result<_, _>>()?;
            return Ok((target, fds, told));
        }
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// The next line the scene has for us.
    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.output.read_line(&mut line)? == 0 {
                bail!("the target ended");
            }
            if let Some((_, rest)) = line.split_once("scene:") {
                return Ok(rest.trim().to_owned());
            }
        }
    }

    /// Lets the scene go on.
    fn go_on(&mut self) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("stdin")?;
        stdin.write_all(b"\n")?;
        Ok(stdin.flush()?)
    }

    fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn fd(&self, number: i32) -> Result<OwnedFd> {
        Ok(pidfd::get_fd(self.pidfd.as_fd(), number)?)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a capture gave.
struct Captured {
    sockets: Vec<Socket>,
    /// Descriptors that were in flight.
    flying: Vec<OwnedFd>,
    warnings: Vec<String>,
}

fn capture_with(t: &Target, fds: &[i32], options: Options) -> Result<Captured> {
    let guardian = std::sync::Arc::new(Guardian::start()?);
    let mut dumper = SocketDumper::new(options, &guardian);
    for &n in fds {
        dumper.add(t.pid(), n, t.fd(n)?)?;
    }
    let mut flying = Vec::new();
    let sockets = dumper.finish(&mut |_, fd| {
        flying.push(fd);
        Ok(flying.len() as u32 - 1)
    })?;
    let warnings = dumper.warnings.clone();
    // What is stored is what comes back.
    let text = serde_json::to_string(&sockets)?;
    let again: Vec<Socket> = serde_json::from_str(&text)?;
    assert_eq!(again, sockets);
    Ok(Captured {
        sockets: again,
        flying,
        warnings,
    })
}

fn capture(t: &Target, fds: &[i32]) -> Result<Captured> {
    capture_with(t, fds, Options::default())
}

/// Builds and fills; the sockets in the order they were captured.
fn rebuild(c: &Captured) -> Result<Vec<OwnedFd>> {
    let mut r = Restorer::build(&c.sockets, &mut Makers::default())?;
    r.fill(
        &|id| {
            c.flying
                .get(id as usize)
                .map(AsFd::as_fd)
                .context("unknown description")
        },
        &mut Makers::default(),
    )?;
    let fds = (0..c.sockets.len())
        .map(|i| {
            let fd = r.fd(i as u32).context("not rebuilt")?;
            Ok(fd.try_clone_to_owned()?)
        })
        .collect::<Result<Vec<_>>>()?;
    let warnings = r.activate();
    assert!(warnings.is_empty(), "{warnings:?}");
    Ok(fds)
}

fn read(fd: impl AsFd) -> Result<Vec<u8>> {
    let mut buffer = vec![0; 1 << 20];
    let n = socket::receive(fd, &mut buffer, 0)?.len;
    buffer.truncate(n);
    Ok(buffer)
}

/// As [`read`], for up to five seconds.
fn read_soon(fd: impl AsFd) -> Result<Vec<u8>> {
    wait_readable(fd.as_fd())?;
    read(fd)
}

fn wait_readable(fd: BorrowedFd<'_>) -> Result<()> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut p = [PollFd::new(fd, PollFlags::POLLIN)];
    if poll(&mut p, PollTimeout::from(5000u16))? == 0 {
        bail!("nothing came within 5 s");
    }
    Ok(())
}

fn write(fd: impl AsFd, data: &[u8]) -> Result<()> {
    assert_eq!(socket::send(fd, data, &Extra::default())?, data.len());
    Ok(())
}

fn would_block(r: &Result<Vec<u8>>) -> bool {
    r.as_ref().is_err_and(|e| {
        e.downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == std::io::ErrorKind::WouldBlock)
    })
}

/// Not a test: the process that is captured, when a test runs it.
#[test]
fn as_target() {
    if let Ok(scene) = std::env::var("MIST_TEST_SCENE") {
        scenes::play(&scene).expect("scene");
    }
}

#[test]
fn stream_pair_keeps_bytes_of_both_directions() {
    in_namespace("stream_pair_keeps_bytes_of_both_directions", || {
        let (mut t, fds) = Target::start("stream_pair")?;
        let c = capture(&t, &fds)?;
        // The living one has lost nothing.
        t.go_on()?;
        assert_eq!(t.answer()?, "to-a(to-b)");
        t.kill();
        let s = rebuild(&c)?;
        assert_eq!(read(&s[0])?, b"to-a");
        assert_eq!(read(&s[1])?, b"to-b");
        write(&s[0], b"more")?;
        assert_eq!(read(&s[1])?, b"more");
        assert_eq!(
            sockopt::get_int(&s[0], libc::SOL_SOCKET, libc::SO_SNDBUF)?,
            100_000
        );
        assert_eq!(
            sockopt::get_int(&s[0], libc::SOL_SOCKET, libc::SO_PEEK_OFF)?,
            -1
        );
        // c was shut down for sending by its peer, with bytes left to read.
        assert_eq!(read(&s[2])?, b"last words");
        assert_eq!(read(&s[2])?, b"");
        write(&s[2], b"answer")?;
        assert_eq!(read(&s[3])?, b"answer");
        Ok(())
    });
}

#[test]
fn messages_keep_their_boundaries() {
    in_namespace("messages_keep_their_boundaries", || {
        let (t, fds) = Target::start("messages")?;
        let c = capture(&t, &fds)?;
        t.kill();
        let s = rebuild(&c)?;
        for fd in [&s[0], &s[2]] {
            assert_eq!(read(fd)?, b"one");
            assert_eq!(read(fd)?, vec![b'x'; 70_000]);
            assert_eq!(read(fd)?, b"three");
            assert!(would_block(&read(fd)));
        }
        Ok(())
    });
}

#[test]
fn closed_peer_leaves_its_last_bytes() {
    in_namespace("closed_peer_leaves_its_last_bytes", || {
        let (t, fds) = Target::start("closed_peer")?;
        let c = capture(&t, &fds)?;
        t.kill();
        let s = rebuild(&c)?;
        assert_eq!(read(&s[0])?, b"bye");
        assert_eq!(read(&s[0])?, b"");
        // The other's peer was closed with bytes unread.
        let e = read(&s[1]).unwrap_err();
        let e = e
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::raw_os_error);
        assert_eq!(e, Some(libc::ECONNRESET));
        Ok(())
    });
}

#[test]
fn descriptors_in_flight_arrive_where_they_were() {
    in_namespace("descriptors_in_flight_arrive_where_they_were", || {
        let (t, fds) = Target::start("in_flight")?;
        let c = capture(&t, &fds)?;
        t.kill();
        let s = rebuild(&c)?;
        let mut buffer = [0; 100];
        // "plain" has none; the pipe comes with the first byte of "with".
        assert_eq!(socket::receive(&s[0], &mut buffer[..5], 0)?.fds.len(), 0);
        assert_eq!(&buffer[..5], b"plain");
        let r = socket::receive(&s[0], &mut buffer, 0)?;
        assert_eq!((&buffer[..r.len], r.fds.len()), (&b"with"[..], 1));
        let mut pipe = std::fs::File::from(r.fds.into_iter().next().context("a pipe")?);
        let mut held = [0; 7];
        pipe.read_exact(&mut held)?;
        assert_eq!(&held, b"in pipe");
        let r = socket::receive(&s[0], &mut buffer, 0)?;
        assert_eq!((&buffer[..r.len], r.fds.len()), (&b"two more"[..], 2));
        let r = socket::receive(&s[0], &mut buffer, 0)?;
        assert_eq!((&buffer[..r.len], r.fds.len()), (&b"end"[..], 0));
        Ok(())
    });
}

#[test]
fn names_listeners_and_waiting_clients_come_back() {
    in_namespace("names_listeners_and_waiting_clients_come_back", || {
        let (t, fds) = Target::start("listeners")?;
        let c = capture(&t, &fds)?;
        let names = fds
            .iter()
            .map(|&n| Ok(socket::local_name(t.fd(n)?)?))
            .collect::<Result<Vec<_>>>()?;
        t.kill();
        let s = rebuild(&c)?;
        for (i, fd) in s.iter().enumerate() {
            assert_eq!(socket::local_name(fd)?, names[i], "socket {i}");
        }
        // Each: listener, client, accepted, waiting client; path, abstract, relative name.
        for four in s.chunks(4) {
            let [l, client, accepted, waiting] = four else {
                bail!("fours")
            };
            assert_eq!(read(accepted)?, b"from client");
            write(accepted, b"reply")?;
            assert_eq!(read(client)?, b"reply");
            let new = socket::accept(l)?;
            write(waiting, b"I waited")?;
            assert_eq!(read(&new)?, b"I waited");
        }
        std::fs::remove_dir_all(scenes::directory())?;
        Ok(())
    });
}

#[test]
fn datagrams_keep_their_senders() {
    in_namespace("datagrams_keep_their_senders", || {
        let (t, fds) = Target::start("senders")?;
        let c = capture(&t, &fds)?;
        t.kill();
        let s = rebuild(&c)?;
        let mut buffer = [0; 100];
        for (from, text) in [
            (&b"\0mist-friend"[..], "known"),
            (b"\0mist-stranger", "gone since"),
            (b"", "nameless"),
        ] {
            let r = socket::receive(&s[0], &mut buffer, 0)?;
            assert_eq!(&buffer[..r.len], text.as_bytes());
            assert_eq!(r.from.get(2..).unwrap_or_default(), from);
        }
        // The friend is connected to it.
        write(&s[1], b"still")?;
        assert_eq!(read(&s[0])?, b"still");
        Ok(())
    });
}

#[test]
fn udp_keeps_datagrams_and_their_senders() {
    in_namespace("udp_keeps_datagrams_and_their_senders", || {
        let (t, fds) = Target::start("udp")?;
        let c = capture(&t, &fds)?;
        let expected = fds
            .iter()
            .map(|&n| Ok(socket::local_name(t.fd(n)?)?))
            .collect::<Result<Vec<_>>>()?;
        t.kill();
        let s = rebuild(&c)?;
        let mut buffer = vec![0; 70_000];
        // 0: any address, v4 and 1: v6; 2 and 3 sent to them. 4: shares its port, connected.
        for (to, from) in [(0, 2), (1, 3)] {
            for text in [b"first".to_vec(), Vec::new(), vec![b'z'; 60_000]] {
                let r = socket::receive(&s[to], &mut buffer, 0)?;
                assert_eq!(&buffer[..r.len], &text[..]);
                assert_eq!(r.from[2..4], expected[from][2..4], "port");
                assert_eq!(
                    mistctl::net::host(&r.from),
                    mistctl::net::host(&expected[from])
                );
            }
            assert!(would_block(&read(&s[to])));
        }
        assert_eq!(read(&s[4])?, b"to the connected");
        assert_eq!(socket::peer_name(&s[4])?[2..8], expected[2][2..8]);
        let on = sockopt::get_int(&s[0], libc::SOL_SOCKET, libc::SO_BROADCAST)?;
        assert_eq!(on, 1);
        Ok(())
    });
}

#[test]
fn listening_tcp_and_netlink_come_back() {
    in_namespace("listening_tcp_and_netlink_come_back", || {
        let (t, fds) = Target::start("tcp_listen")?;
        let c = capture(&t, &fds)?;
        let names = fds
            .iter()
            .map(|&n| Ok(socket::local_name(t.fd(n)?)?))
            .collect::<Result<Vec<_>>>()?;
        t.kill();
        let s = rebuild(&c)?;
        for i in 0..2 {
            let client = socket::socket(i32::from(names[i][0]), libc::SOCK_STREAM, 0)?;
            socket::connect(&client, &names[i])?;
            let accepted = socket::accept(&s[i])?;
            write(&client, b"hello")?;
            assert_eq!(read_soon(&accepted)?, b"hello");
            assert_eq!(
                sockopt::get_int(&s[i], libc::IPPROTO_TCP, libc::TCP_KEEPIDLE)?,
                77
            );
            assert_eq!(
                sockopt::get_int(&accepted, libc::SOL_SOCKET, libc::SO_KEEPALIVE)?,
                1
            );
        }
        assert!(matches!(&c.sockets[0].state, SocketState::Tcp(t) if t.backlog == Some(17)));
        assert_eq!(socket::local_name(&s[2])?, names[2], "netlink port id");
        Ok(())
    });
}
