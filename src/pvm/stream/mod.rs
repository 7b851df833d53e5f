//! The stream over which a task's memory and state go to another host: TCP, encrypted, both sides authenticated
//! by a key they share ([`Key`]).
//!
//! The handshake is Noise's NNpsk0 (ephemeral Curve25519 keys, bound to the shared key from the first byte on):
//! a connection that does not know the key is dropped without an answer. What follows are Noise transport
//! messages of at most 64 KiB, each behind its length (2 bytes, big-endian), numbered and sealed with
//! AES-256-GCM: none can be changed, left out, repeated or put elsewhere. In them stand frames:
//!
//! ```text
//! kind (1 byte), packing (1), bytes of the head (1), 1 unused, bytes of the body (4), bytes it unpacks to (4), big-endian;
//! head; body
//! ```
//! A frame begins with a message, so that its length is known when that has been opened. A short body is in it, too. A long
//! one comes in messages of its own, each but the last of as many bytes as agreed: it can be read from the socket, and
//! opened, in the place it is for.

mod cipher;
mod content;
mod frames;
mod header;
mod input;
mod key;
mod rate;

pub use content::{ImageSender, SPACE, receive, receive_changed_flags};
pub use frames::{Frame, KNOCK, Stream, Totals};
pub use header::LONGEST;
pub use key::Key;
