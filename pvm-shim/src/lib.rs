//! Keeps PVM task ids valid when tasks move.
//!
//! A library for LD_PRELOAD. It stands between a program and libpvm, and between the parts of libpvm:
//! libpvm lives in V space (the tids the program knows), the wire in R space (the tids pvmd gave). See
//! docs/shim.md for the rules and `pvm-abi` for what it shares with mistctl.
//!
//! * [`hot`]: what every message passes.
//! * [`state`]: what the shim knows.
//! * [`real`]: libpvm's own functions and variables.
//! * [`layout`]: libpvm's structures, checked before they are used.
//! * [`inside`]: whether the task is inside libpvm, and as whom.
//! * [`border`]: the functions through which all messages pass, and the gate.
//! * [`routes`]: what old direct routes still hold.
//! * [`notices`]: bodies of pvmd's messages that carry tids; [`hosts`]: those that no pvmd sends.
//! * [`calls`], [`answers`]: the programming interface.
//!
//! The shim starts no thread, takes no signal and keeps errno. It does nothing before the program calls
//! libpvm for the first time, so it is inert in programs that never do, and in pvmd, which calls none of
//! the functions defined here.

mod answers;
mod border;
mod calls;
mod hosts;
mod hot;
mod inside;
mod layout;
mod notices;
mod real;
mod routes;
mod state;
