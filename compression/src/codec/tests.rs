//! What the codecs promise, each with the control that breaks it.
//!
//! - `inputs`: numbers and slices that are hard on a codec; the kernels' tests use them too.
//! - `format`: names, sizes, and payloads written out by hand.
//! - `exact`: nothing is lost (invariants 1, 2 and 4 of `DESIGN.md`).
//! - `descent`: what error feedback is for (invariant 3).
//! - `ranks`: sums over many ranks (invariant 6).
//! - `finite`: what cannot be sent is found, what can be sent stays finite.
//! - `parts`: a payload read in parts.
//! - `refused`: payloads that no encoder writes.

mod descent;
mod exact;
mod finite;
mod format;
pub(crate) mod inputs;
mod parts;
mod ranks;
mod refused;

use super::*;
use crate::BLOCK;

/// The codecs that leave something out.
const LOSSY: [Codec; 5] = [Codec::Bf16, Codec::Int8, Codec::Sparse24Int8, Codec::Int4, Codec::Sparse24Int4];

/// The codecs that send two of four elements, and of what was left out a little in each step.
const SPARSE: [Codec; 2] = [Codec::Sparse24Int8, Codec::Sparse24Int4];

/// What encoding `y` finds, writes and leaves, without a past.
fn encode(codec: Codec, y: &[f32]) -> (Found, Vec<u8>, Vec<f32>) {
    encode_with_residual(codec, y, &vec![0.0; y.len()])
}

fn encode_with_residual(codec: Codec, gradient: &[f32], residual: &[f32]) -> (Found, Vec<u8>, Vec<f32>) {
    // Nothing may be left of what stood there before.
    let mut payload = vec![0xa5; codec.payload_bytes(gradient.len())];
    let mut values = gradient.to_vec();
    let found = codec.encode(&mut values, residual, &mut payload);
    (found, payload, values)
}

/// What of a residual is added to the gradient, and what is held back.
fn split(codec: Codec, residual: f32) -> [f32; 2] {
    let held = residual * if SPARSE.contains(&codec) { 0.968_75 } else { 0.0 };
    [residual - held, held]
}

/// What a decoder reads in bytes that an encoder has written.
fn decode(codec: Codec, payload: &[u8], elements: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; elements];
    Payload::new(codec, elements, payload).expect("our own payload").decode(&mut out);
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Whether all values are below 2^126.
fn can_be_sent(values: &[f32]) -> bool {
    values.iter().all(|x| x.abs() < TOO_LARGE)
}

/// Whether an encoder sees a new residual that is too large: where `y` is so large that there can be one.
fn is_seen(y: &[f32], next: &[f32]) -> bool {
    let looks = |block: &[f32]| block.iter().any(|y| y.abs() >= TOO_LARGE / 32.0);
    y.chunks(BLOCK).zip(next.chunks(BLOCK)).any(|(y, next)| looks(y) && !can_be_sent(next))
}

/// The Euclidean norm.
fn norm(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().map(|x| x * x).sum::<f64>().sqrt()
}
