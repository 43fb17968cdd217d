//! Which codec gives the shortest step, and whether compression should be off: a pure function of measured facts.
//!
//! A step with a codec is predicted as
//!
//! ```text
//! step = step without communication + codec's work + max(transfer - window, transfer of the last bucket)
//! ```
//!
//! - transfer: bytes that a rank sends in a step over the rate of the slowest link. In a group of N ranks that is
//!   (N - 1) / N of the tensors in their first codec, and as much in the second stage's, rows of tables that a step does not touch
//!   included.
//! - window: the time in which gradients and sums travel while the model computes: the backward pass from the first full
//!   bucket on, and the next forward pass. The last bucket is complete only when the backward pass ends, and the forward
//!   pass begins with its sum, so its transfer can never hide.
//! - the codec's work: on one core, and counted as if it never hid, for where cores are few it does not: encoding
//!   (N - 1) / N of the elements and 1 / N once more for the second stage, adding (N - 1) / N, decoding all.
//!
//! The most precise codec counts whose step is not longer than the shortest by more than [`WORTH`]. So compression is
//! off wherever the link is fast enough, and bits are given up only where they buy something.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::Codec;

/// What may be chosen, from the most precise on: the codecs whose measured loss is within its bar
/// (`docs/compression.md`), but for `sparse24-int8`, to which `int4` is preferable: fewer bits, closer in one shot unless
/// most of a gradient is zero, and no warm-up. `fp32` is compression off.
pub const CANDIDATES: [Codec; 4] = [Codec::Fp32, Codec::Bf16, Codec::Int8, Codec::Int4];

/// A codec of fewer bits must shorten the step by more than this part of the shortest one.
pub const WORTH: f64 = 0.02;

/// No second is longer: keeps sums of absurd facts finite.
const SECONDS_MAX: f64 = 1e12;
/// No link is slower, bytes a second: a rate of zero is a measurement that failed.
const LINK_MIN: f64 = 1.0;

/// Elements by the rule that they travel under.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Elements {
    /// In any codec.
    pub any: u64,
    /// In `int8` where the codec has fewer bits.
    pub int8_at_least: u64,
    /// In `fp32` always.
    pub fp32: u64,
}

/// What a codec takes on one core.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Which codec.
    pub codec: Codec,
    /// Seconds to encode an element, with what was left out before.
    pub encode_s: f64,
    /// Seconds to decode an element and add it.
    pub decode_add_s: f64,
}

/// What was measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// Ranks of the group.
    pub ranks: usize,
    /// Ranks of a machine, which share what leaves it; 1 where every rank is one.
    pub members: usize,
    /// Bytes a second of the slowest link, each way.
    pub link_bytes_per_s: f64,
    /// Of all tensors.
    pub elements: Elements,
    /// Of the last bucket of the backward pass.
    pub last_bucket: Elements,
    /// Seconds of a step of the slowest rank without waiting for others.
    pub step_s: f64,
    /// Seconds of it in which gradients and sums travel while the model computes.
    pub window_s: f64,
    /// What parameters come back in from their owners, whatever the gradients' codec; nothing where sums come back.
    pub parameters: Option<Codec>,
    /// Of the slowest rank. A candidate without a speed is left out.
    pub speeds: Vec<Speed>,
}

/// A codec and the step that is expected of it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Which codec.
    pub codec: Codec,
    /// Seconds of a step.
    pub step_s: f64,
}

/// What was chosen, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// What is to travel.
    pub codec: Codec,
    /// Of every candidate, from the most precise on.
    pub predictions: Vec<Prediction>,
    /// For people, one sentence.
    pub reason: String,
}

/// The most precise codec whose step is about the shortest. Absurd facts give a choice too: a number that is none, or
/// below zero, counts as zero.
#[must_use]
pub fn choose(facts: &Facts) -> Choice {
    if facts.ranks <= facts.members {
        let reason = "all ranks are one machine, and nothing leaves it, so nothing is compressed".into();
        return Choice { codec: Codec::Fp32, predictions: Vec::new(), reason };
    }
    let speed = |codec: Codec| facts.speeds.iter().find(|speed| speed.codec == codec);
    let predictions: Vec<Prediction> =
        CANDIDATES.into_iter().filter_map(|codec| Some(predict(facts, codec, speed(codec)?, speed))).collect();
    let shortest = predictions.iter().copied().min_by(|a, b| a.step_s.total_cmp(&b.step_s));
    let Some(shortest) = shortest else {
        let reason = "no codec's speed was measured, so nothing is compressed".into();
        return Choice { codec: Codec::Fp32, predictions, reason };
    };
    let close = |prediction: &&Prediction| prediction.step_s <= shortest.step_s * (1.0 + WORTH);
    let chosen = *predictions.iter().find(close).unwrap_or(&shortest);
    let reason = reason(facts, &predictions, chosen, shortest);
    Choice { codec: chosen.codec, predictions, reason }
}

