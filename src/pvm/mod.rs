//! PVM: the task-pvmd protocol, the tid table of a host, and what tasks under the shim publish.

pub mod agent;
pub mod asked;
pub mod away;
pub mod block;
pub mod capture;
pub mod client;
pub mod connection;
pub mod contexts;
pub mod daemon;
pub mod dump;
pub mod flush;
pub mod land;
pub mod local;
pub mod mailbox;
pub mod mover;
pub mod quiet;
pub mod restore;
pub mod shimabi;
pub mod spawn;
pub mod stream;
pub mod table;
pub mod tid;
pub mod tids;
mod version;
pub mod virtual_machine;
pub mod wire;
