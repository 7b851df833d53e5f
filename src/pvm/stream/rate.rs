//! Packing what is sent, when that is faster than the link: both are measured while sending.

use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::kernel::buffer::Buffer;
use crate::kernel::sockopt::{self, Queue};

/// How a frame is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Packing {
    /// As it is.
    None = 0,
    /// LZ4 block.
    Lz4 = 1,
    /// Zstandard frame.
    Zstd = 2,
}

impl Packing {
    pub fn of(code: u8) -> Result<Packing> {
        match code {
            0 => Ok(Packing::None),
            1 => Ok(Packing::Lz4),
            2 => Ok(Packing::Zstd),
            code => bail!("a frame is packed in an unknown way ({code})"),
        }
    }

    /// Unpacks to exactly `raw` bytes, which the caller has bounded.
    pub fn unpack(self, packed: Buffer, raw: usize) -> Result<Buffer> {
        let mut body = Buffer::default();
        let len = match self {
            Packing::None => {
                body = packed;
                body.len()
            }
            Packing::Lz4 => {
                body.resize(raw);
                lz4_flex::block::decompress_into(&packed, &mut body)
                    .context("a frame cannot be unpacked (lz4)")?
            }
            Packing::Zstd => {
                body.resize(raw);
                zstd::bulk::decompress_to_buffer(&packed[..], &mut body[..])
                    .context("a frame cannot be unpacked (zstd)")?
            }
        };
        if len != raw {
            bail!("a frame unpacks to {len} bytes, not {raw}");
        }
        Ok(body)
    }

    fn pack(self, body: &[u8]) -> Option<Vec<u8>> {
        let packed = match self {
            Packing::None => return None,
            Packing::Lz4 => lz4_flex::block::compress(body),
            Packing::Zstd => zstd::bulk::compress(body, 1).ok()?,
        };
        (packed.len() < body.len()).then_some(packed)
    }
}

/// Frames shorter than this are sent as they are.
const SHORT: usize = 4096;
/// So many frames pass before a way of packing that lost is tried again.
const AGAIN: u32 = 16;
/// Of a frame so much is packed to try a way, for what cannot be packed costs the most.
const SAMPLE: usize = 64 << 10;

/// What one way of packing did lately: seconds of our time a raw byte, and bytes on the wire for one.
#[derive(Debug, Clone, Copy)]
struct Record {
    cost: f64,
    ratio: f64,
    age: u32,
}

fn measured(way: Packing, bytes: &[u8]) -> (Option<Vec<u8>>, Record) {
    let began = Instant::now();
    let packed = way.pack(bytes);
    let len = bytes.len() as f64;
    let record = Record {
        cost: began.elapsed().as_secs_f64() / len,
        ratio: packed.as_ref().map_or(1.0, |p| p.len() as f64 / len),
        age: 0,
    };
    (packed, record)
}

/// Chooses.
pub struct Packer {
    /// Seconds that the link takes for a byte, as far as it is what holds us up.
    link: f64,
    written: u64,
    /// When and at how many bytes through the link was last looked at.
    seen: Option<(Instant, u64)>,
    records: [Option<Record>; 2],
}

const WAYS: [Packing; 2] = [Packing::Lz4, Packing::Zstd];

impl Packer {
    pub fn new() -> Packer {
        Packer {
            link: 0.0,
            written: 0,
            seen: None,
            records: [None; 2],
        }
    }

    /// What goes over the wire for `body`, if it is to be packed, and how.
    pub fn pack(&mut self, body: &[u8], tcp: &TcpStream) -> Option<(Packing, Vec<u8>)> {
        self.look_at_link(tcp);
        if body.len() < SHORT || self.link == 0.0 {
            return None;
        }
        for (slot, way) in self.records.iter_mut().zip(WAYS) {
            if slot.is_none_or(|record| record.age >= AGAIN) {
                *slot = Some(measured(way, &body[..body.len().min(SAMPLE)]).1);
            }
        }
        let way = self.best();
        let at = WAYS.iter().position(|w| *w == way)?;
        let (packed, record) = measured(way, body);
        if let Some(slot) = self.records.get_mut(at) {
            *slot = Some(record);
        }
        packed.map(|packed| (way, packed))
    }

    /// The way by which a raw byte is through soonest. The link works on while we pack, so the slower of the two counts.
    fn best(&mut self) -> Packing {
        let mut best = (self.link, Packing::None);
        for (record, way) in self.records.iter_mut().zip(WAYS) {
            let Some(record) = record else { continue };
            record.age += 1;
            let time = record.cost.max(record.ratio * self.link);
            // A twentieth better, or it is not worth the other's processor.
            if time < 0.95 * best.0 {
                best = (time, way);
            }
        }
        best.1
    }

    /// Takes note of what went to the kernel.
    pub fn wrote(&mut self, bytes: usize) {
        self.written += bytes as u64;
    }

    /// What has left us and was not acknowledged is the link's business: if there is nothing, it waits for us.
    fn look_at_link(&mut self, tcp: &TcpStream) {
        let now = Instant::now();
        let queued = sockopt::queued(tcp.as_fd(), Queue::Out).unwrap_or(0) as u64;
        let through = self.written.saturating_sub(queued);
        let Some((when, before)) = self.seen else {
            self.seen = Some((now, through));
            return;
        };
        let (time, bytes) = ((now - when).as_secs_f64(), through.saturating_sub(before));
        if time < 0.002 {
            return;
        }
        self.seen = Some((now, through));
        if queued < 64 << 10 {
            self.link = 0.0;
        } else {
            let now = time / (bytes.max(1) as f64);
            self.link = if self.link == 0.0 {
                now
            } else {
                0.7 * self.link + 0.3 * now
            };
        }
    }
}
