//! Pipes and FIFOs.

use super::*;

#[test]
fn a_pipe_keeps_its_bytes_on_both_sides() {
    let _turn = turn();
    let (read, write) = pipe(0);
    fds::set_pipe_size(write.as_fd(), 1 << 20).unwrap();
    let (mut read, mut write) = (File::from(read), File::from(write));
    let sent: Vec<u8> = (0..700_000u32).map(|i| (i % 251) as u8).collect();
    write.write_all(&sent).unwrap();
    let target = Sleeper::with(&[read.as_fd(), write.as_fd()]);

    let image = dump(&[target.pid()]).unwrap();
    let built = image.build().unwrap();
    let mut received = vec![0; sent.len()];
    let mut again = rebuilt(&image, &built, target.pid(), &read);
    again.read_exact(&mut received).unwrap();
    assert!(received == sent);
    assert_eq!(fds::pipe_size(again.as_fd()).unwrap(), 1 << 20);
    read.read_exact(&mut received).unwrap();
    assert!(received == sent, "the original lost bytes");

    // Nobody but the rebuilt write end holds the pipe open.
    drop(rebuilt(&image, &built, target.pid(), &write));
    let write_id = image.id(target.pid(), &write);
    let mut built = built;
    built.fds.remove(&write_id);
    assert_eq!(again.read(&mut received).unwrap(), 0);
}

#[test]
fn packets_of_a_pipe_stay_packets() {
    let _turn = turn();
    let (read, write) = pipe(libc::O_DIRECT);
    let (read, mut write) = (File::from(read), File::from(write));
    for packet in [&b"one"[..], b"three", b"x"] {
        write.write_all(packet).unwrap();
    }
    let target = Sleeper::with(&[read.as_fd(), write.as_fd()]);
    let image = dump(&[target.pid()]).unwrap();
    let built = image.build().unwrap();
    for mut end in [rebuilt(&image, &built, target.pid(), &read), read] {
        let mut buffer = [0; 100];
        let sizes: Vec<usize> = (0..3).map(|_| end.read(&mut buffer).unwrap()).collect();
        assert_eq!(sizes, [3, 5, 1]);
    }
}

#[test]
fn the_last_words_of_a_closed_pipe_are_kept() {
    let _turn = turn();
    let (read, write) = pipe(0);
    let read = File::from(read);
    File::from(write).write_all(b"bye").unwrap();
    let target = Sleeper::with(&[read.as_fd()]);
    let image = dump(&[target.pid()]).unwrap();
    let built = image.build().unwrap();
    let mut text = String::new();
    rebuilt(&image, &built, target.pid(), &read)
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "bye");
}

#[test]
fn pipes_to_somebody_else_lead_to_the_restoring_shell_or_nowhere() {
    let _turn = turn();
    let (_read, write) = pipe(0);
    let target = Sleeper::with(&[write.as_fd()]);
    let image = dump(&[target.pid()]).unwrap();
    for (fd, stream) in [(0, Some(0)), (1, Some(1)), (write.as_raw_fd(), None)] {
        let Kind::External(external) = image.kind(target.pid(), &fd) else {
            panic!("{:?}", image.kind(target.pid(), &fd))
        };
        assert_eq!(external.stream, stream);
    }
    let built = image.build().unwrap();
    let nowhere = rebuilt(&image, &built, target.pid(), &write);
    assert!(nowhere.metadata().unwrap().file_type().is_char_device());
}

#[test]
fn one_stream_on_two_numbers_becomes_two_streams() {
    let _turn = turn();
    let (read, write) = pipe(0);
    let both = [write.try_clone().unwrap(), write];
    let [out, err] = both.map(Stdio::from);
    let mut command = Command::new("sh");
    command.args(["-c", "echo; read line"]);
    let child = command
        .stdin(Stdio::piped())
        .stdout(out)
        .stderr(err)
        .spawn();
    drop(command);
    let target = Sleeper(child.unwrap());
    File::from(read.try_clone().unwrap())
        .read_exact(&mut [0])
        .unwrap();
    let image = dump(&[target.pid()]).unwrap();
    assert_ne!(image.id(target.pid(), &1), image.id(target.pid(), &2));
    let Kind::External(external) = image.kind(target.pid(), &2) else {
        panic!()
    };
    assert_eq!(external.stream, Some(2));
}

#[test]
fn a_fifo_keeps_its_bytes_and_its_name() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut both = File::options().read(true).write(true).open(&path).unwrap();
    let read = File::open(&path).unwrap();
    both.write_all(b"queued").unwrap();
    let target = Sleeper::with(&[both.as_fd(), read.as_fd()]);
    let image = dump(&[target.pid()]).unwrap();
    drop(target);
    drop((both, read.try_clone().unwrap()));
    let number = read.as_raw_fd();
    drop(read);
    let pid = *image.tables.keys().next().unwrap();
    let built = image.build().unwrap();
    let mut text = [0; 6];
    rebuilt(&image, &built, pid, &number)
        .read_exact(&mut text)
        .unwrap();
    assert_eq!(&text, b"queued");
}
