//! What the captured process does: it sets sockets up, names their descriptors, and waits for a line.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use mistctl::kernel::socket::{self, Extra};
use mistctl::kernel::sockopt;

const UNIX: i32 = libc::AF_UNIX;
const STREAM: i32 = libc::SOCK_STREAM;
const DGRAM: i32 = libc::SOCK_DGRAM;

fn send(fd: impl AsFd, data: &[u8]) -> Result<()> {
    assert_eq!(socket::send(fd, data, &Extra::default())?, data.len());
    Ok(())
}

fn send_to(fd: impl AsFd, data: &[u8], to: &[u8]) -> Result<()> {
    let extra = Extra {
        to: Some(to),
        ..Extra::default()
    };
    assert_eq!(socket::send(fd, data, &extra)?, data.len());
    Ok(())
}

/// struct sockaddr_un.
fn unix(path: &[u8]) -> Vec<u8> {
    let mut a = (UNIX as u16).to_ne_bytes().to_vec();
    a.extend_from_slice(path);
    if path.first() != Some(&0) {
        a.push(0);
    }
    a
}

/// Loopback, port to be chosen by the kernel.
pub fn loopback(family: i32) -> Vec<u8> {
    let mut a = (family as u16).to_ne_bytes().to_vec();
    if family == libc::AF_INET {
        a.extend_from_slice(&[0, 0, 127, 0, 0, 1]);
        a.resize(16, 0);
    } else {
        a.resize(23, 0);
        a.push(1);
        a.resize(28, 0);
    }
    a
}

/// Where the scene with path names makes them.
pub fn directory() -> PathBuf {
    std::env::temp_dir().join("mist-sockets-test")
}

fn ready(fds: &[&OwnedFd]) {
    let numbers: Vec<_> = fds.iter().map(|f| f.as_raw_fd().to_string()).collect();
    say(&numbers.join(" "));
}

fn say(line: &str) {
    println!("scene:{line}");
}

/// Waits for the test to send a line; ends with it.
fn wait() -> Result<()> {
    let mut byte = [0];
    std::io::stdin().read_exact(&mut byte)?;
    Ok(())
}

fn receive(fd: impl AsFd) -> Result<String> {
    let mut buffer = [0; 1000];
    let n = socket::receive(fd, &mut buffer, 0)?.len;
    Ok(String::from_utf8_lossy(&buffer[..n]).into_owned())
}

