//! The lander: what pvmd starts on the host a task comes to, and what becomes the task.

pub mod protocol;
