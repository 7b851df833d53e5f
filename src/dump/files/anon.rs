//! Descriptors without a name: eventfd, signalfd, timerfd, pidfd, and those that cannot be carried.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result};

use super::{FdInfo, Seen};
use crate::dump::tables::Tables;
use crate::error::Failure;
use crate::image::files::{Kind, TimerFd};
use crate::kernel::fds;

pub(super) fn kind(seen: &Seen<'_>, pids: &BTreeSet<i32>, tables: &mut Tables) -> Result<Kind> {
    let link = seen.place.link.as_str();
    let name = link
        .strip_prefix("anon_inode:")
        .map_or(link, |n| n.trim_matches(['[', ']']));
    match name {
        "eventfd" => event(seen),
        "signalfd" => signal(seen),
        "timerfd" => timer(seen),
        // Entries are added when all descriptions are known.
        "eventpoll" => Ok(Kind::Epoll {
            entries: Vec::new(),
        }),
        "inotify" => super::inotify::kind(seen, tables),
        _ if seen.info.text("Pid").is_ok() => pid(seen, pids),
        _ => Err(refused(seen, name)),
    }
    .map_err(|e| match Failure::of(&e) {
        // It says where.
        Failure::Refused => e,
        _ => e.context(seen.place.to_string()),
    })
}

fn event(seen: &Seen<'_>) -> Result<Kind> {
    Ok(Kind::EventFd {
        count: seen.info.hex("eventfd-count")?,
        // Absent before 6.5, where it cannot be known.
        semaphore: seen.info.text("eventfd-semaphore").is_ok_and(|v| v == "1"),
    })
}

fn signal(seen: &Seen<'_>) -> Result<Kind> {
    Ok(Kind::SignalFd {
        mask: seen.info.hex("sigmask")?,
    })
}

fn timer(seen: &Seen<'_>) -> Result<Kind> {
    // Periods that have passed are only counted when somebody asks for the time left.
    fds::timerfd_left(seen.own.as_fd()).context("timerfd_gettime")?;
    let info = &FdInfo::read("self", seen.own.as_raw_fd())?;
    Ok(Kind::TimerFd(TimerFd {
        clock: info.decimal("clockid")?,
        settime_flags: i32::from_str_radix(info.text("settime flags")?, 8)
            .context("settime flags")?,
        left_ns: info.timespec("it_value")?,
        interval_ns: info.timespec("it_interval")?,
        ticks: info.decimal("ticks")?,
    }))
}

fn pid(seen: &Seen<'_>, pids: &BTreeSet<i32>) -> Result<Kind> {
    let pid: i32 = seen.info.decimal("Pid")?;
    if pid != -1 && !pids.contains(&pid) {
        return Err(seen.place.refuse(
            &format!("it is a pidfd of process {pid}, which is outside the dump"),
            "dump that process too (--tree), or close it",
        ));
    }
    Ok(Kind::PidFd { pid })
}

fn refused(seen: &Seen<'_>, name: &str) -> anyhow::Error {
    let what = match name {
        "io_uring" => "an io_uring, whose requests are the kernel's alone",
        "perf_event" => "a performance counter (perf_event_open)",
        "bpf-map" | "bpf-prog" | "bpf_link" | "btf" => "a BPF object",
        "userfaultfd" => "a userfaultfd, whose faults are answered by this process",
        "fanotify" => "a fanotify group",
        "seccomp notify" => "a seccomp listener",
        _ if name.starts_with("kvm") => "a virtual machine",
        _ if name.contains(":[") => "a namespace",
        _ => "of a kind that cannot be carried",
    };
    seen.place
        .refuse(&format!("it is {what}"), "close it before the dump")
}