pub fn play(scene: &str) -> Result<()> {
    match scene {
        "stream_pair" => {
            let (a, b) = socket::pair(UNIX, STREAM, 0)?;
            sockopt::set_int(&a, libc::SOL_SOCKET, libc::SO_SNDBUF, 50_000)?;
            send(&b, b"to-a")?;
            send(&a, b"to-b")?;
            let (c, d) = socket::pair(UNIX, STREAM, 0)?;
            send(&d, b"last words")?;
            socket::shutdown(&d, 2)?;
            ready(&[&a, &b, &c, &d]);
            wait()?;
            say(&format!("{}({})", receive(&a)?, receive(&b)?));
            wait()
        }
        "messages" => {
            let (a, b) = socket::pair(UNIX, DGRAM, 0)?;
            let (c, d) = socket::pair(UNIX, libc::SOCK_SEQPACKET, 0)?;
            for fd in [&b, &d] {
                send(fd, b"one")?;
                send(fd, &[b'x'; 70_000])?;
                send(fd, b"three")?;
            }
            ready(&[&a, &b, &c, &d]);
            wait()
        }
        "closed_peer" => {
            let (a, b) = socket::pair(UNIX, STREAM, 0)?;
            send(&b, b"bye")?;
            drop(b);
            let (c, d) = socket::pair(UNIX, STREAM, 0)?;
            send(&c, b"never read")?;
            drop(d);
            ready(&[&a, &c]);
            wait()
        }
        "in_flight" => {
            let (a, b) = socket::pair(UNIX, STREAM, 0)?;
            let (reader, mut writer) = std::io::pipe()?;
            std::io::Write::write_all(&mut writer, b"in pipe")?;
            send(&b, b"plain")?;
            let with = |data: &[u8], fds: &[std::os::fd::BorrowedFd<'_>]| {
                socket::send(
                    &b,
                    data,
                    &Extra {
                        fds,
                        ..Extra::default()
                    },
                )
            };
            with(b"with", &[reader.as_fd()])?;
            with(b"two more", &[a.as_fd(), writer.as_fd()])?;
            send(&b, b"end")?;
            ready(&[&a, &b]);
            wait()
        }
        "listeners" => listeners(),
        "senders" => {
            let a = socket::socket(UNIX, DGRAM, 0)?;
            let name = unix(b"\0mist-receiver");
            socket::bind(&a, &name)?;
            let friend = socket::socket(UNIX, DGRAM, 0)?;
            socket::bind(&friend, &unix(b"\0mist-friend"))?;
            socket::connect(&friend, &name)?;
            send(&friend, b"known")?;
            let stranger = socket::socket(UNIX, DGRAM, 0)?;
            socket::bind(&stranger, &unix(b"\0mist-stranger"))?;
            send_to(&stranger, b"gone since", &name)?;
            drop(stranger);
            let nameless = socket::socket(UNIX, DGRAM, 0)?;
            send_to(&nameless, b"nameless", &name)?;
            drop(nameless);
            ready(&[&a, &friend]);
            wait()
        }
        "udp" => udp(),
        "empties" => empties(),
        "empty_senders" => empty_senders(),
        "empty_udp" => empty_udp(),
        "tcp_pairs" => tcp_pairs(),
        "tcp_client" => {
            // Talks to the test: its port is in the environment.
            let port: u16 = std::env::var("MIST_TEST_PORT")?.parse()?;
            let mut to = loopback(libc::AF_INET);
            to[2..4].copy_from_slice(&port.to_be_bytes());
            let s = socket::socket(libc::AF_INET, STREAM, 0)?;
            sockopt::set_int(&s, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
            socket::connect(&s, &to)?;
            send(&s, b"hello from the target")?;
            ready(&[&s]);
            loop {
                wait()?;
                send(&s, b"still here")?;
            }
        }
        "tcp_listen" => {
            let mut all = Vec::new();
            for family in [libc::AF_INET, libc::AF_INET6] {
                let l = socket::socket(family, STREAM, 0)?;
                sockopt::set_int(&l, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
                sockopt::set_int(&l, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 77)?;
                socket::bind(&l, &loopback(family))?;
                socket::listen(&l, 17)?;
                all.push(l);
            }
            let n = socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
            let mut addr = [0u8; 12];
            addr[0] = libc::AF_NETLINK as u8;
            addr[4] = 0x55;
            addr[8] = 1; // link changes
            socket::bind(&n, &addr)?;
            ready(&[&all[0], &all[1], &n]);
            wait()
        }
        other => bail!("no scene {other}"),
    }
}

fn listeners() -> Result<()> {
    let directory = directory();
    let _ = std::fs::remove_dir_all(&directory);
    std::fs::create_dir_all(&directory)?;
    std::env::set_current_dir(&directory)?;
    let path = directory.join("by-path");
    let path = path.to_str().context("UTF-8")?.as_bytes();
    let mut all = Vec::new();
    for name in [path, b"\0mist-abstract", b"relative"] {
        let l = socket::socket(UNIX, STREAM, 0)?;
        socket::bind(&l, &unix(name))?;
        socket::listen(&l, 3)?;
        let client = socket::socket(UNIX, STREAM, 0)?;
        socket::connect(&client, &unix(name))?;
        send(&client, b"from client")?;
        let accepted = socket::accept(&l)?;
        let waiting = socket::socket(UNIX, STREAM, 0)?;
        socket::connect(&waiting, &unix(name))?;
        all.extend([l, client, accepted, waiting]);
    }
    ready(&all.iter().collect::<Vec<_>>());
    wait()
}

const TEXTS: [&[u8]; 6] = [b"", b"one", b"", b"", b"two", b""];

/// To the first, third ... of these sockets, from the one behind it; to the last from one that is gone.
fn empties() -> Result<()> {
    let mut all = Vec::new();
    let ended = [(DGRAM, false), (libc::SOCK_SEQPACKET, true)];
    for (kind, ended) in [(libc::SOCK_SEQPACKET, false)].into_iter().chain(ended) {
        let (a, b) = socket::pair(UNIX, kind, 0)?;
        for text in TEXTS.iter().take(if ended { 5 } else { 6 }) {
            send(&b, text)?;
        }
        if ended {
            socket::shutdown(&b, 2)?;
        }
        all.extend([a, b]);
    }
    let (a, b) = socket::pair(UNIX, libc::SOCK_SEQPACKET, 0)?;
    for text in &TEXTS[..5] {
        send(&b, text)?;
    }
    drop(b);
    all.push(a);
    ready(&all.iter().collect::<Vec<_>>());
    wait()
}

fn empty_senders() -> Result<()> {
    let a = socket::socket(UNIX, DGRAM, 0)?;
    let name = unix(b"\0mist-receiver");
    socket::bind(&a, &name)?;
    sockopt::set_int(&a, libc::SOL_SOCKET, libc::SO_PASSCRED, 1)?;
    let friend = socket::socket(UNIX, DGRAM, 0)?;
    socket::bind(&friend, &unix(b"\0mist-friend"))?;
    socket::connect(&friend, &name)?;
    send(&friend, b"")?;
    let stranger = socket::socket(UNIX, DGRAM, 0)?;
    socket::bind(&stranger, &unix(b"\0mist-stranger"))?;
    send_to(&stranger, b"", &name)?;
    drop(stranger);
    send(&friend, b"x")?;
    let nameless = socket::socket(UNIX, DGRAM, 0)?;
    send_to(&nameless, b"", &name)?;
    drop(nameless);
    ready(&[&a, &friend]);
    wait()
}

/// The last is of IPv6 and hears one of IPv4. Receivers, then senders.
fn empty_udp() -> Result<()> {
    let (mut receivers, mut senders) = (Vec::new(), Vec::new());
    let (v4, v6) = (libc::AF_INET, libc::AF_INET6);
    for (to, from) in [(v4, v4), (v6, v6), (v6, v4)] {
        let a = socket::socket(to, DGRAM, 0)?;
        let mut any = loopback(to);
        any[4..].fill(0);
        socket::bind(&a, &any)?;
        let b = socket::socket(from, DGRAM, 0)?;
        socket::bind(&b, &loopback(from))?;
        let mut name = loopback(from);
        name[2..4].copy_from_slice(&socket::local_name(&a)?[2..4]);
        for text in TEXTS {
            send_to(&b, text, &name)?;
        }
        receivers.push(a);
        senders.push(b);
    }
    ready(&receivers.iter().chain(&senders).collect::<Vec<_>>());
    wait()
}

fn udp() -> Result<()> {
    let mut receivers = Vec::new();
    let mut senders = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let a = socket::socket(family, DGRAM, 0)?;
        sockopt::set_int(&a, libc::SOL_SOCKET, libc::SO_BROADCAST, 1)?;
        let mut any = loopback(family);
        any[4..].fill(0);
        socket::bind(&a, &any)?;
        let b = socket::socket(family, DGRAM, 0)?;
        socket::bind(&b, &loopback(family))?;
        let mut to = loopback(family);
        to[2..4].copy_from_slice(&socket::local_name(&a)?[2..4]);
        for text in [b"first".to_vec(), Vec::new(), vec![b'z'; 60_000]] {
            send_to(&b, &text, &to)?;
        }
        receivers.push(a);
        senders.push(b);
    }
    let shared = |addr: &[u8]| -> Result<OwnedFd> {
        let s = socket::socket(libc::AF_INET, DGRAM, 0)?;
        sockopt::set_int(&s, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        socket::bind(&s, addr)?;
        Ok(s)
    };
    let connected = shared(&loopback(libc::AF_INET))?;
    let addr = socket::local_name(&connected)?;
    let other = shared(&addr)?;
    socket::connect(&connected, &socket::local_name(&senders[0])?)?;
    send_to(&senders[0], b"to the connected", &addr)?;
    ready(&[
        &receivers[0],
        &receivers[1],
        &senders[0],
        &senders[1],
        &connected,
        &other,
    ]);
    wait()
}

/// Four connections: data both ways and more than fits, half-closed either way, one end closed.
fn tcp_pairs() -> Result<()> {
    let mut all = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let l = socket::socket(family, STREAM, 0)?;
        socket::bind(&l, &loopback(family))?;
        socket::listen(&l, 10)?;
        let connect = || -> Result<(OwnedFd, OwnedFd)> {
            let c = socket::socket(family, STREAM, 0)?;
            socket::connect(&c, &socket::local_name(&l)?)?;
            Ok((c, socket::accept(&l)?))
        };
        let (a, b) = connect()?;
        sockopt::set_int(&a, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
        send(&a, b"to-b")?;
        // Until nothing more is taken: much of it stands in the sender's queue.
        let pattern: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8).collect();
        let mut sent = 0;
        while let Ok(n) = socket::send(&b, &pattern[sent % 251..][..100_000], &Extra::default()) {
            sent += n;
        }
        let (c, d) = connect()?;
        send(&c, b"request")?;
        socket::shutdown(&c, 2)?;
        let (e, f) = connect()?;
        send(&f, b"goodbye")?;
        drop(f);
        let (g, h) = connect()?;
        send(&g, b"first")?;
        socket::shutdown(&g, 2)?;
        socket::shutdown(&h, 2)?;
        let waiting = socket::socket(family, STREAM, 0)?;
        socket::connect(&waiting, &socket::local_name(&l)?)?;
        all.extend([l, a, b, c, d, e, g, h, waiting]);
        say(&format!("sent {sent}"));
    }
    ready(&all.iter().collect::<Vec<_>>());
    wait()
}
