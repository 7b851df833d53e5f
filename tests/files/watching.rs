//! epoll, inotify and terminals.

use super::*;

/// Descriptor number, events and data of what an epoll instance watches.
fn watched(epoll: &impl AsRawFd) -> Vec<(i32, u32, u64)> {
    let info = mistctl::dump::files::FdInfo::read("self", epoll.as_raw_fd()).unwrap();
    let mut entries: Vec<_> = info
        .lines()
        .filter(|l| l.starts_with("tfd:"))
        .map(|l| {
            let words: Vec<&str> = l.split_whitespace().collect();
            let hex = |s| u64::from_str_radix(s, 16).unwrap();
            (
                words[1].parse().unwrap(),
                hex(words[3]) as u32,
                hex(words[5]),
            )
        })
        .collect();
    entries.sort_unstable();
    entries
}

#[test]
fn epoll_watches_the_same_files_under_the_same_numbers() {
    let _turn = turn();
    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    let (read, write) = pipe(0);
    let (other_read, other_write) = pipe(0);
    let add = |fd: &OwnedFd, flags, data| epoll.add(fd, EpollEvent::new(flags, data)).unwrap();
    add(&read, EpollFlags::EPOLLIN, u64::MAX);
    add(&other_read, EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 7);
    // Fired and not armed again.
    add(&write, EpollFlags::EPOLLOUT | EpollFlags::EPOLLONESHOT, 9);
    assert_eq!(
        epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::ZERO),
        Ok(1)
    );
    // The number of the first pipe's reader comes to mean the other's, while the first lives on elsewhere.
    let moved = read.try_clone().unwrap();
    let number = read.as_raw_fd();
    let mut read = read;
    nix::unistd::dup3(&other_read, &mut read, nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    add(&read, EpollFlags::EPOLLIN, 8);
    let before = watched(&epoll.0);
    assert_eq!(before.len(), 4);
    let open = [&read, &moved, &write, &other_read, &other_write, &epoll.0];
    let target = Sleeper::with(&open.map(|f| f.as_fd()));

    let image = dump(&[target.pid()]).unwrap();
    assert_eq!(watched(&epoll.0), before);
    let built = image.build().unwrap();
    let again = rebuilt(&image, &built, target.pid(), &epoll.0);
    assert_eq!(watched(&again), before);
    let again = Epoll(again.into());
    let ready = || {
        let mut events = [EpollEvent::empty(); 8];
        let n = again.wait(&mut events, EpollTimeout::ZERO).unwrap();
        let mut data: Vec<u64> = events[..n].iter().map(|e| e.data()).collect();
        data.sort_unstable();
        data
    };
    assert!(ready().is_empty());
    rebuilt(&image, &built, target.pid(), &write)
        .write_all(b"x")
        .unwrap();
    assert_eq!(ready(), [u64::MAX]);
    rebuilt(&image, &built, target.pid(), &other_write)
        .write_all(b"x")
        .unwrap();
    assert_eq!(ready(), [7, 8, u64::MAX]);
    assert_eq!(number, read.as_raw_fd());
}

#[test]
fn a_signalfd_in_epoll_is_left_to_the_process_itself() {
    let _turn = turn();
    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    let signal = fds::signalfd(1 << 9).unwrap();
    let event = EpollEvent::new(EpollFlags::EPOLLIN, 3);
    epoll.add(&signal, event).unwrap();
    let target = Sleeper::with(&[epoll.0.as_fd(), signal.as_fd()]);
    let image = dump(&[target.pid()]).unwrap();
    let built = image.build().unwrap();
    let add = &built.in_body.epoll[0];
    assert_eq!(
        (add.pid, add.epoll, add.fd, add.data),
        (target.pid(), epoll.0.as_raw_fd(), signal.as_raw_fd(), 3)
    );
}

