//! TCP connections, and captures that are killed.

use super::*;

#[test]
fn peer_outside_is_refused_by_name() {
    in_namespace("tcp::peer_outside_is_refused_by_name", || {
        let (t, fds) = Target::start("stream_pair")?;
        let Err(e) = capture(&t, &fds[..1]) else {
            bail!("not refused")
        };
        let text = format!("{e:#}");
        assert!(
            text.contains(&format!("pid {}, descriptor {}", t.pid(), fds[0])),
            "{text}"
        );
        let options = Options {
            outside: true,
            ..Options::default()
        };
        let c = capture_with(&t, &fds[..1], options)?;
        let SocketState::Unix(u) = &c.sockets[0].state else {
            bail!("unix")
        };
        assert!(u.outside.is_some() && u.queue.len() == 1);
        assert!(c.warnings.is_empty());
        Ok(())
    });
}

fn read_until_end(fd: impl AsFd, limit: usize) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    while all.len() < limit {
        let more = read_soon(&fd)?;
        if more.is_empty() {
            break;
        }
        all.extend(more);
    }
    Ok(all)
}

fn tcp_pairs_come_back(kill: bool) -> Result<()> {
    let (t, fds, sent) = Target::start_with("tcp_pairs", 0)?;
    let guardian = std::sync::Arc::new(Guardian::start()?);
    let options = Options {
        kill,
        ..Options::default()
    };
    let mut dumper = SocketDumper::new(options, &guardian);
    for &n in &fds {
        dumper.add(t.pid(), n, t.fd(n)?)?;
    }
    let sockets = dumper.finish(&mut |_, _| bail!("nothing is in flight"))?;
    if kill {
        dumper.finish_kill(&[t.pidfd.as_fd()])?;
    }
    drop(dumper);
    t.kill();
    drop(guardian);
    let c = Captured {
        sockets: serde_json::from_str(&serde_json::to_string(&sockets)?)?,
        flying: Vec::new(),
        warnings: Vec::new(),
    };
    // Without a kill that keeps quiet, the ends still say goodbye to each other in the kernel.
    let s = rebuild(&c)?;
    for (nine, sent) in s.chunks(9).zip(sent) {
        let [l, a, b, c, d, e, g, h, waiting] = nine else {
            bail!("nines")
        };
        assert_eq!(read_soon(b)?, b"to-b");
        let data = read_until_end(a, sent)?;
        assert_eq!(data.len(), sent);
        let mut at = 0;
        for piece in data.chunks(100_000) {
            let start = at % 251;
            assert!(
                piece
                    .iter()
                    .enumerate()
                    .all(|(i, x)| *x == ((start + i) % 251) as u8)
            );
            at += piece.len();
        }
        write(a, b"more")?;
        assert_eq!(read_soon(b)?, b"more");
        write(b, b"back")?;
        assert_eq!(read_soon(a)?, b"back");
        assert_eq!(
            sockopt::get_int(a, libc::IPPROTO_TCP, libc::TCP_NODELAY)?,
            1
        );
        assert_eq!(read_soon(d)?, b"request");
        assert_eq!(read_soon(d)?, b"");
        write(d, b"answer")?;
        assert_eq!(read_soon(c)?, b"answer");
        assert_eq!(read_soon(e)?, b"goodbye");
        assert_eq!(read_soon(e)?, b"");
        assert_eq!(read_soon(h)?, b"first");
        assert_eq!(read_soon(h)?, b"");
        assert_eq!(read_soon(g)?, b"");
        wait_readable(l.as_fd())?;
        let accepted = socket::accept(l)?;
        write(waiting, b"I waited")?;
        assert_eq!(read_soon(&accepted)?, b"I waited");
    }
    Ok(())
}

#[test]
fn tcp_connections_come_back_with_both_ends() {
    in_namespace("tcp::tcp_connections_come_back_with_both_ends", || {
        tcp_pairs_come_back(true)
    });
}

#[test]
fn tcp_connections_come_back_though_the_old_ones_linger() {
    in_namespace(
        "tcp::tcp_connections_come_back_though_the_old_ones_linger",
        || tcp_pairs_come_back(false),
    );
}

