//! The same bits by every level, with every store, at every address, cut anywhere on a block border, by any number of
//! threads (invariant 5 of `DESIGN.md`, within this crate).
//!
//! - `model`: a second encoder and decoder, written from `docs/payload-format.md` alone.
//! - `rules`: the reference is the model; with any one rule changed it is not.
//! - `levels`: levels, stores and addresses.
//! - `cuts`: cuts and threads.

mod cuts;
mod levels;
mod model;
mod rules;

use super::*;
use crate::Payload;
use crate::codec::tests::inputs;

/// What an encoder gives: what it found, the payload, and what is left.
#[derive(Clone, Debug, PartialEq)]
struct Encoded {
    found: Found,
    payload: Vec<u8>,
    left: Vec<u32>,
}

impl Encoded {
    fn new(found: Found, payload: &[u8], left: &[f32]) -> Self {
        match found {
            Found::Finite => Self { found, payload: payload.to_vec(), left: bits(left) },
            // Neither is to be used.
            Found::NonFinite => Self { found, payload: Vec::new(), left: Vec::new() },
        }
    }
}

/// The reference's.
fn reference(codec: Codec, gradient: &[f32], residual: &[f32]) -> Encoded {
    let mut values = gradient.to_vec();
    let mut payload = vec![0; codec.payload_bytes(values.len())];
    let found = codec.encode_with(Level::PORTABLE, Stores::Cached, &mut values, residual, &mut payload);
    Encoded::new(found, &payload, &values)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Whether both have the same bits; their numbers are not printed, there are too many.
#[track_caller]
fn same_bits(a: &[f32], b: &[f32], what: impl fmt::Display) {
    assert_eq!(a.len(), b.len(), "{what}");
    let differs = a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits());
    if let Some(at) = differs {
        panic!("{what}: {:e} and {:e} at {at} of {}", a[at], b[at], a.len());
    }
}
