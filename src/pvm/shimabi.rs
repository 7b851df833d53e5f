//! The layouts shared with the shim; see the crate `pvm-abi`.

pub use pvm_abi::{
    BLOCK_SYMBOL, CTX_TC, CTX_TM, NOOP_MAGIC, NOOP_MARKER, TID_GROUP, TID_HOST, TID_PVMD, TID_TASK,
    WAIT_ID_IGNORE, WAIT_ID_LATE, block, is_task, place, table,
};
