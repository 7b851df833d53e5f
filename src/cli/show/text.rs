//! The summary of an image, for people.

use std::fmt::Write;

use mistctl::image::process::State;

use super::here::Here;
use super::summary::{ProcessSummary, Summary};
use crate::cli::out::{bytes, count, shown};

pub fn text(s: &Summary) -> String {
    let mut t = String::new();
    let threads: usize = s.processes.iter().map(|p| p.threads.len()).sum();
    let _ = writeln!(
        t,
        "{}: {}, {}, {} of memory stored, {} on disk",
        shown(&s.image.to_string_lossy()),
        count(s.processes.len(), "process"),
        count(threads, "thread"),
        bytes(s.bytes_memory),
        bytes(s.bytes_on_disk),
    );
    let _ = writeln!(
        t,
        "made {} on {} by mistctl {} (Linux {}, {})",
        s.made,
        shown(&s.origin.hostname),
        shown(&s.origin.mistctl),
        shown(&s.origin.kernel),
        shown(&s.origin.machine),
    );
    if let Some(v) = s.virtual_tid {
        let _ = writeln!(t, "PVM task {v}");
    }
    if s.processes.len() > 1 {
        t.push_str("\nProcesses\n");
        for p in &s.processes {
            let _ = writeln!(
                t,
                "  {}{} {}",
                "  ".repeat(depth(s, p)),
                p.pid,
                shown(&p.comm)
            );
        }
    }
    for p in &s.processes {
        process(&mut t, p);
    }
    if !s.shared_memory.is_empty() {
        t.push_str("\nShared memory\n");
        for m in &s.shared_memory {
            let _ = writeln!(
                t,
                "  {}: {}, {} stored",
                shown(&m.what),
                bytes(m.bytes),
                bytes(m.bytes_stored)
            );
        }
    }
    if !s.carried.is_empty() {
        let sum = s.carried.iter().map(|c| c.bytes).sum();
        let _ = writeln!(
            t,
            "\nCarried: {}, {}",
            count(s.carried.len(), "file"),
            bytes(sum)
        );
        for c in &s.carried {
            let here = match c.here {
                Here::Same => "same here",
                Here::Different => "different here",
                Here::Missing => "missing here",
            };
            let _ = writeln!(
                t,
                "  {:14}  {:>9}  {}",
                here,
                bytes(c.bytes),
                shown(&c.path)
            );
        }
    }
    t.push_str("\nOn this host\n");
    if s.here.is_empty() {
        t.push_str("  nothing is different\n");
    }
    for d in &s.here {
        let _ = writeln!(t, "  {}: {}", shown(&d.what), d.so);
    }
    t
}

/// How many ancestors of a process are in the image. Bounded: a hostile image may have a circle of parents.
fn depth(s: &Summary, p: &ProcessSummary) -> usize {
    let mut depth = 0;
    let mut parent = p.ppid;
    while depth < s.processes.len().min(40) {
        match s.processes.iter().find(|q| q.pid == parent) {
            Some(q) => parent = q.ppid,
            None => break,
        }
        depth += 1;
    }
    depth
}

fn process(t: &mut String, p: &ProcessSummary) {
    let _ = writeln!(t, "\nProcess {} ({})", p.pid, shown(&p.comm));
    if let State::Zombie { status } = p.state {
        let _ = writeln!(t, "  ended, wait status {status:#x}, and not waited for");
        return;
    }
    if let State::Stopped { signal } = p.state {
        let _ = writeln!(t, "  stopped by signal {signal}");
    }
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(t, "  {name:12} {}", shown(value));
    };
    line("program", &p.exe);
    if !p.command.is_empty() {
        line("command", &p.command.join(" "));
    }
    line("directory", &p.cwd);
    line("user", &p.uid.to_string());
    if p.main_thread_ended {
        line("main thread", "has ended; the others go on");
    }
    const MOST: usize = 20;
    for (i, thread) in p.threads.iter().take(MOST).enumerate() {
        let name = if i == 0 { "threads" } else { "" };
        line(
            name,
            &format!("{} {}, {}", thread.tid, thread.comm, thread.doing),
        );
    }
    if p.threads.len() > MOST {
        line("", &format!("and {} more", p.threads.len() - MOST));
    }
    for (i, k) in p.memory.iter().enumerate() {
        let name = if i == 0 { "memory" } else { "" };
        let sizes = format!(
            "{:>9} mapped, {:>9} stored",
            bytes(k.bytes_mapped),
            bytes(k.bytes_stored)
        );
        line(
            name,
            &format!("{sizes}  {} ({})", k.kind, count(k.mappings, "mapping")),
        );
    }
    for (i, d) in p.descriptors.iter().enumerate() {
        line(
            if i == 0 { "descriptors" } else { "" },
            &format!("{:>3} {}", d.fd, d.what),
        );
    }
    for note in &p.notes {
        line("note", note);
    }
}
