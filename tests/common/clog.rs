//! What holds a process on its way out, without memory, with its descriptors open.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use memmap2::MmapMut;
use mistctl::kernel::uffd::Uffd;

use crate::common::wait_for;

const LIMIT: Duration = Duration::from_secs(30);

/// A FIFO that nobody can close: whoever writes to it waits for a page meanwhile, with the FIFO's lock.
pub struct Clog {
    fifo: fs::File,
    page: MmapMut,
    missing: Uffd,
}

/// One that is clogged until this is dropped.
pub struct Clogged {
    missing: Option<Uffd>,
    writer: Option<std::thread::JoinHandle<()>>,
}

impl Clog {
    pub fn new(path: &Path) -> Result<Clog> {
        let page = MmapMut::map_anon(4096)?;
        let missing = Uffd::ours()?;
        missing.api(0)?;
        missing.register_missing(page.as_ptr() as u64, 4096)?;
        let fifo = fs::File::options().read(true).write(true).open(path)?;
        Ok(Clog {
            fifo,
            page,
            missing,
        })
    }

    pub fn begin(self) -> Result<Clogged> {
        let (page, mut fifo, missing) = (self.page, self.fifo, self.missing);
        let clogged = Clogged {
            writer: Some(std::thread::spawn(move || drop(fifo.write_all(&page)))),
            missing: Some(missing),
        };
        let writes = || match &clogged.missing {
            Some(missing) => missing.event(),
            None => Ok(None),
        };
        wait_for("somebody to write", LIMIT, writes)?;
        Ok(clogged)
    }
}

impl Drop for Clogged {
    fn drop(&mut self) {
        // Without it the page is there as any other.
        self.missing = None;
        let _ = self.writer.take().map(std::thread::JoinHandle::join);
    }
}
