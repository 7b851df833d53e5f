//! Descriptors, captured from a living process and rebuilt: a child inherits what a test sets up and sits there;
//! the test reads it from outside, sends it through the image's schema, builds it anew and compares.

#[path = "files/pipes.rs"]
mod pipes;
#[path = "files/watching.rs"]
mod watching;

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};

use anyhow::{Result, bail};
use mistctl::dump::files::{FileDumper, Order, Sockets};
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
    let mut dumper = FileDumper::new(pids, Order::look(pids));
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
        thp_advised: false,
        coredump_filter: None,
        mdwe: 0,
        mce_kill: None,
        membarrier: 0,
        merge_memory: false,
        lock_future: 0,
        semaphores: Vec::new(),
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
