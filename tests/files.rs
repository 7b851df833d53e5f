//! Descriptors, captured from a living process and rebuilt: a child inherits what a test sets up and sits there;
//! the test reads it from outside, sends it through the image's schema, builds it anew and compares.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};

use anyhow::{Result, bail};
use mistctl::dump::files::{FileDumper, Sockets};
use mistctl::dump::tables::Tables;
use mistctl::image::files::{Kind, LockClass};
use mistctl::image::{FORMAT_NAME, FORMAT_VERSION, Manifest, Origin};
use mistctl::kernel::{fds, kcmp, pidfd};
use mistctl::restore::files::{Built, Surroundings, build, memfd};

/// Children inherit everything that is open, so tests take turns.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(|e| e.into_inner())
}

struct NoSockets;

impl Sockets for NoSockets {
    fn socket(&mut self, pid: i32, fd: i32, _: BorrowedFd<'_>) -> Result<u32> {
        bail!("process {pid}: fd {fd}: a socket")
    }
}

/// A process that has inherited descriptors and does nothing; ends with the test.
struct Sleeper(Child);

impl Sleeper {
    fn with(inherited: &[BorrowedFd<'_>]) -> Self {
        for fd in inherited {
            cloexec(*fd, false);
        }
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        for fd in inherited {
            cloexec(*fd, true);
        }
        // Once it echoes it has done all that programs do as they start.
        child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        Self(child)
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A pipe that children do not inherit unless asked to.
fn pipe(flags: i32) -> (OwnedFd, OwnedFd) {
    use nix::fcntl::OFlag;
    nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::from_bits_truncate(flags)).unwrap()
}

fn cloexec(fd: BorrowedFd<'_>, on: bool) {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    let flag = if on {
        FdFlag::FD_CLOEXEC
    } else {
        FdFlag::empty()
    };
    fcntl(fd, FcntlArg::F_SETFD(flag)).unwrap();
}

/// An image of the descriptors of some processes, through JSON and back, and the contents beside it.
struct Image {
    manifest: Manifest,
    contents: Vec<(u32, Vec<u8>)>,
    tables: std::collections::BTreeMap<i32, Vec<mistctl::image::Fd>>,
}

fn dump(pids: &[i32]) -> Result<Image> {
    let mut tables = Tables::new(pids.len() as u32);
    let mut dumper = FileDumper::new(pids);
    for &pid in pids {
        let pidfd = pidfd::open(pid)?;
        dumper.process(pid, pid, pidfd.as_fd(), &mut tables, &mut NoSockets)?;
    }
    let dumped = dumper.finish(&mut tables, &mut NoSockets)?;
    let manifest = Manifest {
        format: FORMAT_NAME.to_owned(),
        version: FORMAT_VERSION,
        origin: Origin {
            realtime_ns: now(nix::time::ClockId::CLOCK_REALTIME),
            monotonic_ns: now(nix::time::ClockId::CLOCK_MONOTONIC),
            ..Origin::default()
        },
        processes: pids
            .iter()
            .map(|&pid| process(pid, dumped.fds[&pid].clone(), &dumped))
            .collect(),
        descriptions: dumped.descriptions,
        sockets: Vec::new(),
        files: tables.files,
        shared_memory: tables.shared_memory,
        pvm: None,
    };
    let mut contents = Vec::new();
    for mut content in tables.contents {
        let mut bytes = Vec::new();
        content.file.read_to_end(&mut bytes)?;
        contents.push((content.memory, bytes));
    }
    Ok(Image {
        manifest: serde_json::from_str(&serde_json::to_string(&manifest)?)?,
        contents,
        tables: dumped.fds,
    })
}

fn now(clock: nix::time::ClockId) -> i128 {
    let t = nix::time::clock_gettime(clock).unwrap();
    i128::from(t.tv_sec()) * 1_000_000_000 + i128::from(t.tv_nsec())
}

/// A process of which only descriptors and locks matter here.
fn process(
    pid: i32,
    fds: Vec<mistctl::image::Fd>,
    dumped: &mistctl::dump::files::Dumped,
) -> mistctl::image::Process {
    mistctl::image::Process {
        pid,
        ppid: 1,
        pgid: pid,
        sid: pid,
        state: mistctl::image::process::State::Running,
        comm: "test".to_owned(),
        exit_signal: 17,
        threads: Vec::new(),
        space: 0,
        vmas: Vec::new(),
        mm: Default::default(),
        exe: 0,
        cwd: 0,
        root: 0,
        fds,
        locks: dumped.locks.get(&pid).cloned().unwrap_or_default(),
        sigactions: Vec::new(),
        pending: Vec::new(),
        itimers: Vec::new(),
        posix_timers: Vec::new(),
        limits: Vec::new(),
        umask: 0o22,
        personality: 0,
        oom_score_adj: 0,
        dumpable: 1,
        child_subreaper: false,
        thp_disable: false,
        mdwe: 0,
        mce_kill: None,
        notes: Vec::new(),
        ended_leader: None,
    }
}

impl Image {
    fn id(&self, pid: i32, fd: &impl AsRawFd) -> u32 {
        let fd = fd.as_raw_fd();
        self.tables[&pid]
            .iter()
            .find(|f| f.fd == fd)
            .unwrap_or_else(|| panic!("fd {fd} of {pid} was not captured"))
            .description
    }