/// The step with one codec.
fn predict<'a>(facts: &Facts, codec: Codec, first: &Speed, speed: impl Fn(Codec) -> Option<&'a Speed>) -> Prediction {
    // Elements that travel in another codec than this one are few, and are counted at its speed.
    let second = speed(facts.parameters.unwrap_or_else(|| codec.second_stage())).unwrap_or(first);
    let members = facts.members.max(1) as f64;
    let n = facts.ranks as f64 / members;
    let others = (n - 1.0) / n;
    let Elements { any, int8_at_least, fp32 } = facts.elements;
    let elements = any as f64 + int8_at_least as f64 + fp32 as f64;
    let encode_s = others * seconds(first.encode_s) + seconds(second.encode_s) / n;
    let decode_s = others * seconds(first.decode_add_s) / members + seconds(second.decode_add_s);
    let work_s = elements * (encode_s / members + decode_s);
    let link = if facts.link_bytes_per_s >= LINK_MIN { facts.link_bytes_per_s } else { LINK_MIN };
    let transfer_s = |elements: &Elements| others * bytes(elements, codec, facts.parameters) / members / link;
    let open_s = (transfer_s(&facts.elements) - seconds(facts.window_s)).max(transfer_s(&facts.last_bucket));
    Prediction { codec, step_s: seconds(seconds(facts.step_s) + work_s + open_s) }
}

/// Whether [`choose`] may choose this codec.
#[must_use]
pub fn may_be_chosen(codec: Codec) -> bool {
    CANDIDATES.contains(&codec)
}

/// Bytes of all elements once through both stages, with the bits of [`Codec::payload_bytes`]. `parameters` is what comes
/// back in place of the sum, if something does.
#[must_use]
pub fn bytes(elements: &Elements, codec: Codec, parameters: Option<Codec>) -> f64 {
    let both = |there: Codec, back: Codec| (bits(there) + bits(back)) / 8.0;
    let back = |there: Codec| parameters.unwrap_or_else(|| there.second_stage());
    elements.any as f64 * both(codec, back(codec))
        + elements.int8_at_least as f64 * both(int8_at_least(codec), back(int8_at_least(codec)))
        + elements.fp32 as f64 * both(Codec::Fp32, Codec::Fp32)
}

/// The codec, or `int8` where it has fewer bits.
#[must_use]
pub fn int8_at_least(codec: Codec) -> Codec {
    if bits(codec) < bits(Codec::Int8) { Codec::Int8 } else { codec }
}

/// Bits an element in whole blocks.
fn bits(codec: Codec) -> f64 {
    const MANY: usize = 8 * crate::BLOCK;
    (8 * codec.payload_bytes(MANY)) as f64 / MANY as f64
}

/// A number of seconds that can be added and compared.
fn seconds(measured: f64) -> f64 {
    if measured > 0.0 { measured.min(SECONDS_MAX) } else { 0.0 }
}

fn reason(facts: &Facts, predictions: &[Prediction], chosen: Prediction, shortest: Prediction) -> String {
    let Prediction { codec, step_s } = chosen;
    let percent = |long: f64, short: f64| 100.0 * (long / short.max(f64::MIN_POSITIVE) - 1.0);
    let mut text = format!(
        "{codec} is predicted to take {} a step, on a slowest link of {} MB/s",
        duration(step_s),
        number(facts.link_bytes_per_s / 1e6)
    );
    let better = predictions.iter().filter(|other| other.codec != codec).take_while(|other| {
        CANDIDATES.iter().position(|&c| c == other.codec) < CANDIDATES.iter().position(|&c| c == codec)
    });
    if let Some(next) = better.last() {
        let (next_s, more) = (duration(next.step_s), percent(next.step_s, shortest.step_s));
        let _ = write!(text, "; {}, which is more precise, {next_s}, {more:.1} % above the shortest", next.codec);
    }
    if shortest.codec == codec {
        text += "; no codec is predicted to be faster";
    } else {
        let _ = write!(
            text,
            "; the shortest, {} with {}, is not shorter by more than {:.0} %",
            shortest.codec,
            duration(shortest.step_s),
            100.0 * WORTH
        );
    }
    if codec == Codec::Fp32 {
        text += ": compression is off";
    }
    text
}

fn duration(s: f64) -> String {
    if s < 1.0 { format!("{} ms", number(s * 1e3)) } else { format!("{} s", number(s)) }
}

/// About three digits.
fn number(x: f64) -> String {
    match x {
        x if !x.is_finite() => x.to_string(),
        x if x < 10.0 => format!("{x:.2}"),
        x if x < 100.0 => format!("{x:.1}"),
        x => format!("{x:.0}"),
    }
}

#[cfg(test)]
mod tests;
