//! PVM: the tid table of a host, and what tasks under the shim publish.

pub mod shimabi;
pub mod table;
