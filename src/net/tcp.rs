//! TCP sockets: listening, unconnected, and connections through TCP_REPAIR.

use anyhow::{Context, Result, bail};

use super::options::{self, Phase};
use super::{Diag, Met, Restorer, SocketDumper, inet};
use crate::image::Bytes;
use crate::image::sockets::{Socket, SocketState, Tcp};
use crate::kernel::socket;

/// TCP_CLOSE, TCP_LISTEN (net/tcp_states.h).
const CLOSE: u8 = 7;
const LISTEN: u8 = 10;

/// Connections that stay in repair mode until the processes are dead.
#[derive(Default)]
pub(crate) struct Held {}

/// Connections that are to be activated.
#[derive(Default)]
pub(crate) struct Pending {}

pub(crate) fn read(
    _d: &SocketDumper<'_>,
    met: &Met,
    diag: &Diag,
    warnings: &mut Vec<String>,
) -> Result<Tcp> {
    let ino = u32::try_from(met.ino).unwrap_or(0);
    let found = diag.tcp.iter().find(|x| x.ino == ino);
    let local =
        socket::local_name(&met.fd).with_context(|| format!("{}: getsockname", met.place()))?;
    let mut tcp = Tcp {
        // A socket in state CLOSE is in no table of the kernel's.
        state: found.map_or(CLOSE, |x| x.state),
        shutdown: found.map_or(0, |x| x.shutdown & 3),
        local: (inet::port(&local) != 0 || inet::host(&local).iter().any(|b| *b != 0))
            .then_some(Bytes(local)),
        ..Tcp::default()
    };
    match (tcp.state, found) {
        (LISTEN, Some(x)) => {
            tcp.backlog = Some(x.send_queue);
            if x.receive_queue > 0 {
                warnings.push(format!(
                    "{}: {} connections that were not accepted yet are not carried",
                    met.place(),
                    x.receive_queue
                ));
            }
        }
        (CLOSE, _) => {}
        _ => bail!("{}: TCP connections are not carried yet", met.place()),
    }
    Ok(tcp)
}

pub(crate) fn read_connections(_d: &mut SocketDumper<'_>, _sockets: &mut [Socket]) -> Result<()> {
    Ok(())
}

pub(crate) fn build(r: &mut Restorer) -> Result<()> {
    let sockets = r.sockets.clone();
    for (i, s) in sockets.iter().enumerate() {
        let SocketState::Tcp(t) = &s.state else {
            continue;
        };
        let fd = socket::socket(s.family, s.kind, s.protocol).context("socket(SOCK_STREAM)")?;
        options::apply(&fd, s, Phase::Early, &mut r.warnings);
        if let Some(local) = &t.local {
            inet::bind(&fd, local).with_context(|| format!("socket {i} of the image"))?;
        }
        if let Some(backlog) = t.backlog {
            socket::listen(&fd, backlog)
                .with_context(|| format!("socket {i} of the image: listen"))?;
        }
        options::apply(&fd, s, Phase::Late, &mut r.warnings);
        r.put(i, fd);
    }
    Ok(())
}

pub(crate) fn activate(_r: &mut Restorer) {}
