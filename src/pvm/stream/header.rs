//! What a frame begins with.

use anyhow::{Result, bail};

use super::rate::Packing;

/// Most bytes of a frame.
pub const LONGEST: usize = 4 << 20;
/// Bytes of a header.
pub const HEADER: usize = 12;

pub struct Header {
    pub kind: u8,
    pub packing: Packing,
    /// Bytes of the head.
    pub front: u8,
    /// Those of the body, as sent.
    pub packed: usize,
    pub raw: usize,
}

impl Header {
    pub fn read(bytes: &[u8]) -> Result<Header> {
        let Some([kind, packing, front, _, a, b, c, d, e, f, g, h]) =
            bytes.first_chunk::<HEADER>().copied()
        else {
            bail!("a frame has no header");
        };
        let packed = u32::from_be_bytes([a, b, c, d]) as usize;
        let raw = u32::from_be_bytes([e, f, g, h]) as usize;
        // A frame that would grow by packing is sent as it is.
        if raw > LONGEST || packed > raw {
            bail!("a frame of {raw} bytes ({packed} packed) is too long");
        }
        Ok(Header {
            kind,
            packing: Packing::of(packing)?,
            front,
            packed,
            raw,
        })
    }

    /// As it is sent.
    pub fn bytes(&self) -> [u8; HEADER] {
        let [a, b, c, d] = (self.packed as u32).to_be_bytes();
        let [e, f, g, h] = (self.raw as u32).to_be_bytes();
        [
            self.kind,
            self.packing as u8,
            self.front,
            0,
            a,
            b,
            c,
            d,
            e,
            f,
            g,
            h,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::buffer::Buffer;

    #[test]
    fn headers_that_claim_too_much_are_refused() {
        let header = |packed: u32, raw: u32, packing: u8| {
            let mut bytes = vec![1, packing, 0, 0];
            bytes.extend(packed.to_be_bytes());
            bytes.extend(raw.to_be_bytes());
            Header::read(&bytes)
        };
        assert!(header(10, 10, 0).is_ok());
        assert!(header(u32::MAX, u32::MAX, 0).is_err());
        assert!(header(11, 10, 1).is_err());
        assert!(header(10, 10, 9).is_err());
        assert!(Header::read(&[1, 0, 0]).is_err());
        // What unpacks to something else than it says.
        let packed = lz4_flex::block::compress(&[7; 1000]);
        let unpack = |way: Packing, packed: &[u8], raw| {
            let mut body = Buffer::new(packed.len());
            body.copy_from_slice(packed);
            way.unpack(body, raw)
        };
        assert_eq!(unpack(Packing::Lz4, &packed, 1000).unwrap()[..], [7; 1000]);
        assert!(unpack(Packing::Lz4, &packed, 999).is_err());
        assert!(unpack(Packing::Lz4, &packed, 1001).is_err());
        assert!(unpack(Packing::Zstd, &[1, 2, 3], 100).is_err());
        assert!(unpack(Packing::None, &packed, 1000).is_err());
    }
}
