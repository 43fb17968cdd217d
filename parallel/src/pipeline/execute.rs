//! A rank's part of a step, over the ranks of its pipeline.
//!
//! It follows the rank's schedule: before an action it waits for that action's input, behind it the output leaves and
//! nobody waits. Messages of a rank come in the order in which it sends them, and in every schedule that is the order in
//! which they are used. Each says of which action it is the input, so that ranks which are not at the same find that out.
//!
//! What computes is a closure, which sees activations and gradients as elements: nothing here knows a tensor or a model.
//!
//! Elements travel as f32, or in a codec with fewer bits, without error feedback: what is left out of one micro-batch's activations
//! says nothing of the next one's.

use std::time::{Duration, Instant};

use compression::Codec;
use compression::codec::{Found, Payload, PayloadError};
use thiserror::Error;

use super::{Action, Pass, Pipeline};
use crate::collective::{CollectiveError, KEPT_BYTES_MAX, SubGroup};

/// In place of a payload: the elements cannot be sent, and count as NaN.
const NOT_FINITE: u8 = 1;

/// How stages talk with each other.
#[derive(Clone, Copy, Debug)]
pub struct Way<'a> {
    /// The ranks of the pipeline, in the order of its stages.
    pub group: &'a SubGroup,
    /// Where in the program the step is, the same on all of them; a few words, for whoever reads of a fault.
    pub site: &'a str,
    /// Elements of the activations between two pieces, the same for all micro-batches, and of their gradients.
    pub elements: usize,
    /// What both travel in.
    pub codec: Codec,
}

/// Why a step was not done.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ExecuteError<E> {
    /// What computes failed. The other ranks learn of it as of any rank that leaves.
    #[error("{action:?}: {error}")]
    Compute {
        /// Where.
        action: Action,
        /// What it said.
        error: E,
    },
    /// Another rank is lost, or at something else.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// What came is no payload of the codec.
    #[error("{action:?}: {error}")]
    Payload {
        /// Whose input it was.
        action: Action,
        /// What is wrong with it.
        error: PayloadError,
    },
    /// The group is not the pipeline's.
    #[error("a pipeline of {stages} stages over {members} ranks")]
    Group {
        /// Stages.
        stages: usize,
        /// Ranks of the group.
        members: usize,
    },
    /// More might wait for a slow rank than it may keep.
    #[error(transparent)]
    Room(#[from] Room),
}

/// More might wait for a slow rank than it may keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "up to {messages} messages of {bytes} bytes may wait from one rank, and at most {max} bytes of them; make micro-batches \
     smaller"
)]
pub struct Room {
    /// Messages.
    pub messages: usize,
    /// Bytes of each.
    pub bytes: usize,
    /// The bound.
    pub max: usize,
}

/// Bytes of a message of so many elements: where it is not f32, a byte that says whether there is a payload, and the payload.
#[must_use]
pub const fn message_bytes(elements: usize, codec: Codec) -> usize {
    match codec {
        Codec::Fp32 => elements.saturating_mul(size_of::<f32>()),
        codec => 1 + codec.payload_bytes(elements),
    }
}

/// Does this rank's part of a step. `compute` gets an action with its input, which is `None` for the tokens and for the
/// loss, and gives the output, `None` where nobody takes it. Returns how long it waited for inputs.
///
/// # Errors
/// See [`ExecuteError`].
///
/// # Panics
/// When `compute` gives something where nobody takes it, nothing where somebody does, or another number of elements.
pub fn execute<E>(
    pipeline: Pipeline,
    way: Way<'_>,
    mut compute: impl FnMut(Action, Option<Vec<f32>>) -> Result<Option<Vec<f32>>, E>,
) -> Result<Duration, ExecuteError<E>> {
    let (stages, members) = (pipeline.stages(), way.group.members().len());
    if stages != members {
        return Err(ExecuteError::Group { stages, members });
    }
    let (stage, mut waited) = (way.group.index(), Duration::ZERO);
    has_room(pipeline, stage, message_bytes(way.elements, way.codec))?;
    for action in pipeline.schedule(stage) {
        let input = match pipeline.before(stage, action) {
            Some((from, _)) => {
                let start = Instant::now();
                let values = way.receive(action, way.group.members()[from])?;
                waited += start.elapsed();
                Some(values)
            }
            None => None,
        };
        let output = compute(action, input).map_err(|error| ExecuteError::Compute { action, error })?;
        let takes = pipeline.after(stage, action);
        assert_eq!(output.is_some(), takes.is_some(), "{action:?}: an output where somebody takes it");
        if let (Some(output), Some((to, of))) = (output, takes) {
            assert_eq!(output.len(), way.elements, "{action:?}: as many elements as was said");
            way.send(of, way.group.members()[to], output)?;
        }
    }
    Ok(waited)
}

impl Way<'_> {
    /// Sends another rank the input of its action. Nobody waits.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn send(&self, action: Action, to: usize, mut values: Vec<f32>) -> Result<(), CollectiveError> {
        let site = site(self.site, action);
        if self.codec == Codec::Fp32 {
            return self.group.send(&site, to, &values);
        }
        let mut message = vec![0; message_bytes(self.elements, self.codec)];
        // What is not finite stays so: all ranks are to skip the step.
        let nothing = vec![0.0; values.len()];
        if self.codec.encode(&mut values, &nothing, &mut message[1..]) == Found::NonFinite {
            message.fill(0);
            message[0] = NOT_FINITE;
        }
        self.group.send(&site, to, &message)
    }

    /// Waits for the input of an action.
    ///
    /// # Errors
    /// A rank is lost, or what came makes no sense.
    pub fn receive<E>(&self, action: Action, from: usize) -> Result<Vec<f32>, ExecuteError<E>> {
        let site = site(self.site, action);
        let mut values = vec![0.0; self.elements];
        if self.codec == Codec::Fp32 {
            self.group.receive(&site, from, &mut values)?;
            return Ok(values);
        }
        let mut message = vec![0; message_bytes(self.elements, self.codec)];
        self.group.receive(&site, from, &mut message)?;
        if message[0] == NOT_FINITE {
            values.fill(f32::NAN);
            return Ok(values);
        }
        let payload = Payload::new(self.codec, self.elements, &message[1..]);
        payload.map_err(|error| ExecuteError::Payload { action, error })?.decode(&mut values);
        Ok(values)
    }
}

/// Whether there is room for what may wait at a stage, however slow it is: from each other rank no more messages, of so many
/// bytes each, than both have passes in flight.
///
/// # Errors
/// There is not.
pub fn has_room(pipeline: Pipeline, stage: usize, bytes: usize) -> Result<(), Room> {
    let others = (0..pipeline.stages()).filter(|&other| other != stage);
    let most = others.map(|other| pipeline.in_flight_max(other)).max();
    let messages = most.map_or(0, |most| most + pipeline.in_flight_max(stage));
    match messages.saturating_mul(bytes) > KEPT_BYTES_MAX {
        true => Err(Room { messages, bytes, max: KEPT_BYTES_MAX }),
        false => Ok(()),
    }
}

/// Where a message is from: the action whose input it is.
fn site(step: &str, Action { pass, piece, micro_batch }: Action) -> String {
    let pass = match pass {
        Pass::Forward => "forward",
        Pass::Backward => "backward",
    };
    format!("{step}/{pass}/piece {piece}/micro-batch {micro_batch}")
}

#[cfg(test)]
mod tests;
