//! Messages without bytes: once peeked at, the kernel shows them to nobody who walks a queue.

use super::*;

const TEXTS: [&[u8]; 6] = [b"", b"one", b"", b"", b"two", b""];

/// What a program that goes on has in its queues, at three dumps.
fn thrice(t: &Target, fds: &[i32]) -> Result<Captured> {
    let first = capture(t, fds)?;
    assert!(first.warnings.is_empty(), "{:?}", first.warnings);
    let second = capture(t, fds)?;
    assert_eq!(second.sockets, first.sockets);
    let third = capture(t, fds)?;
    assert_eq!(third.sockets, first.sockets);
    assert!(third.warnings.is_empty(), "{:?}", third.warnings);
    Ok(third)
}

fn has_all(fd: &OwnedFd, texts: &[&[u8]]) -> Result<()> {
    for (i, text) in texts.iter().enumerate() {
        let got = read(fd).with_context(|| format!("message {i}"))?;
        assert_eq!(got, *text, "message {i}");
    }
    Ok(())
}

#[test]
fn unix_messages_without_bytes_are_in_every_dump() {
    in_namespace(
        "empties::unix_messages_without_bytes_are_in_every_dump",
        || {
            let (t, fds) = Target::start("empties")?;
            let c = thrice(&t, &fds)?;
            t.kill();
            let s = rebuild(&c)?;
            for i in [0, 2] {
                has_all(&s[i], &TEXTS)?;
                assert!(would_block(&read(&s[i])));
            }
            // A peer who sends no more, and one who is gone.
            for i in [4, 6] {
                has_all(&s[i], &TEXTS[..5])?;
                assert_eq!(read(&s[i])?, b"");
            }
            Ok(())
        },
    );
}

#[test]
fn senders_of_messages_without_bytes_are_in_every_dump() {
    in_namespace(
        "empties::senders_of_messages_without_bytes_are_in_every_dump",
        || {
            let (t, fds) = Target::start("empty_senders")?;
            let c = thrice(&t, &fds)?;
            let pid = t.pid();
            let SocketState::Unix(u) = &c.sockets[0].state else {
                bail!("no unix socket");
            };
            let names: Vec<_> = u.queue.iter().map(|m| m.from.as_deref()).collect();
            let friend = Some(&b"\0mist-friend"[..]);
            assert_eq!(names, [friend, Some(b"\0mist-stranger"), friend, None]);
            for m in &u.queue {
                assert_eq!(m.credentials.context("credentials")?.0, pid);
            }
            t.kill();
            let s = rebuild(&c)?;
            let mut buffer = [0; 10];
            for (text, from) in [(&b""[..], &b"\0mist-friend"[..]), (b"", b"\0mist-stranger")] {
                let r = socket::receive(&s[0], &mut buffer, 0)?;
                assert_eq!((&buffer[..r.len], &r.from[2..]), (text, from));
            }
            has_all(&s[0], &[b"x", b""])?;
            assert!(would_block(&read(&s[0])));
            Ok(())
        },
    );
}

#[test]
fn udp_datagrams_without_bytes_are_in_every_dump() {
    in_namespace(
        "empties::udp_datagrams_without_bytes_are_in_every_dump",
        || {
            let (t, fds) = Target::start("empty_udp")?;
            let c = thrice(&t, &fds)?;
            let senders = fds[3..]
                .iter()
                .map(|&n| Ok(socket::local_name(t.fd(n)?)?))
                .collect::<Result<Vec<_>>>()?;
            t.kill();
            let s = rebuild(&c)?;
            let mut buffer = [0; 10];
            for (i, from) in senders.iter().enumerate() {
                for text in TEXTS {
                    let r = socket::receive(&s[i], &mut buffer, 0)?;
                    assert_eq!(&buffer[..r.len], text);
                    assert_eq!(r.from[2..4], from[2..4], "port");
                    let host = mistctl::net::host(&r.from);
                    assert!(host.ends_with(mistctl::net::host(from)), "{host:?}");
                }
                assert!(would_block(&read(&s[i])));
            }
            Ok(())
        },
    );
}

#[test]
fn without_kernel_memory_it_is_said_what_may_be_missing() {
    in_namespace(
        "empties::without_kernel_memory_it_is_said_what_may_be_missing",
        || {
            use caps::{CapSet, Capability};
            let (t, fds) = Target::start("empties")?;
            for needed in [Capability::CAP_BPF, Capability::CAP_SYS_ADMIN] {
                caps::drop(None, CapSet::Effective, needed)?;
            }
            // What nobody has peeked at is seen.
            let first = capture(&t, &fds[..4])?;
            assert!(first.warnings.is_empty(), "{:?}", first.warnings);
            let s = rebuild(&first)?;
            for i in [0, 2] {
                has_all(&s[i], &TEXTS)?;
                assert!(would_block(&read(&s[i])));
            }
            let refused = capture(&t, &fds[..2]).map(|_| ()).unwrap_err();
            let refused = format!("{refused:#}");
            let place = format!("pid {}, descriptor {}:", t.pid(), fds[0]);
            assert!(refused.starts_with(&place), "{refused}");
            assert!(refused.contains("3 messages without bytes"), "{refused}");
            let warned = capture(&t, &fds[2..4])?.warnings.join("\n");
            assert!(warned.contains("3 messages without bytes"), "{warned}");
            assert!(
                warned.contains(&format!("descriptor {}:", fds[2])),
                "{warned}"
            );
            Ok(())
        },
    );
}
