//! Keeps PVM task ids valid when tasks move.