    fn kind(&self, pid: i32, fd: &impl AsRawFd) -> &Kind {
        &self.manifest.descriptions[self.id(pid, fd) as usize].kind
    }

    fn build(&self) -> Result<Built> {
        let mut objects = Vec::new();
        for memory in &self.manifest.shared_memory {
            let fd = memfd::create(memory, &mut Vec::new())?;
            objects.push(fd);
        }
        for (memory, bytes) in &self.contents {
            File::from(objects[*memory as usize].try_clone()?).write_all(bytes)?;
        }
        for (memory, fd) in self.manifest.shared_memory.iter().zip(&objects) {
            memfd::finish(memory, fd.as_fd())?;
        }
        let surroundings = Surroundings {
            floor: 400,
            detached: true,
            same_clocks: true,
            namespace: None,
        };
        build(
            &self.manifest,
            surroundings,
            Default::default(),
            &mut |_| bail!("no sockets here"),
            &mut |memory| Ok(objects[memory as usize].as_fd()),
        )
    }
}

/// What became of descriptor `fd` of process `pid`.
fn rebuilt(image: &Image, built: &Built, pid: i32, fd: &impl AsRawFd) -> File {
    let fd = &built.fds[&image.id(pid, fd)];
    assert!(fd.as_raw_fd() >= 400);
    File::from(fd.try_clone().unwrap())
}

fn flags(fd: &impl AsFd) -> i32 {
    fds::flags(fd.as_fd()).unwrap()
}

#[test]
fn a_regular_file_keeps_position_and_flags() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "0123456789").unwrap();
    let mut read = File::open(&path).unwrap();
    read.seek(std::io::SeekFrom::Start(4)).unwrap();
    let append = File::options().append(true).open(&path).unwrap();
    let target = Sleeper::with(&[read.as_fd(), append.as_fd()]);

    let image = dump(&[target.pid()]).unwrap();
    let built = image.build().unwrap();

    let mut again = rebuilt(&image, &built, target.pid(), &read);
    let mut rest = String::new();
    again.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "456789");
    // The original's position is its own.
    assert_eq!(read.stream_position().unwrap(), 4);
    let append = rebuilt(&image, &built, target.pid(), &append);
    assert_eq!(
        flags(&append) & (libc::O_ACCMODE | libc::O_APPEND),
        libc::O_WRONLY | libc::O_APPEND
    );
}

#[test]
fn a_file_that_shrank_is_an_error_that_names_it() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "0123456789").unwrap();
    let file = File::open(&path).unwrap();
    let target = Sleeper::with(&[file.as_fd()]);
    let image = dump(&[target.pid()]).unwrap();
    std::fs::write(&path, "0").unwrap();
    let error = format!("{:#}", image.build().unwrap_err());
    assert!(error.contains(path.to_str().unwrap()), "{error}");
    std::fs::remove_file(&path).unwrap();
    assert!(image.build().is_err());
}

