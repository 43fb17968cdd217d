//! What a sharded optimiser does with what a rank owns, once all have voted for a step.
//!
//! The thread that trains updates every shard before it goes on, and hands each to the engine's thread at once, which
//! encodes and sends it while the next one is updated: first what the next forward pass needs first. That is a part of one in
//! so many ranks of the work that every rank has without it. On the engine's thread it would keep frames waiting, and
//! the cores are as busy: the forward pass could only begin to wait sooner.

use compression::Codec;
use parallel::data::{GradientStream, StreamError};

use super::State;
use super::update::piece_elements;
use crate::optimizer::{self, AdamW};

/// Updates what this rank owns, and sends it; without rules as it is, so that nobody waits.
pub(super) fn send(stream: &GradientStream, state: &mut State, rules: Option<&[AdamW]>) {
    let State { weights, m, v, masters, sharding, .. } = state;
    let each = weights.iter_mut().zip(masters).zip(m.iter_mut().zip(v)).enumerate();
    for (index, ((weights, master), (m, v))) in each {
        let own = sharding.owned(weights.len());
        let (replica, elements) = (&mut weights[own.clone()], own.len());
        let codec = stream.parameter_codec(index).expect("a sharded state has a stream of parameters");
        // Piece by piece: the engine's thread may want the sums too.
        let at_once = piece_elements();
        for start in (0..elements).step_by(at_once) {
            let piece = start..(start + at_once).min(elements);
            let (m, v, replica) = (&mut m[piece.clone()], &mut v[piece.clone()], &mut replica[piece.clone()]);
            let mut update = |weights: &mut [f32], gradients: &[f32]| {
                if let Some(rules) = rules {
                    rules[index].update(&mut optimizer::Range { weights, gradients, m: &mut *m, v: &mut *v });
                }
            };
            stream.with_own(index, |place| {
                let place = &mut place[piece.clone()];
                if codec == Codec::Fp32 {
                    update(replica, place);
                    place.copy_from_slice(replica);
                } else {
                    let master = &mut master[piece.clone()];
                    update(master, place);
                    differences(master, replica, place);
                }
            });
        }
        stream.publish(index);
    }
}

/// What a master has and its replica has not.
fn differences(master: &[f32], replica: &[f32], place: &mut [f32]) {
    place.iter_mut().zip(master.iter().zip(replica)).for_each(|(place, (master, replica))| *place = master - replica);
}

/// Puts what came of a parameter into its replica, once it is here.
pub(super) fn adopt(
    stream: &GradientStream,
    index: usize,
    codec: Codec,
    weights: &mut [f32],
) -> Result<(), StreamError> {
    let elements = piece_elements();
    for (piece, weights) in weights.chunks_mut(elements).enumerate() {
        let from = piece * elements;
        stream.with_sum(index, from..from + weights.len(), |came| match codec {
            Codec::Fp32 => weights.copy_from_slice(came),
            _ => weights.iter_mut().zip(came).for_each(|(weight, more)| *weight += more),
        })?;
    }
    Ok(())
}
