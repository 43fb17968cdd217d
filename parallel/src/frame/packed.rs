//! zstd frames around payloads.

use bytes::Bytes;
use compression::Codec;

use super::{FrameError, HEADER_BYTES, MAGIC, ZSTD};

/// Puts the payload of a frame that [`Header::frame`](super::Header::frame) made into a zstd frame; `None` when that saves
/// nothing, or the payload stands there without its zeros, or in a zstd frame, already.
///
/// # Panics
/// When it is not such a frame.
#[must_use]
pub fn pack(frame: &Bytes, packer: &mut Packer) -> Option<Bytes> {
    let (header, payload) = frame.split_at(HEADER_BYTES);
    assert!(header[..4] == MAGIC, "our own frame");
    if header[8] != 0 {
        return None;
    }
    let packed = packer.compress(payload)?;
    let mut out = Vec::with_capacity(HEADER_BYTES + packed.len());
    out.extend(&header[..8]);
    out.push(ZSTD);
    out.extend(&header[9..44]);
    out.extend((packed.len() as u32).to_le_bytes());
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&out), packed);
    out.extend(checksum.to_le_bytes());
    out.extend(packed);
    Some(out.into())
}

/// A zstd compressor and its memory, kept from frame to frame.
pub struct Packer {
    zstd: zstd::bulk::Compressor<'static>,
    out: Vec<u8>,
}

/// The fastest level: gradients are noise, and what little can be saved is in the distribution of their values.
const ZSTD_LEVEL: i32 = 1;

impl Packer {
    /// A packer without a past.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { zstd: zstd::bulk::Compressor::new(ZSTD_LEVEL)?, out: Vec::new() })
    }

    /// The payload in a zstd frame, if that is smaller.
    fn compress(&mut self, payload: &[u8]) -> Option<&[u8]> {
        // What does not fit in less than the payload is not worth having; zstd ends there.
        self.out.resize(payload.len().saturating_sub(1), 0);
        let bytes = self.zstd.compress_to_buffer(payload, &mut self.out[..]).ok()?;
        Some(&self.out[..bytes])
    }
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packer").finish_non_exhaustive()
    }
}

/// The payload that a zstd frame holds. No more memory is taken for it than the payload has bytes, whatever the frame claims.
pub(super) fn unpack(codec: Codec, body: &[u8], expected: usize) -> Result<Bytes, FrameError> {
    let wrong = |what: String| FrameError::Zstd { codec, expected, what };
    let payload = zstd::bulk::decompress(body, expected).map_err(|error| wrong(error.to_string()))?;
    match payload.len() {
        found if found != expected => Err(wrong(format!("{found} bytes came out of it"))),
        _ => Ok(payload.into()),
    }
}
