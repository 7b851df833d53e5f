//! `mistctl ps`: the tasks of the virtual machine.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use mistctl::error::Failure;
use mistctl::pvm::agent::control::{Answer, Request};
use mistctl::pvm::agent::{self, Caller};
use mistctl::pvm::away::Note;
use mistctl::pvm::client::{Client, Pvmd};
use mistctl::pvm::local::{self, Doing, Seen, Shim};
use mistctl::pvm::shimabi::place;
use mistctl::pvm::shimabi::table::{Mapped, State};
use mistctl::pvm::tid::Tid;
use mistctl::pvm::virtual_machine::{Host, Task};
use serde::Serialize;

use super::out;

/// List the tasks of the PVM virtual machine
///
/// Every task on every host: its virtual tid (the one it was born with, which it and its partners go on using), the
/// tid it has now, where it is, and what can be said of it. MEMORY is what is resident. SHIM is "yes" for a task that
/// can be moved; "no" for one that was started without the shim (use `mistctl pvm start`, or `mistctl exec`); "static"
/// for a program into which libpvm was linked (link it with the shared libpvm3 instead); "unknown" for a libpvm that
/// the shim does not know. STATE is receiving, sending, held (it waits to send to a task that moves), moving, running,
/// sleeping, waiting, stopped, traced, zombie, or away (saved by `dump --kill --away`, and not restored yet; a line below
/// says where its image is). FOR is how long the task has been where it is, or away.
///
/// What other hosts see of their tasks their agents tell, which are started for it when they are not there. "-" is what
/// is not known. A host that does not answer is named ("silent" in JSON).
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print one JSON object; "since" is in seconds since 1970, "memory" in bytes
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Serialize)]
struct Listing {
    hosts: Vec<Host>,
    /// Those that did not answer: what is on them is not known.
    silent: Vec<String>,
    tasks: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    virtual_tid: Tid,
    /// None of one that is away; so are host and pid.
    tid: Option<Tid>,
    parent: Option<Tid>,
    host: Option<String>,
    pid: Option<i32>,
    program: Option<String>,
    memory: Option<u64>,
    shim: Option<Shim>,
    state: Option<Doing>,
    since: Option<u64>,
    /// The program asked for PvmRouteDirect.
    direct_route: Option<bool>,
    /// It was let have direct routes.
    direct_allowed: Option<bool>,
    /// Of one that is away: the host on which it was saved, and its image there.
    saved_on: Option<String>,
    image: Option<PathBuf>,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let listing = list()?;
    if args.json {
        out::object(&listing)?;
    } else {
        out::print(&text(&listing, SystemTime::now()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn list() -> anyhow::Result<Listing> {
    let (pvmd, mut client) = enrol()?;
    let own = client.tid();
    let hosts = client.hosts()?;
    let (mut tasks, silent) = answered(&mut client, &hosts)?;
    let mut elsewhere = HashMap::new();
    // The pvmds may not let more of our questions through before they have given that host up.
    if silent.is_empty() {
        elsewhere = seen_elsewhere(&mut client, &hosts);
        tasks = client.tasks(Tid::NONE)?;
    }
    // One that is just enrolling has no tid yet.
    tasks.retain(|task| task.tid.is_task() && task.tid != own);
    let table = table_of(&pvmd)?;
    let mut rows = Vec::new();
    for entry in table.iter().flat_map(|table| table.entries()) {
        if entry.is_away() && tasks.iter().all(|task| task.tid.0 != entry.r) {
            // Without it there is less to tell.
            let note = Note::of(&mut client, Tid(entry.v)).unwrap_or(None);
            rows.push(away(Tid(entry.v), note));
        }
    }
    client.exit()?;
    for task in &tasks {
        let seen = match task.host.host() == own.host() {
            true => local::seen(task)?,
            false => elsewhere.get(&task.tid.0).cloned(),
        };
        rows.extend(row(task, &hosts, seen.as_ref(), table.as_ref()));
    }
    rows.sort_by_key(|row| row.virtual_tid);
    Ok(Listing {
        hosts,
        silent,
        tasks: rows,
    })
}

/// The tasks of all hosts that answer, and the names of the others: the pvmds wait for these for minutes.
fn answered(client: &mut Client, hosts: &[Host]) -> anyhow::Result<(Vec<Task>, Vec<String>)> {
    const PATIENCE: Duration = Duration::from_secs(5);
    let patience = client.set_patience(PATIENCE);
    let (mut tasks, mut silent) = (Vec::new(), Vec::new());
    for host in hosts {
        match client.tasks(host.tid) {
            Ok(there) => tasks.extend(there),
            // Our own pvmd.
            Err(e) if host.tid.host() == client.tid().host() => return Err(e),
            Err(_) => {
                out::note(&format!(
                    "mistctl: {} has not answered within {} s, and its tasks are not known: it is down, or cut off; PVM \
                     gives such a host up after some minutes, and until then may keep others waiting",
                    host.name,
                    PATIENCE.as_secs()
                ));
                silent.push(host.name.clone());
            }
        }
    }
    client.set_patience(patience);
    Ok((tasks, silent))
}

/// What the agents of other hosts see of their tasks, by tid. Where there is none to be had, nothing is.
fn seen_elsewhere(client: &mut Client, hosts: &[Host]) -> HashMap<u32, Seen> {
    const PATIENCE: Duration = Duration::from_secs(10);
    let here = client.tid().host();
    let mut found = HashMap::new();
    if hosts.len() < 2 {
        return found;
    }
    let agents = match agent::ensure(client, &out::waits) {
        Ok(agents) => agents,
        Err(e) => {
            out::note(&format!(
                "mistctl: what other hosts see is not known: {e:#}"
            ));
            return found;
        }
    };
    for agent in agents.iter().filter(|agent| Tid(agent.host) != here) {
        match Caller::new(client).ask(Tid(agent.tid), Request::Status, PATIENCE) {
            Ok(Answer::Status { tasks }) => found.extend(tasks.into_iter().map(|t| (t.tid, t))),
            Ok(_) => {}
            Err(e) => out::note(&format!("mistctl: {}: {e:#}", agent.name)),
        }
    }
    found
}

/// Joins the virtual machine that runs here.
pub fn enrol() -> anyhow::Result<(Pvmd, Client)> {
    let Some(pvmd) = Pvmd::find()? else {
        return Err(Failure::NoSuchProcess.because(format!(
            "no virtual machine is running here: {} is missing; `mistctl pvm start` starts one",
            place::own_address_file().display()
        )));
    };
    let client = Client::enrol(&pvmd, 0)?;
    Ok((pvmd, client))
}

/// The tid table, to be looked at only; none while no task with the shim has made it.
pub fn table_of(pvmd: &Pvmd) -> anyhow::Result<Option<Mapped>> {
    let path = pvmd.table_path()?;
    if !path.exists() {
        return Ok(None);
    }
    let file = place::open(&path)
        .with_context(|| format!("cannot open the tid table {}", path.display()))?;
    let map = Mapped::new(&file)
        .with_context(|| format!("cannot map the tid table {}", path.display()))?;
    Ok(Some(map))
}

/// What is known of a task that is away.
fn away(v: Tid, note: Option<Note>) -> Row {
    let (program, since, saved_on, image) = match note {
        Some(note) => (
            Some(note.program).filter(|name| !name.is_empty()),
            Some(note.since),
            Some(note.host),
            Some(note.image),
        ),
        None => (None, None, None, None),
    };
    Row {
        virtual_tid: v,
        tid: None,
        parent: None,
        host: None,
        pid: None,
        program,
        memory: None,
        shim: None,
        state: Some(Doing::Away),
        since,
        direct_route: None,
        direct_allowed: None,
        saved_on,
        image,
    }
}

/// What is known of a task; none for those that are mist's own.
fn row(task: &Task, hosts: &[Host], seen: Option<&Seen>, table: Option<&Mapped>) -> Option<Row> {
    let in_table = table.and_then(|table| table.v_of(task.tid.0)).map(Tid);
    let entry = |tid: Tid| table.and_then(|table| table.entry(tid.0));
    let known = entry(in_table.unwrap_or(task.tid));
    let hidden = known.is_some_and(|entry| entry.state == State::Hidden);
    // What is going to be the task, when it has come.
    let lander = in_table.is_some_and(|v| known.map_or(v.0, |entry| entry.r) != task.tid.0);
    if hidden || lander {
        return None;
    }
    let moving = known.is_some_and(|entry| entry.state.is_closed());
    let host = hosts
        .iter()
        .find(|host| host.tid.host() == task.host.host());
    Some(Row {
        virtual_tid: in_table
            .or(seen.and_then(|s| s.virtual_tid.map(Tid)))
            .unwrap_or(task.tid),
        tid: Some(task.tid),
        parent: task.parent.is_task().then_some(task.parent),
        host: Some(host.map_or_else(|| task.host.to_string(), |host| host.name.clone())),
        pid: Some(task.pid),
        program: seen
            .and_then(|s| s.program.clone())
            .or_else(|| Some(task.program.clone()).filter(|name| !name.is_empty())),
        memory: seen.map(|s| s.memory),
        shim: seen.map(|s| s.shim),
        state: if moving {
            Some(Doing::Moving)
        } else {
            seen.map(|s| s.state)
        },
        since: seen.map(|s| s.since),
        direct_route: seen.map(|s| s.direct_route),
        direct_allowed: seen.map(|s| s.direct_allowed),
        saved_on: None,
        image: None,
    })
}

fn text(listing: &Listing, now: SystemTime) -> String {
    let titles = [
        "VTID", "TID", "HOST", "PID", "MEMORY", "SHIM", "STATE", "FOR", "PROGRAM",
    ];
    let mut lines = vec![titles.map(str::to_owned)];
    let now = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let dash = || "-".to_owned();
    for row in &listing.tasks {
        lines.push([
            row.virtual_tid.to_string(),
            row.tid.map_or_else(dash, |tid| tid.to_string()),
            row.host.clone().unwrap_or_else(dash),
            row.pid.map_or_else(dash, |pid| pid.to_string()),
            row.memory.map_or_else(dash, out::bytes),
            row.shim.map_or_else(dash, word),
            row.state.map_or_else(dash, word),
            row.since
                .map_or_else(dash, |since| age(now.saturating_sub(since))),
            row.program.clone().unwrap_or_else(dash),
        ]);
    }
    let widths: Vec<usize> = (0..titles.len())
        .map(|at| {
            let column = lines.iter().filter_map(|line| line.get(at));
            column.map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut t = String::new();
    for line in &lines {
        let cells: Vec<String> = line
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        let _ = writeln!(t, "{}", cells.join("  ").trim_end());
    }
    for row in &listing.tasks {
        let tid = row.virtual_tid;
        if let (Some(image), Some(host)) = (&row.image, &row.saved_on) {
            let image = out::shown(&image.to_string_lossy());
            let _ = writeln!(
                t,
                "{tid}: its partners wait until it is restored (`mistctl restore {image}` on {host})"
            );
        } else if row.state == Some(Doing::Away) {
            let _ = writeln!(t, "{tid}: its partners wait until it is restored");
        }
        if row.direct_allowed == Some(true) {
            let _ = writeln!(
                t,
                "{tid}: has direct routes (MIST_DIRECT_ROUTES=1), and cannot be moved"
            );
        } else if row.direct_route == Some(true) {
            let _ = writeln!(
                t,
                "{tid}: asked for PvmRouteDirect; its messages go through pvmd"
            );
        }
    }
    t
}

/// The word by which scripts know it too.
fn word(value: impl Serialize) -> String {
    serde_json::to_value(value)
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}

/// "41 s", "3 min", "2 h", "5 d": the largest unit that fills.
fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86400 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing() -> Listing {
        let here = Row {
            virtual_tid: Tid(0x80001),
            tid: Some(Tid(0x40003)),
            parent: None,
            host: Some("h0".to_owned()),
            pid: Some(17),
            program: Some("/x/heat".to_owned()),
            memory: Some(3 << 20),
            shim: Some(Shim::Yes),
            state: Some(Doing::Receiving),
            since: Some(100),
            direct_route: Some(true),
            direct_allowed: Some(false),
            saved_on: None,
            image: None,
        };
        let there = Row {
            virtual_tid: Tid(0x80002),
            tid: Some(Tid(0x80002)),
            host: Some("h1".to_owned()),
            pid: Some(18),
            program: None,
            memory: None,
            shim: None,
            state: None,
            since: None,
            direct_route: None,
            direct_allowed: None,
            saved_on: None,
            image: None,
            parent: Some(Tid(0x80001)),
        };
        Listing {
            silent: Vec::new(),
            hosts: Vec::new(),
            tasks: vec![here, there],
        }
    }

    #[test]
    fn what_is_not_known_is_a_dash() {
        let text = text(
            &listing(),
            SystemTime::UNIX_EPOCH + Duration::from_secs(300),
        );
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        let here = "t80001 t40003 h0 17 3.00 MiB yes receiving 3 min /x/heat";
        assert_eq!(lines[1].join(" "), here);
        assert_eq!(lines[2].join(" "), "t80002 t80002 h1 18 - - - - -");
        assert!(text.contains("t80001: asked for PvmRouteDirect"), "{text}");
    }

    #[test]
    fn who_is_away_is_listed_with_the_image() {
        let note = Note {
            program: "/x/heat".to_owned(),
            host: "h1".to_owned(),
            image: "/y/task.img".into(),
            since: 100,
        };
        let mut listing = listing();
        listing.tasks = vec![away(Tid(0x80001), Some(note)), away(Tid(0x80002), None)];
        let text = text(&listing, SystemTime::UNIX_EPOCH + Duration::from_secs(300));
        let words: Vec<&str> = text.split_whitespace().collect();
        let text = words.join(" ");
        assert!(
            text.contains("t80001 - - - - - away 3 min /x/heat"),
            "{text}"
        );
        assert!(text.contains("t80002 - - - - - away - -"), "{text}");
        assert!(
            text.contains("`mistctl restore /y/task.img` on h1"),
            "{text}"
        );
        assert!(text.contains("t80002: its partners wait"), "{text}");
    }

    #[test]
    fn tids_are_written_as_pvm_writes_them_in_json_too() {
        let json = serde_json::to_value(listing()).unwrap();
        assert_eq!(json["tasks"][0]["virtual_tid"], "t80001");
        assert_eq!(json["tasks"][0]["shim"], "yes");
        assert_eq!(json["tasks"][1]["state"], serde_json::Value::Null);
    }
}