#[test]
fn a_file_that_grew_is_cut_back_only_when_asked_for() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut file = File::create(&path).unwrap();
    file.write_all(b"before").unwrap();
    let target = Sleeper::with(&[file.as_fd()]);
    let image = dump(&[target.pid()]).unwrap();
    file.write_all(b" and after").unwrap();
    let built = image.build().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"before and after");
    assert!(built.warnings[0].contains("grown"), "{:?}", built.warnings);
    mistctl::restore::files::cut_back(&image.manifest).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"before");
}

#[test]
fn a_file_whose_name_was_taken_by_another_keeps_its_own_content() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "old").unwrap();
    let file = File::open(&path).unwrap();
    std::fs::hard_link(&path, dir.path().join("elsewhere")).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "new").unwrap();
    let target = Sleeper::with(&[file.as_fd()]);
    let image = dump(&[target.pid()]).unwrap();
    let built = image.build().unwrap();
    let mut text = String::new();
    rebuilt(&image, &built, target.pid(), &file)
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "old");
}

#[test]
fn a_message_queue_is_opened_again_or_made_anew() {
    let _turn = turn();
    let name = std::ffi::CString::new(format!("mist-test-{}", std::process::id())).unwrap();
    let attributes = fds::QueueAttributes {
        max_messages: 3,
        message_size: 77,
        messages: 0,
    };
    let made = fds::open_message_queue(&name, libc::O_RDWR, Some((0o600, attributes)));
    let Ok(queue) = made else {
        println!("SKIPPED: no POSIX message queues here");
        return;
    };
    let target = Sleeper::with(&[queue.as_fd()]);
    let dumped = dump(&[target.pid()]);
    fds::unlink_message_queue(&name).unwrap();
    let image = dumped.unwrap();
    let Kind::MessageQueue(kind) = image.kind(target.pid(), &queue) else {
        panic!("{:?}", image.kind(target.pid(), &queue))
    };
    assert_eq!((kind.max_messages, kind.message_size), (3, 77));
    let built = image.build().unwrap();
    fds::unlink_message_queue(&name).unwrap();
    let again = rebuilt(&image, &built, target.pid(), &queue);
    assert_eq!(fds::message_queue(again.as_fd()).unwrap(), attributes);
}

#[test]
fn dup_and_fork_share_a_description_and_two_opens_do_not() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "0123456789").unwrap();
    let a = File::open(&path).unwrap();
    let dup = a.try_clone().unwrap();
    let other = File::open(&path).unwrap();
    let all = [a.as_fd(), dup.as_fd(), other.as_fd()];
    let (one, two) = (Sleeper::with(&all), Sleeper::with(&all));

    let image = dump(&[one.pid(), two.pid()]).unwrap();
    assert_eq!(image.id(one.pid(), &a), image.id(one.pid(), &dup));
    assert_eq!(image.id(one.pid(), &a), image.id(two.pid(), &a));
    assert_ne!(image.id(one.pid(), &a), image.id(one.pid(), &other));
}

#[test]
fn many_descriptions_of_one_inode_are_told_apart() {
    let _turn = turn();
    let open: Vec<File> = (0..150).map(|_| File::open("/dev/null").unwrap()).collect();
    let fds: Vec<_> = open.iter().map(|f| f.as_fd()).collect();
    let target = Sleeper::with(&fds);
    let image = dump(&[target.pid()]).unwrap();
    let mut ids: Vec<u32> = open.iter().map(|f| image.id(target.pid(), f)).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 150);
}

#[test]
fn directories_devices_and_path_descriptors_come_back() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let directory = File::open(dir.path()).unwrap();
    let zero = File::open("/dev/zero").unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    use std::os::unix::fs::OpenOptionsExt;
    let path = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(&link)
        .unwrap();
    let target = Sleeper::with(&[directory.as_fd(), zero.as_fd(), path.as_fd()]);

    let image = dump(&[target.pid()]).unwrap();
    let built = image.build().unwrap();
    let again = rebuilt(&image, &built, target.pid(), &directory);
    assert!(again.metadata().unwrap().is_dir());
    let mut byte = [1];
    let mut again = rebuilt(&image, &built, target.pid(), &zero);
    again.read_exact(&mut byte).unwrap();
    assert_eq!(byte, [0]);
    let again = rebuilt(&image, &built, target.pid(), &path);
    assert!(flags(&again) & libc::O_PATH != 0);
    assert!(again.metadata().unwrap().is_symlink());
}

