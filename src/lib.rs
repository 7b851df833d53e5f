//! Checkpoint, restore and migrate Linux processes.