#[test]
fn inotify_keeps_its_watches_under_their_numbers() {
    let _turn = turn();
    use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a file");
    std::fs::write(&file, "").unwrap();
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).unwrap();
    for _ in 0..5 {
        let wd = inotify.add_watch("/", AddWatchFlags::IN_CREATE).unwrap();
        inotify.rm_watch(wd).unwrap();
    }
    let on_dir = inotify
        .add_watch(dir.path(), AddWatchFlags::IN_CREATE)
        .unwrap();
    let on_file = inotify.add_watch(&file, AddWatchFlags::IN_MODIFY).unwrap();
    let fd = inotify.as_fd().try_clone_to_owned().unwrap();
    let target = Sleeper::with(&[fd.as_fd()]);

    let image = dump(&[target.pid()]).unwrap();
    let Kind::Inotify { queued, .. } = image.kind(target.pid(), &fd) else {
        panic!()
    };
    assert!(*queued > 0);
    let built = image.build().unwrap();
    let mut again = rebuilt(&image, &built, target.pid(), &fd);
    std::fs::write(&file, "x").unwrap();
    std::fs::write(dir.path().join("new"), "").unwrap();
    let mut buffer = [0; 4096];
    let n = again.read(&mut buffer).unwrap();
    let (mut seen, mut at) = (Vec::new(), 0);
    while at < n {
        // struct inotify_event: wd, mask, cookie, length of the name.
        let word = |i: usize| i32::from_ne_bytes(buffer[at + 4 * i..][..4].try_into().unwrap());
        seen.push((word(0), word(1) as u32));
        at += 16 + word(3) as usize;
    }
    assert!(seen.contains(&(on_dir.as_raw(), libc::IN_CREATE)));
    assert!(seen.contains(&(on_file.as_raw(), libc::IN_MODIFY)));
    assert!(seen.iter().all(|(_, mask)| mask & libc::IN_IGNORED == 0));
}

#[test]
fn a_pseudo_terminal_keeps_its_settings_and_its_line() {
    let _turn = turn();
    use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
    let size = nix::pty::Winsize {
        ws_row: 33,
        ws_col: 77,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let pty = nix::pty::openpty(&size, None).unwrap();
    cloexec(pty.master.as_fd(), true);
    cloexec(pty.slave.as_fd(), true);
    let mut settings = tcgetattr(&pty.slave).unwrap();
    settings.local_flags.remove(LocalFlags::ECHO);
    tcsetattr(&pty.slave, SetArg::TCSANOW, &settings).unwrap();
    let target = Sleeper::with(&[pty.master.as_fd(), pty.slave.as_fd()]);

    let image = dump(&[target.pid()]).unwrap();
    let built = image.build().unwrap();
    let mut master = rebuilt(&image, &built, target.pid(), &pty.master);
    let mut slave = rebuilt(&image, &built, target.pid(), &pty.slave);
    assert_eq!(
        mistctl::kernel::tty::winsize(slave.as_fd()).unwrap(),
        [33, 77, 0, 0]
    );
    assert_eq!(
        mistctl::kernel::tty::termios(slave.as_fd()).unwrap(),
        mistctl::kernel::tty::termios(pty.slave.as_fd()).unwrap()
    );
    master.write_all(b"typed\n").unwrap();
    let mut line = [0; 100];
    assert_eq!(slave.read(&mut line).unwrap(), 6);
    assert!(!built.warnings.is_empty(), "the number cannot be the same");
}

#[test]
fn what_stands_in_a_pseudo_terminal_is_kept_on_both_sides() {
    let _turn = turn();
    use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
    let pty = nix::pty::openpty(None, None).unwrap();
    cloexec(pty.master.as_fd(), true);
    cloexec(pty.slave.as_fd(), true);
    let mut settings = tcgetattr(&pty.slave).unwrap();
    settings.local_flags.remove(LocalFlags::ECHO);
    tcsetattr(&pty.slave, SetArg::TCSANOW, &settings).unwrap();
    let (mut master, mut slave) = (File::from(pty.master), File::from(pty.slave));
    master.write_all(b"a line\nhalf").unwrap();
    slave.write_all(b"answer\n").unwrap();
    let target = Sleeper::with(&[master.as_fd(), slave.as_fd()]);

    let image = dump(&[target.pid()]).unwrap();
    let built = image.build().unwrap();
    let mut again = rebuilt(&image, &built, target.pid(), &master);
    let mut far = rebuilt(&image, &built, target.pid(), &slave);
    for (master, slave) in [(&mut master, &mut slave), (&mut again, &mut far)] {
        let mut line = [0; 100];
        let n = slave.read(&mut line).unwrap();
        assert_eq!(&line[..n], b"a line\n");
        master.write_all(b" more\n").unwrap();
        let n = slave.read(&mut line).unwrap();
        assert_eq!(&line[..n], b"half more\n");
        let n = master.read(&mut line).unwrap();
        assert_eq!(&line[..n], b"answer\r\n");
    }
}

#[test]
fn a_terminal_of_somebody_else_leads_outside() {
    let _turn = turn();
    let pty = nix::pty::openpty(None, None).unwrap();
    cloexec(pty.master.as_fd(), true);
    cloexec(pty.slave.as_fd(), true);
    let target = Sleeper::with(&[pty.slave.as_fd()]);
    let image = dump(&[target.pid()]).unwrap();
    let Kind::External(external) = image.kind(target.pid(), &pty.slave) else {
        panic!()
    };
    assert!(external.terminal && external.stream.is_none());
}