#[test]
fn a_deleted_file_brings_its_content() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gone");
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    file.write_all(b"hello, world").unwrap();
    file.seek(std::io::SeekFrom::Start(7)).unwrap();
    std::fs::remove_file(&path).unwrap();
    let target = Sleeper::with(&[file.as_fd()]);

    let image = dump(&[target.pid()]).unwrap();
    let built = image.build().unwrap();
    let mut rest = String::new();
    let mut again = rebuilt(&image, &built, target.pid(), &file);
    again.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "world");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    assert_eq!(file.stream_position().unwrap(), 7);
}

#[test]
fn a_memfd_keeps_content_and_seals() {
    let _turn = turn();
    let flags = nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING;
    let fd = nix::sys::memfd::memfd_create(c"lane", flags).unwrap();
    let mut file = File::from(fd);
    file.write_all(b"sealed").unwrap();
    fds::add_seals(file.as_fd(), libc::F_SEAL_WRITE | libc::F_SEAL_GROW).unwrap();
    let target = Sleeper::with(&[file.as_fd()]);

    let image = dump(&[target.pid()]).unwrap();
    let built = image.build().unwrap();
    let mut again = rebuilt(&image, &built, target.pid(), &file);
    again.rewind().unwrap();
    let mut text = String::new();
    again.read_to_string(&mut text).unwrap();
    assert_eq!(text, "sealed");
    assert_eq!(
        fds::seals(again.as_fd()).unwrap(),
        libc::F_SEAL_WRITE | libc::F_SEAL_GROW
    );
}

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

#[test]
fn counters_come_back() {
    let _turn = turn();
    use nix::sys::eventfd::{EfdFlags, EventFd};
    let event = EventFd::from_value_and_flags(5, EfdFlags::EFD_SEMAPHORE).unwrap();
    let target = Sleeper::with(&[event.as_fd()]);
    let image = dump(&[target.pid()]).unwrap();
    let built = image.build().unwrap();
    let mut again = rebuilt(&image, &built, target.pid(), &event);
    let mut count = [0; 8];
    for _ in 0..5 {
        again.read_exact(&mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1);
    }
    assert_eq!(flags(&again) & libc::O_NONBLOCK, 0);
}

#[test]
fn timers_wait_for_the_release_and_keep_their_ticks() {
    let _turn = turn();
    let idle = fds::timerfd(libc::CLOCK_MONOTONIC).unwrap();
    let armed = fds::timerfd(libc::CLOCK_MONOTONIC).unwrap();
    fds::timerfd_settime(armed.as_fd(), 0, 3_000_000_000_000, 7_000_000_000).unwrap();
    fds::timerfd_set_ticks(armed.as_fd(), 42).unwrap();
    let target = Sleeper::with(&[idle.as_fd(), armed.as_fd()]);
    let image = dump(&[target.pid()]).unwrap();
    let mut built = image.build().unwrap();
    let mut again = rebuilt(&image, &built, target.pid(), &armed);
    let mut ticks = [0; 8];
    assert!(
        again.read(&mut ticks).is_err(),
        "it ticked before the release"
    );
    built.release().unwrap();
    again.read_exact(&mut ticks).unwrap();
    assert_eq!(u64::from_ne_bytes(ticks), 42);
    drop(target);
    let target = Sleeper::with(&[again.as_fd()]);
    let second = dump(&[target.pid()]).unwrap();
    let Kind::TimerFd(timer) = second.kind(target.pid(), &again) else {
        panic!()
    };
    assert_eq!(timer.interval_ns, 7_000_000_000);
    assert!(timer.left_ns > 2_900_000_000_000 && timer.left_ns <= 3_000_000_000_000);
}

