use super::*;
use std::sync::mpsc;
use std::thread;

const LIMIT: Duration = Duration::from_secs(30);

fn key(seed: u8) -> Key {
    Key::from_hex(&format!("{seed:02x}").repeat(32)).unwrap()
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// A receiver that knows key 1 and takes the move "m"; what it gets, frame by frame, then how it ended.
fn receiver(listener: TcpListener) -> mpsc::Receiver<Result<Option<Frame>>> {
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        let mut stream = match Stream::accept(&listener, &key(1), "m", Instant::now() + LIMIT) {
            Ok(stream) => stream,
            Err(e) => return drop(tell.send(Err(e))),
        };
        loop {
            let frame = stream.recv();
            let last = !matches!(frame, Ok(Some(_)));
            if tell.send(frame).is_err() || last {
                return;
            }
        }
    });
    told
}

fn arrived(got: &mpsc::Receiver<Result<Option<Frame>>>) -> Frame {
    got.recv_timeout(LIMIT).unwrap().unwrap().unwrap()
}

/// Passes one connection on to `to` and changes what goes there.
fn between(to: SocketAddr, change: impl Fn(Vec<u8>) -> Vec<u8> + Send + 'static) -> SocketAddr {
    let (listener, address) = listener();
    thread::spawn(move || {
        let (mut from, _) = listener.accept().unwrap();
        let mut there = TcpStream::connect(to).unwrap();
        let (mut back, mut forth) = (there.try_clone().unwrap(), from.try_clone().unwrap());
        thread::spawn(move || std::io::copy(&mut back, &mut forth));
        loop {
            let mut len = [0; 2];
            if from.read_exact(&mut len).is_err() {
                let _ = there.shutdown(std::net::Shutdown::Write);
                return;
            }
            let mut message = len.to_vec();
            message.resize(2 + usize::from(u16::from_be_bytes(len)), 0);
            from.read_exact(&mut message[2..]).unwrap();
            let message = change(message);
            if message.is_empty() || there.write_all(&message).is_err() {
                let _ = there.shutdown(std::net::Shutdown::Both);
                return;
            }
        }
    });
    address
}

fn sender(to: SocketAddr) -> Result<Stream> {
    Stream::connect(to, &key(1), "m", LIMIT)
}

#[test]
fn who_is_sent_away_for_being_slow_knocks_again() {
    let (first, address) = listener();
    let (told, got) = mpsc::channel();
    thread::spawn(move || {
        let (slow, _) = first.accept().unwrap();
        thread::sleep(KNOCK);
        drop(slow);
        told.send(receiver(first)).unwrap();
    });
    let mut stream = sender(address).unwrap();
    stream.send(9, &[], b"late").unwrap();
    stream.flush().unwrap();
    let got = got.recv_timeout(LIMIT).unwrap();
    let frame = arrived(&got);
    assert_eq!((frame.kind, &frame.body[..]), (9, &b"late"[..]));
}

#[test]
fn frames_arrive_as_they_were_sent() {
    let (listener, address) = listener();
    let got = receiver(listener);
    let mut stream = sender(address).unwrap();
    let sizes = [
        0,
        1,
        APART - 1,
        APART,
        CUT,
        CUT + 1,
        65536,
        1 << 20,
        LONGEST,
    ];
    for (kind, size) in sizes.into_iter().enumerate() {
        let body = text(size);
        stream.send(kind as u8, &[], &body).unwrap();
        stream.flush().unwrap();
        let frame = arrived(&got);
        assert_eq!(frame.kind, kind as u8);
        assert!(frame.body[..] == body, "{size}");
    }
    assert!(stream.send(1, &[], &vec![0; LONGEST + 1]).is_err());
    assert!(stream.send(1, &[0; 256], &[]).is_err());
    drop(stream);
    assert!(got.recv_timeout(LIMIT).unwrap().unwrap().is_none());
}

#[test]
fn whoever_knows_another_key_or_move_gets_nothing_and_the_right_one_still_comes_in() {
    let (listener, address) = listener();
    let got = receiver(listener);
    for (key, id) in [(key(2), "m"), (key(1), "other")] {
        let mut tcp = TcpStream::connect(address).unwrap();
        let mut state = handshake(&key, id, true).unwrap();
        let mut message = [0; 256];
        let len = state.write_message(&[], &mut message).unwrap();
        tcp.write_all(&(len as u16).to_be_bytes()).unwrap();
        tcp.write_all(&message[..len]).unwrap();
        tcp.set_read_timeout(Some(LIMIT)).unwrap();
        let mut answer = Vec::new();
        let _ = tcp.read_to_end(&mut answer);
        assert_eq!(answer, b"");
        let error = Stream::connect(address, &key, id, LIMIT).err().unwrap();
        assert!(
            format!("{error:#}").contains("does not know the key"),
            "{error:#}"
        );
    }
    // Garbage, silence that ends, a length that is none.
    for bytes in [&b"GET / HTTP/1.0\r\n\r\n"[..], &[], &[0xff; 70_000]] {
        let mut tcp = TcpStream::connect(address).unwrap();
        let _ = tcp.write_all(bytes);
    }
    let mut stream = sender(address).unwrap();
    stream.send(9, &[], b"right").unwrap();
    stream.flush().unwrap();
    let frame = arrived(&got);
    assert_eq!((frame.kind, &frame.body[..]), (9, &b"right"[..]));
}

