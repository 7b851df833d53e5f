//! PVM: the tid table of a host, and what tasks under the shim publish.

pub mod block;
pub mod shimabi;
pub mod table;