#[test]
fn a_signalfd_keeps_its_mask() {
    let _turn = turn();
    let fd = fds::signalfd(1 << 9 | 1 << 11).unwrap();
    let target = Sleeper::with(&[fd.as_fd()]);
    let image = dump(&[target.pid()]).unwrap();
    let built = image.build().unwrap();
    let again = rebuilt(&image, &built, target.pid(), &fd);
    let info = mistctl::dump::files::FdInfo::read("self", again.as_raw_fd()).unwrap();
    assert_eq!(info.hex("sigmask").unwrap(), 1 << 9 | 1 << 11);
}

#[test]
fn flock_and_ofd_locks_are_taken_again() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "0123456789").unwrap();
    let open = || File::options().read(true).write(true).open(&path).unwrap();
    let (flocked, ofd) = (open(), open());
    fds::flock(flocked.as_fd(), true).unwrap();
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: 0,
        l_start: 2,
        l_len: 5,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&ofd, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    let target = Sleeper::with(&[flocked.as_fd(), ofd.as_fd()]);
    let image = dump(&[target.pid()]).unwrap();
    let pid = target.pid();
    let (a, b) = (flocked.as_raw_fd(), ofd.as_raw_fd());
    // The original still holds them.
    let error = format!("{:#}", image.build().unwrap_err());
    assert!(error.contains("lock"), "{error}");
    drop((target, flocked, ofd));
    let built = image.build().unwrap();
    let other = open();
    assert!(fds::flock(other.as_fd(), false).is_err());
    assert!(nix::fcntl::fcntl(&other, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).is_err());
    let locks = &image.manifest.descriptions[image.id(pid, &b) as usize].locks;
    assert_eq!((locks[0].start, locks[0].len), (2, 5));
    assert!(locks[0].class == LockClass::Ofd && built.fds.contains_key(&image.id(pid, &a)));
}

#[test]
fn record_locks_are_listed_with_their_process() {
    let _turn = turn();
    let file = tempfile::tempfile().unwrap();
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: 0,
        l_start: 10,
        l_len: 1,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETLK(&lock)).unwrap();
    // This process itself: locks of this kind are not inherited.
    let me = std::process::id() as i32;
    let info = mistctl::dump::files::FdInfo::read(&me.to_string(), file.as_raw_fd()).unwrap();
    assert_eq!(info.locks[0].class, LockClass::Posix);
    assert_eq!((info.locks[0].start, info.locks[0].len), (10, 1));
}

#[test]
fn a_pidfd_of_the_dead_is_dead() {
    let _turn = turn();
    let dead = pidfd::of_dead_process().unwrap();
    let target = Sleeper::with(&[dead.as_fd()]);
    let image = dump(&[target.pid()]).unwrap();
    assert_eq!(*image.kind(target.pid(), &dead), Kind::PidFd { pid: -1 });
    let built = image.build().unwrap();
    let again = rebuilt(&image, &built, target.pid(), &dead);
    assert!(pidfd::send_signal(again.as_fd(), 0).is_err());
}

#[test]
fn an_io_uring_is_refused() {
    let _turn = turn();
    let Ok(uring) = fds::io_uring() else {
        println!("SKIPPED: io_uring is not allowed here");
        return;
    };
    let target = Sleeper::with(&[uring.as_fd()]);
    let Err(error) = dump(&[target.pid()]) else {
        panic!("not refused")
    };
    assert!(format!("{error:#}").contains("io_uring"), "{error:#}");
}

/// Descriptor number, events and data of what an epoll instance watches.
fn watched(epoll: &impl AsRawFd) -> Vec<(i32, u32, u64)> {
    let info = mistctl::dump::files::FdInfo::read("self", epoll.as_raw_fd()).unwrap();
    let mut entries: Vec<_> = info
        .lines
        .iter()
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

#[test]
fn kcmp_gives_an_order() {
    let me = std::process::id() as i32;
    let (a, b): (OwnedFd, OwnedFd) = (
        File::open("/dev/null").unwrap().into(),
        File::open("/dev/null").unwrap().into(),
    );
    let (x, y) = (a.as_raw_fd(), b.as_raw_fd());
    let order = kcmp::files(me, x, me, y).unwrap();
    assert_ne!(order, std::cmp::Ordering::Equal);
    assert_eq!(kcmp::files(me, y, me, x).unwrap(), order.reverse());
}
