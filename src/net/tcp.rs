//! TCP sockets: listening, unconnected, and connections through TCP_REPAIR.
//!
//! # A peer outside the dump, and --kill
//! When a process dies, its sockets close and the peer hears a FIN or RST; from then on the image has
//! nothing left to go on with. So, before a connection is read for a dump that kills:
//!
//! 1. a socket filter that drops all is attached (SO_ATTACH_FILTER, `ret #0`). The kernel asks it before
//!    it looks at a segment: nothing is acknowledged, nothing changes; the peer sends again later, as
//!    it would over a bad line. No firewall is needed, and nobody else's packets are concerned;
//! 2. once the image is durable, and before the processes are killed, TCP_REPAIR is turned on, in which a
//!    socket closes without a word (not earlier: the program's own calls fail in that mode);
//! 3. the guardian, which holds a duplicate, stays behind as the keeper ([`super::keeper`]): as long as the
//!    socket exists, the kernel finds it for the peer's segments and drops them by the filter. Without
//!    it they would meet no socket and be answered with RST.
//!
//! A restore on the same host asks the keeper for the very socket, checks that it is what the image says,
//! and goes on with it. A restore on another host, to which the address has moved, makes the socket from
//! the image; the old host's keeper sees no segments any more and is of no matter.
//! A reboot of the host between dump and restore answers the peer with RST if it sends meanwhile; restore
//! before the network comes up, or drop its segments in a firewall until then.

mod dump;
mod refused;
mod restore;

pub(crate) use dump::{Held, hold_until_dead, read, read_connections, release};
pub(crate) use restore::{Pending, activate, build};

/// net/tcp_states.h.
pub(crate) const ESTABLISHED: u8 = 1;
pub(crate) const SYN_SENT: u8 = 2;
pub(crate) const FIN_WAIT1: u8 = 4;
pub(crate) const FIN_WAIT2: u8 = 5;
pub(crate) const CLOSE: u8 = 7;
pub(crate) const CLOSE_WAIT: u8 = 8;
pub(crate) const LAST_ACK: u8 = 9;
pub(crate) const LISTEN: u8 = 10;
pub(crate) const CLOSING: u8 = 11;

/// States in which there is a connection.
pub(crate) fn is_connection(state: u8) -> bool {
    matches!(
        state,
        ESTABLISHED | FIN_WAIT1 | FIN_WAIT2 | CLOSE_WAIT | LAST_ACK | CLOSING
    )
}

/// The program has shut its sending side down: the FIN has a sequence number.
pub(crate) fn fin_sent(state: u8) -> bool {
    matches!(state, FIN_WAIT1 | FIN_WAIT2 | LAST_ACK | CLOSING)
}

/// The peer's FIN has come.
pub(crate) fn fin_received(state: u8) -> bool {
    matches!(state, CLOSE_WAIT | LAST_ACK | CLOSING)
}
