//! What a rank measures for the choice of a codec: codecs, its link, and steps.

use std::time::Instant;

use compression::cost::{CANDIDATES, Elements};
use compression::{BLOCK, Codec, Payload};
use parallel::data::StreamError;
use parallel::data::plan::Plan;
use parallel::data::rules::count;
use parallel::progress::Stage;
use parallel::wire::control::{CodecElements, CodecFacts, CodecSpeed};

use super::MEASURED_STEPS;
use crate::error::Result;
use crate::step::Stepper;

/// Elements that each codec is tried on, in pieces like those of a step.
const ELEMENTS: usize = 1 << 20;
const PIECE: usize = 2048 * BLOCK;
/// Tries of each; the median counts.
const TRIES: usize = 3;

/// What was measured so far.
#[derive(Debug)]
pub(super) struct Calibration {
    link_bytes_per_s: f64,
    speeds: Vec<CodecSpeed>,
    /// Seconds of steps without waiting, and of the windows in them.
    steps_s: Vec<f64>,
    windows_s: Vec<f64>,
}

impl Calibration {
    /// Measures codecs, for a link that was measured.
    pub(super) fn new(link_bytes_per_s: f64) -> Self {
        let speeds = CANDIDATES.map(speed).to_vec();
        tracing::info!(?speeds, "measured for the choice of a codec");
        Self { link_bytes_per_s, speeds, steps_s: Vec::new(), windows_s: Vec::new() }
    }

    /// A step that counts took so long without waiting; and gradients whose way ended in it, if some did, could hide in so much.
    pub(super) fn step(&mut self, busy_s: f64, window_s: Option<f64>) {
        self.steps_s.push(busy_s);
        self.windows_s.extend(window_s);
    }

    pub(super) const fn is_complete(&self) -> bool {
        self.steps_s.len() >= MEASURED_STEPS
    }

    /// All of it, for the coordinator.
    pub(super) fn facts(self, plan: &Plan, (members, ranks): (usize, usize), parameters: Option<Codec>) -> CodecFacts {
        let message = |Elements { any, int8_at_least, fp32 }| CodecElements { any, int8_at_least, fp32 };
        let last = plan.buckets().last().map_or(&[][..], |bucket| &bucket.parameters);
        CodecFacts {
            link_bytes_per_s: self.link_bytes_per_s,
            step_s: median(self.steps_s),
            window_s: median(self.windows_s),
            speeds: self.speeds,
            members: members as u32,
            parameters: parameters.map_or_else(String::new, |codec| codec.name().into()),
            ranks: ranks as u32,
            elements: Some(message(count(plan.parts()))),
            last_bucket: Some(message(count(last.iter().map(|&index| &plan.parts()[index])))),
        }
    }
}

/// Measures the link to the other ranks, in bytes a second. All ranks do it together. A test may forge it.
///
/// # Errors
/// A rank is lost.
pub(super) fn link(stepper: &Stepper, forged: Option<f64>) -> Result<f64> {
    let Some(engine) = stepper.engine() else { return Ok(f64::INFINITY) };
    stepper.progress().enter(Stage::Waiting);
    let measured = engine.link_bytes_per_s().map_err(StreamError::from)?;
    tracing::info!(bytes_per_s = measured, "the link was measured");
    Ok(forged.unwrap_or(measured))
}

/// What a codec takes on this core.
fn speed(codec: Codec) -> CodecSpeed {
    // Anything but zeros: values that look like a gradient.
    let gradient: Vec<f32> = (0..PIECE).map(|i| ((i as f32 * 0.37).sin() + 0.1) * 1e-3).collect();
    let (mut values, mut sum) = (gradient.clone(), gradient.clone());
    let mut payload = vec![0; codec.payload_bytes(PIECE)];
    let (mut encode_s, mut decode_add_s) = (Vec::new(), Vec::new());
    for _ in 0..TRIES {
        let start = Instant::now();
        for _ in 0..ELEMENTS / PIECE {
            // What is left over of the last piece does as a gradient too.
            let _ = codec.encode(&mut values, &gradient, &mut payload);
        }
        encode_s.push(start.elapsed().as_secs_f64() / ELEMENTS as f64);
        let read = Payload::new(codec, PIECE, &payload).expect("an encoder's payload");
        let start = Instant::now();
        (0..ELEMENTS / PIECE).for_each(|_| read.decode_add(&mut sum));
        decode_add_s.push(start.elapsed().as_secs_f64() / ELEMENTS as f64);
    }
    std::hint::black_box(sum);
    CodecSpeed { codec: codec.name().into(), encode_s: median(encode_s), decode_add_s: median(decode_add_s) }
}

/// Of no numbers it is 0.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_candidate_has_a_speed() {
        for codec in CANDIDATES {
            let CodecSpeed { codec: name, encode_s, decode_add_s } = speed(codec);
            assert!(name == codec.name() && encode_s > 0.0 && decode_add_s > 0.0, "{codec}: {encode_s} {decode_add_s}");
        }
    }

    #[test]
    fn the_median_of_the_steps_counts() {
        let mut calibration =
            Calibration { link_bytes_per_s: 1.0, speeds: Vec::new(), steps_s: Vec::new(), windows_s: Vec::new() };
        for step_s in [9.0, 1.0, 2.0, 1.5, 1.2] {
            assert!(!calibration.is_complete());
            calibration.step(step_s, Some(step_s / 2.0));
        }
        assert!(calibration.is_complete());
        let facts = calibration.facts(&Plan::new(Vec::new(), 1).expect("empty"), (1, 2), Some(Codec::Int8));
        assert_eq!((facts.step_s, facts.window_s), (1.5, 0.75));
        assert_eq!(facts.parameters, "int8");
        assert_eq!(median(Vec::new()), 0.0);
    }
}