/// A peer for the scene tcp_client, already connected.
fn peer_of_client() -> Result<(Target, Vec<i32>, std::net::TcpStream)> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let (t, fds, _) = Target::start_with("tcp_client", listener.local_addr()?.port())?;
    let (peer, _) = listener.accept()?;
    peer.set_read_timeout(Some(std::time::Duration::from_secs(1)))?;
    Ok((t, fds, peer))
}

fn expect(peer: &mut std::net::TcpStream, text: &[u8]) -> Result<()> {
    let mut buffer = vec![0; text.len()];
    peer.read_exact(&mut buffer)
        .with_context(|| format!("waiting for {}", String::from_utf8_lossy(text)))?;
    assert_eq!(buffer, text);
    Ok(())
}

const OUTSIDE: Options = Options {
    tcp_established: true,
    kill: false,
    outside: false,
    pvmd: None,
};

#[test]
fn peer_outside_is_carried_only_when_asked() {
    in_namespace("tcp::peer_outside_is_carried_only_when_asked", || {
        let (mut t, fds, mut peer) = peer_of_client()?;
        let Err(e) = capture(&t, &fds) else {
            bail!("not refused")
        };
        assert!(format!("{e:#}").contains("--tcp-established"), "{e:#}");
        // Nor does being looked at change anything.
        let c = capture_with(&t, &fds, OUTSIDE)?;
        let reuse = sockopt::get_int(t.fd(fds[0])?, libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
        assert_eq!(reuse, 1);
        expect(&mut peer, b"hello from the target")?;
        t.go_on()?;
        expect(&mut peer, b"still here")?;
        peer.write_all(b"and I")?;
        assert_eq!(read_soon(t.fd(fds[0])?)?, b"and I");
        assert!(c.warnings.is_empty(), "{:?}", c.warnings);
        Ok(())
    });
}

#[test]
fn peer_outside_goes_on_with_the_restored_end() {
    in_namespace("tcp::peer_outside_goes_on_with_the_restored_end", || {
        for from_keeper in [true, false] {
            let (t, fds, mut peer) = peer_of_client()?;
            peer.write_all(b"not read yet ")?;
            wait_readable(t.fd(fds[0])?.as_fd())?;
            let guardian = std::sync::Arc::new(Guardian::start()?);
            let options = Options {
                kill: true,
                ..OUTSIDE
            };
            let mut dumper = SocketDumper::new(options, &guardian);
            dumper.add(t.pid(), fds[0], t.fd(fds[0])?)?;
            let mut sockets = dumper.finish(&mut |_, _| bail!("nothing is in flight"))?;
            dumper.finish_kill(&[t.pidfd.as_fd()])?;
            let said = dumper.warnings.concat();
            t.kill();
            drop(dumper);
            drop(guardian);
            // The peer speaks into the void meanwhile; nobody answers, least of all with RST.
            peer.write_all(b"while you were away")?;
            expect(&mut peer, b"hello from the target")?;
            if !from_keeper {
                // Another host: no keeper there, and this one's does not hear the peer any more.
                let SocketState::Tcp(tcp) = &mut sockets[0].state else {
                    bail!("tcp")
                };
                let c = tcp.connection.as_mut().context("connection")?;
                let keeper = end_keeper(c.cookie)?;
                let told = format!("process {keeper} (mist-keeper) holds 1 TCP connection ");
                assert!(said.contains(&told), "{said}");
                c.cookie = 0;
            }
            let c = Captured {
                sockets,
                flying: Vec::new(),
                warnings: Vec::new(),
            };
            let s = rebuild(&c)?;
            assert_eq!(
                read_until_end(&s[0], 32)?,
                b"not read yet while you were away"
            );
            write(&s[0], b"I am back")?;
            expect(&mut peer, b"I am back")?;
            peer.write_all(b"welcome")?;
            assert_eq!(read_soon(&s[0])?, b"welcome");
            drop(s);
            assert_eq!(peer.read(&mut [0; 8])?, 0, "end of the connection");
        }
        Ok(())
    });
}

/// Not a test: captures a socket of another process for a kill, and is killed with everything held.
#[test]
fn as_capturer() {
    let (Ok(pid), Ok(fd)) = (
        std::env::var("MIST_TEST_PID"),
        std::env::var("MIST_TEST_FD"),
    ) else {
        return;
    };
    let die = || -> Result<()> {
        let (pid, fd) = (pid.parse()?, fd.parse()?);
        let target = pidfd::open(pid)?;
        let guardian = std::sync::Arc::new(Guardian::start()?);
        let options = Options {
            kill: true,
            ..OUTSIDE
        };
        let mut dumper = SocketDumper::new(options, &guardian);
        dumper.add(pid, fd, pidfd::get_fd(target.as_fd(), fd)?)?;
        dumper.finish(&mut |_, _| bail!("nothing is in flight"))?;
        if std::env::var_os("MIST_TEST_KEEP").is_some() {
            dumper.finish_kill(&[target.as_fd()])?;
        }
        let me = pidfd::open(i32::try_from(std::process::id())?)?;
        Ok(pidfd::send_signal(me.as_fd(), libc::SIGKILL)?)
    };
    die().expect("a capture");
}

/// Runs [`as_capturer`] on the target's socket, to its end by SIGKILL.
fn killed_capture(t: &Target, fd: i32, keep: bool) -> Result<()> {
    use std::os::unix::process::ExitStatusExt;
    let mut capturer = Command::new(std::env::current_exe()?);
    capturer
        .args(["--exact", "tcp::as_capturer", "--test-threads=1"])
        .env("MIST_TEST_PID", t.pid().to_string())
        .env("MIST_TEST_FD", fd.to_string())
        .stdout(Stdio::null());
    if keep {
        capturer.env("MIST_TEST_KEEP", "1");
    }
    assert_eq!(capturer.status()?.signal(), Some(libc::SIGKILL));
    Ok(())
}

#[test]
fn killed_capture_leaves_the_connection_usable() {
    in_namespace("tcp::killed_capture_leaves_the_connection_usable", || {
        let (mut t, fds, mut peer) = peer_of_client()?;
        expect(&mut peer, b"hello from the target")?;
        for _ in 0..20 {
            killed_capture(&t, fds[0], false)?;
            t.go_on()?;
            expect(&mut peer, b"still here")?;
            peer.write_all(b"and I")?;
            assert_eq!(read_soon(t.fd(fds[0])?)?, b"and I");
        }
        let reuse = sockopt::get_int(t.fd(fds[0])?, libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
        assert_eq!(reuse, 1);
        Ok(())
    });
}

#[test]
fn killed_capture_that_was_to_kill_keeps_the_connection() {
    in_namespace(
        "tcp::killed_capture_that_was_to_kill_keeps_the_connection",
        || {
            let (t, fds, mut peer) = peer_of_client()?;
            expect(&mut peer, b"hello from the target")?;
            let own = t.fd(fds[0])?;
            let cookie = sockopt::get(&own, libc::SOL_SOCKET, libc::SO_COOKIE, 8)?;
            let cookie = u64::from_ne_bytes(cookie[..8].try_into()?);
            drop(own);
            killed_capture(&t, fds[0], true)?;
            wait_readable(t.pidfd.as_fd()).context("the target's end")?;
            // Neither an end nor a reset reaches the peer.
            peer.write_all(b"anybody?")?;
            let e = peer.read(&mut [0; 8]).unwrap_err();
            assert_eq!(e.kind(), std::io::ErrorKind::WouldBlock);
            // It would wait for a restore.
            end_keeper(cookie)?;
            Ok(())
        },
    );
}

/// Kills the keeper that holds the socket with this cookie. Its pid.
fn end_keeper(cookie: u64) -> Result<i32> {
    let name = format!("\0mist-keeper-{cookie:x}");
    let mut addr = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    addr.extend_from_slice(name.as_bytes());
    let probe = socket::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0)?;
    socket::connect(&probe, &addr).context("the keeper")?;
    let cred = sockopt::get(&probe, libc::SOL_SOCKET, libc::SO_PEERCRED, 12)?;
    let pid = i32::from_ne_bytes(cred[..4].try_into()?);
    let keeper = pidfd::open(pid)?;
    pidfd::send_signal(keeper.as_fd(), libc::SIGKILL)?;
    wait_readable(keeper.as_fd())?;
    Ok(pid)
}
