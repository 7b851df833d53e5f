//! An image against this host: what is different, and what that means for a restore.

use std::fs::{self, File};
use std::path::Path;

use mistctl::image::files::Kind;
use mistctl::image::{FileRef, Manifest, objects};
use mistctl::kernel::probe;
use serde::Serialize;

/// A file whose content is in the image.
#[derive(Debug, Serialize)]
pub struct Carried {
    pub path: String,
    pub bytes: u64,
    pub here: Here,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Here {
    Same,
    Different,
    Missing,
}

#[derive(Debug, Serialize)]
pub struct Difference {
    pub what: String,
    pub so: &'static str,
}

pub fn carried(m: &Manifest) -> Vec<Carried> {
    let mut list: Vec<Carried> = Vec::new();
    for f in &m.files {
        if let Some(object) = &f.object
            && !list.iter().any(|c| c.path == f.path)
        {
            list.push(Carried {
                path: f.path.clone(),
                bytes: f.size,
                here: compare(f, object),
            });
        }
    }
    list
}

/// Content is what counts, not times and inode numbers.
fn compare(f: &FileRef, object: &str) -> Here {
    let Ok(meta) = fs::metadata(&f.path) else {
        return Here::Missing;
    };
    if !meta.is_file() || meta.len() != f.size {
        return Here::Different;
    }
    match File::open(&f.path)
        .map_err(anyhow::Error::from)
        .and_then(|file| objects::hash_of(&file))
    {
        Ok(hash) if hash.to_hex().as_str() == object => Here::Same,
        _ => Here::Different,
    }
}

pub fn differences(m: &Manifest, carried: &[Carried]) -> Vec<Difference> {
    let mut list = Vec::new();
    let mut add = |what: String, so: &'static str| list.push(Difference { what, so });
    let uname = nix::sys::utsname::uname();
    let machine = uname
        .as_ref()
        .map(|u| u.machine().to_string_lossy().into_owned())
        .unwrap_or_default();
    let kernel = uname
        .as_ref()
        .map(|u| u.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    if m.origin.machine != machine {
        add(
            format!("made on {}, this is {machine}", m.origin.machine),
            "it cannot be restored here",
        );
    }
    if m.origin.kernel != kernel {
        add(
            format!("made under Linux {}, this is {kernel}", m.origin.kernel),
            "the vDSO is redirected to this kernel's",
        );
    }
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    if m.origin.boot_id != boot.trim() {
        add(
            "another boot or host".to_owned(),
            "a time namespace keeps CLOCK_MONOTONIC true",
        );
    }
    if let Some(ours) = probe::xfeatures()
        && m.origin.xfeatures & !ours != 0
    {
        add(
            format!(
                "the CPU lacks register sets ({:#x})",
                m.origin.xfeatures & !ours
            ),
            "a program that has used them cannot be restored here",
        );
    }
    for c in carried {
        match c.here {
            Here::Same => {}
            Here::Different => add(
                format!("{} has another content here", c.path),
                "the carried copy is used",
            ),
            Here::Missing => add(
                format!("{} is missing here", c.path),
                "the carried copy is used",
            ),
        }
    }
    for path in opened(m) {
        if !Path::new(&path).exists() {
            add(
                format!("{path} is missing here"),
                "it was open: a restore fails without it",
            );
        }
    }
    for p in &m.processes {
        if let Ok(comm) = fs::read_to_string(format!("/proc/{}/comm", p.pid)) {
            add(
                format!("pid {} is taken, by {}", p.pid, comm.trim_end()),
                if m.processes.len() > 1 {
                    "the processes get a pid namespace of their own"
                } else {
                    "the program gets another pid"
                },
            );
        }
    }
    list
}

/// Files that descriptors refer to by name and that the image does not carry.
fn opened(m: &Manifest) -> Vec<String> {
    let mut paths: Vec<String> = m
        .descriptions
        .iter()
        .filter_map(|d| match &d.kind {
            Kind::Path { file, .. } | Kind::Fifo { file, .. } => m.files.get(*file as usize),
            _ => None,
        })
        .filter(|f| f.object.is_none() && !f.deleted)
        .map(|f| f.path.clone())
        .collect();
    paths.sort();
    paths.dedup();
    paths
}
