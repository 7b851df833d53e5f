//! An editor on a terminal: saved in the middle of an editing session, and restored on the terminal
//! of whoever restores it, from which it is typed at as before.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::pty::{Winsize, openpty};
use nix::sys::termios::{LocalFlags, tcgetattr};

use crate::common::{ending, wait_for};
use crate::steps::{Test, go_on_dumps};
use crate::{LIMIT, Mode};

pub const NAME: &str = "vi";
pub const COMMAND: &[&str] = &["/usr/bin/vi", "-u", "NONE", "-n", "text"];

struct Terminal {
    master: File,
    slave: OwnedFd,
}

impl Terminal {
    fn new() -> Result<Self> {
        let size = Winsize {
            ws_row: 24,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(Some(&size), None).context("openpty")?;
        // Not for the program: it would be saved with the whole terminal.
        for fd in [&pty.master, &pty.slave] {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        }
        let master = File::from(pty.master);
        let mut screen = master.try_clone()?;
        // What it shows is thrown away; its end is that of this process.
        thread::spawn(move || {
            let mut shown = [0; 4096];
            while screen.read(&mut shown).is_ok_and(|n| n > 0) {}
        });
        Ok(Self {
            master,
            slave: pty.slave,
        })
    }

    /// Starts a command as a login would: it leads the session of this terminal. Ready for keys
    /// when it has turned off the editing of lines.
    fn run(&self, command: &Command) -> Result<Child> {
        // setsid of util-linux is no group leader here, so it execs in place.
        let mut outer = Command::new("/usr/bin/setsid");
        outer.arg("-c").arg(command.get_program());
        outer.args(command.get_args()).env_clear();
        for (key, value) in command.get_envs() {
            outer.env(key, value.unwrap_or_default());
        }
        outer.env("TERM", "xterm");
        if let Some(dir) = command.get_current_dir() {
            outer.current_dir(dir);
        }
        let mut child = outer
            .stdin(self.slave.try_clone()?)
            .stdout(self.slave.try_clone()?)
            .stderr(self.slave.try_clone()?)
            .spawn()
            .context("cannot start setsid")?;
        wait_for("a program on the terminal", LIMIT, || {
            if let Some(status) = child.try_wait()? {
                bail!("it ended with {}", ending(status));
            }
            let modes = tcgetattr(&self.master)?.local_flags;
            Ok((!modes.contains(LocalFlags::ICANON)).then_some(()))
        })?;
        Ok(child)
    }

    /// Whether it is the terminal of the session that this process leads, which has the keyboard.
    fn belongs_to(&self, pid: u32) -> Result<()> {
        let stat = procfs::process::Process::new(i32::try_from(pid)?)?.stat()?;
        let device = nix::sys::stat::fstat(&self.slave)?.st_rdev;
        ensure!(
            stat.tty_nr as u64 == device && stat.session == stat.pid && stat.tpgid == stat.pgrp,
            "the terminal {device:#x} is not that of session {}: {stat:?}",
            stat.pid
        );
        Ok(())
    }

    /// Adds a line to the text and writes it.
    fn add(&mut self, line: &str, text: &Path) -> Result<()> {
        self.master
            .write_all(format!("Go{line}\x1b:w\r").as_bytes())?;
        wait_for("what was typed to be in the file", LIMIT, || {
            let now = fs::read_to_string(text).unwrap_or_default();
            Ok(now.ends_with(&format!("{line}\n")).then_some(()))
        })
    }
}

pub fn carry_out(test: &mut Test) -> Result<()> {
    let cwd = test.make_cwd()?;
    let text = cwd.join("text");
    let mut wanted = vec![String::new()];
    let mut terminal = Terminal::new()?;
    let command = test.command(&cwd);
    let child = terminal.run(&command)?;
    test.adopt(child);
    let mut type_line = |terminal: &mut Terminal| {
        let line = format!("line {} of them", wanted.len());
        wanted.push(line.clone());
        terminal.add(&line, &text)
    };
    type_line(&mut terminal)?;
    let mut last = None;
    match test.mode {
        Mode::GoOn => {
            for _ in 0..go_on_dumps() {
                test.dump(false)?;
                type_line(&mut terminal)?;
            }
        }
        mode => {
            for _ in 0..if mode == Mode::Twice { 2 } else { 1 } {
                // What is restored already ends together with its mistctl.
                if let Some(restore) = last.take() {
                    test.follow(restore);
                }
                test.dump(true)?;
                terminal = Terminal::new()?;
                last = Some(terminal.run(&test.restoring())?);
                type_line(&mut terminal)?;
                terminal.belongs_to(test.pid())?;
            }
        }
    }
    // All that it remembers: undone and done again.
    terminal
        .master
        .write_all(b":undo 0\r:redo\r:later 999\r:wq\r")?;
    test.ended(last)?;
    let got = fs::read_to_string(&text)?;
    let wanted = wanted.join("\n") + "\n";
    ensure!(got == wanted, "the text, wanted {wanted:?}, got {got:?}");
    Ok(())
}
