//! Checkpoint, restore and migrate Linux processes and PVM tasks from outside.
//!
//! One noun, one name, three files: what is stored (`image/files.rs`), how it is read
//! (`dump/files.rs`), how it is rebuilt (`restore/files.rs`). See docs/architecture.md.

pub mod dump;
mod elf;
pub mod error;
pub mod image;
pub mod kernel;
pub mod net;
mod progress;
pub mod pvm;
pub mod restore;
