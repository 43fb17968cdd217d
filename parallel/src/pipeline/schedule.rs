//! In which order a rank does its part of a step.

use super::{Action, Kind, Pass, Pipeline};

/// What a rank does in a step: every forward and every backward pass of its pieces, once.
pub(super) fn schedule(pipeline: Pipeline, rank: usize) -> Vec<Action> {
    let all = pipeline.micro_batches * pipeline.virtual_stages;
    let ahead = match pipeline.kind {
        Kind::GPipe => all,
        Kind::OneForwardOneBackward | Kind::Interleaved => warm_up(pipeline, rank).min(all),
    };
    let forward = |turn| action(pipeline, Pass::Forward, turn);
    let backward = |turn| action(pipeline, Pass::Backward, turn);
    let mut actions: Vec<Action> = (0..ahead).map(forward).collect();
    for turn in ahead..all {
        actions.extend([forward(turn), backward(turn - ahead)]);
    }
    actions.extend((all - ahead..all).map(backward));
    actions
}

/// Forward passes before the first backward pass, but for the one just before it.
///
/// 1F1B: as many as there are ranks behind this one, so that the first gradient comes back just when they are done.
/// Interleaved: all passes of the other pieces of the first group of micro-batches, and twice the ranks behind this one, for
/// the group passes them once more on its way to the last piece.
pub(super) fn warm_up(pipeline: Pipeline, rank: usize) -> usize {
    assert!(rank < pipeline.stages, "rank {rank} of {} stages", pipeline.stages);
    let behind = pipeline.stages - rank - 1;
    match pipeline.kind {
        Kind::GPipe => 0,
        Kind::OneForwardOneBackward => behind,
        Kind::Interleaved => 2 * behind + (pipeline.virtual_stages - 1) * pipeline.stages,
    }
}

/// The pass that has its turn. Groups of as many micro-batches as there are stages go through all pieces of a rank, one
/// after the other: forward from the first piece, backward from the last.
fn action(pipeline: Pipeline, pass: Pass, turn: usize) -> Action {
    let Pipeline { stages, virtual_stages, .. } = pipeline;
    if virtual_stages == 1 {
        return Action { pass, piece: 0, micro_batch: turn };
    }
    let (group, turn) = (turn / (stages * virtual_stages), turn % (stages * virtual_stages));
    let piece = match pass {
        Pass::Forward => turn / stages,
        Pass::Backward => virtual_stages - 1 - turn / stages,
    };
    Action { pass, piece, micro_batch: group * stages + turn % stages }
}

/// The most forward passes that wait for their backward pass at the same time: what a rank keeps the activations of.
#[must_use]
pub fn in_flight(actions: &[Action]) -> usize {
    let (mut now, mut most) = (0usize, 0);
    for action in actions {
        match action.pass {
            Pass::Forward => now += 1,
            Pass::Backward => now = now.saturating_sub(1),
        }
        most = most.max(now);
    }
    most
}