#[test]
fn what_was_recorded_opens_nothing() {
    let (inner, address) = listener();
    let got = receiver(inner);
    let (tell, told) = mpsc::channel();
    let middle = between(address, move |message| {
        tell.send(message.clone()).unwrap();
        message
    });
    let mut stream = sender(middle).unwrap();
    stream.send(1, &[], b"secret").unwrap();
    stream.flush().unwrap();
    got.recv_timeout(LIMIT).unwrap().unwrap().unwrap();
    drop(stream);
    let recorded: Vec<u8> = told.try_iter().flatten().collect();
    // The same bytes again, to one who waits for the same move.
    let (again, address) = listener();
    let got = receiver(again);
    let mut tcp = TcpStream::connect(address).unwrap();
    tcp.write_all(&recorded).unwrap();
    drop(tcp);
    let mut stream = sender(address).unwrap();
    stream.send(2, &[], b"fresh").unwrap();
    stream.flush().unwrap();
    let frame = got.recv_timeout(LIMIT).unwrap().unwrap().unwrap();
    assert_eq!(frame.kind, 2);
}

/// Sends a frame, its body in place or not.
type Sends = fn(&mut Stream, u8) -> Result<()>;

/// Sends three frames through somebody who changes the messages; what arrives.
fn through(
    send: Sends,
    change: impl Fn(usize, Vec<u8>) -> Vec<u8> + Send + 'static,
) -> Vec<Result<Option<u8>>> {
    let (listener, address) = listener();
    let got = receiver(listener);
    let count = std::sync::atomic::AtomicUsize::new(0);
    let middle = between(address, move |message| {
        let number = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        change(number, message)
    });
    let mut stream = sender(middle).unwrap();
    for kind in 1..4 {
        let _ = send(&mut stream, kind).and_then(|()| stream.flush());
    }
    drop(stream);
    let mut all = Vec::new();
    while let Ok(got) = got.recv_timeout(LIMIT) {
        all.push(got.map(|frame| frame.map(|frame| frame.kind)));
    }
    all
}

// Message 0 is the handshake, 1 its proof; each frame of these has three.
#[test]
fn what_is_changed_repeated_left_out_or_cut_off_is_an_error() {
    damaged(|stream, kind| stream.send(kind, &[], &[kind; 100_000]));
    damaged(|stream, kind| stream.send_in_place(kind, &[1; 12], &mut [kind; 100_000]));
}

#[test]
fn what_is_sent_in_place_arrives_whole() {
    let (listener, address) = listener();
    let sizes = [APART, CUT - 1, CUT, CUT + 1, 3 * CUT, 1 << 20];
    let receives = thread::spawn(move || {
        let mut stream = Stream::accept(&listener, &key(1), "m", Instant::now() + LIMIT).unwrap();
        for (kind, size) in sizes.into_iter().enumerate() {
            // Into a buffer that holds something else.
            let mut used = Buffer::new(2 * CUT);
            used.fill(1);
            let frame = stream.recv_into(used).unwrap().unwrap();
            assert_eq!((frame.kind, &frame.head[..]), (kind as u8, &b"head"[..]));
            assert!(frame.body[..] == text(size), "{size}");
            // One that has no head comes between, and one that is too short for it.
            for head in [&b""[..], b"head"] {
                let frame = stream.recv().unwrap().unwrap();
                assert_eq!((frame.kind, &frame.head[..]), (9, head));
                assert_eq!(&frame.body[..], b"short");
            }
        }
        assert!(stream.recv().unwrap().is_none());
    });
    let mut stream = sender(address).unwrap();
    for (kind, size) in sizes.into_iter().enumerate() {
        let mut body = text(size);
        stream
            .send_in_place(kind as u8, b"head", &mut body)
            .unwrap();
        assert!(body != text(size));
        stream.send(9, &[], b"short").unwrap();
        stream
            .send_in_place(9, b"head", &mut b"short".to_vec())
            .unwrap();
    }
    assert_eq!(
        stream.totals().raw as usize,
        sizes.iter().map(|s| s + 18).sum::<usize>()
    );
    stream.flush().unwrap();
    drop(stream);
    receives.join().unwrap();
}

fn text(size: usize) -> Vec<u8> {
    (0..size).map(|at| (at / 3) as u8).collect()
}

/// What becomes of frames when something is done to messages of the second.
fn damaged(send: Sends) {
    let fine = through(send, |_, message| message);
    let kinds: Vec<_> = fine.into_iter().map(Result::unwrap).collect();
    assert_eq!(kinds, [Some(1), Some(2), Some(3), None]);
    type Change = fn(usize, Vec<u8>) -> Vec<u8>;
    let ways: [(&str, Change); 5] = [
        ("changed", |n, mut message| {
            if n == 6 {
                message[50] ^= 1;
            }
            message
        }),
        ("repeated", |n, message| match n {
            5 => message.repeat(2),
            _ => message,
        }),
        ("left out", |n, message| match n {
            6 => vec![0, 0],
            _ => message,
        }),
        (
            "cut between the messages of a frame",
            |n, message| match n {
                7 => Vec::new(),
                _ => message,
            },
        ),
        ("cut within a message", |n, message| match n {
            6 => message[..30].to_vec(),
            7 => Vec::new(),
            _ => message,
        }),
    ];
    for (way, change) in ways {
        let got = through(send, change);
        let kinds: Vec<_> = got.iter().filter_map(|g| g.as_ref().ok()).collect();
        assert_eq!(kinds, [&Some(1)], "{way}");
        assert!(got.last().unwrap().is_err(), "{way}");
    }
}
