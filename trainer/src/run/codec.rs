//! Which codec gradients travel in, step by step: what the recipe says, the warm-up, and the choice of `auto`.
//!
//! With `compression.codec = "auto"` the first steps travel in `int8` and are measured. Then every rank tells the
//! coordinator its facts; the coordinator chooses for all; rank 0 puts the choice into its next ballot, and all ranks
//! follow it from the step after that one. So they switch together, and a checkpoint knows of it.
//!
//! - [`Course`]: the codec of a step, a pure function of recipe, choice and step.
//! - `measure`: what a rank measures for the choice.

mod measure;

use std::time::Duration;

use compression::Codec;
use compression::cost::{int8_at_least, may_be_chosen};
use parallel::data::engine::Packed;
use parallel::data::engine::packing::Change;
use parallel::progress::Stage;
use parallel::wire::control::CodecChoice as Message;
use parallel::wire::control::from_worker::What as From;
use serde_json::{Value, json};

use super::Run;
use crate::error::{Error, Result};
use crate::recipe::Recipe;
use crate::recipe::resolved::{CodecChoice, Compression, Parallel, Zstd};
use crate::state::Chosen;
use crate::step::Report;

use measure::Calibration;

/// What the steps that are measured travel in: not much of a loss, and a quarter of the bytes, however slow the link.
const MEASURED_IN: Codec = Codec::Int8;
/// Steps that are measured; of every number the median counts, for the first steps are not like the others.
pub const MEASURED_STEPS: usize = 5;
/// How often a rank that waits for the choice looks.
const LOOK: Duration = Duration::from_millis(20);

/// What decides the codec of every step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Course {
    /// What the recipe says.
    pub asked: Compression,
    /// What was chosen, where the recipe leaves it open.
    pub chosen: Option<Chosen>,
    /// All ranks are one machine, whatever the recipe says.
    pub one_machine: bool,
}

/// The codec of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// In force.
    pub codec: Codec,
    /// Why it, or the one that follows the warm-up.
    pub why: Why,
    /// What follows the warm-up, while that lasts.
    pub then: Option<Codec>,
}

/// Why a codec is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The recipe names it.
    Recipe,
    /// The choice is still to be made.
    Measuring,
    /// It was chosen.
    Chosen(Chosen),
    /// All ranks are one machine, and nothing leaves it.
    OneMachine,
}

impl Course {
    /// The codec of a step, counted from 1. The first `compression.warmup_steps` steps of a run travel in `int8` where the
    /// codec has fewer bits.
    #[must_use]
    pub fn at(&self, step: u64) -> Now {
        if self.one_machine {
            return Now { codec: Codec::Fp32, why: Why::OneMachine, then: None };
        }
        let (codec, why) = match (self.asked.codec, self.chosen) {
            (CodecChoice::Fixed(codec), _) => (codec, Why::Recipe),
            (CodecChoice::Auto, Some(chosen)) => (chosen.codec, Why::Chosen(chosen)),
            (CodecChoice::Auto, None) => (MEASURED_IN, Why::Measuring),
        };
        let first = int8_at_least(codec);
        match step <= self.asked.warmup_steps && first != codec {
            true => Now { codec: first, why, then: Some(codec) },
            false => Now { codec, why, then: None },
        }
    }

    /// Whether there is a choice to be made.
    fn is_open(&self) -> bool {
        self.asked.codec == CodecChoice::Auto && self.chosen.is_none() && !self.one_machine
    }
}

/// What one rank of several knows of the codec.
#[derive(Debug)]
pub struct Codecs {
    course: Course,
    /// Of the last step that was begun.
    last: Option<Now>,
    calibration: Option<Calibration>,
    /// The coordinator's choice, and whether a ballot has carried it.
    heard: Option<Message>,
    said: bool,
}

impl Codecs {
    /// What a run starts with. `chosen` is what its checkpoint holds, unless it is to be chosen anew.
    #[must_use]
    pub fn new(asked: Compression, chosen: Option<Chosen>) -> Self {
        let chosen = chosen.filter(|_| asked.codec == CodecChoice::Auto);
        Self {
            course: Course { asked, chosen, one_machine: false },
            last: None,
            calibration: None,
            heard: None,
            said: false,
        }
    }

    /// All ranks are one machine.
    #[must_use]
    pub const fn on_one_machine(mut self) -> Self {
        self.course.one_machine = true;
        self
    }

    /// The codec of the last step that was begun, or of the one that will be the first.
    #[must_use]
    pub fn codec(&self, next: u64) -> Codec {
        self.last.unwrap_or_else(|| self.course.at(next)).codec
    }

    /// The choice that is followed.
    #[must_use]
    pub const fn chosen(&self) -> Option<Chosen> {
        self.course.chosen
    }

    /// What rank 0 says in its next ballot, once.
    pub(super) fn take_word(&mut self, rank: usize) -> Option<Codec> {
        let codec = self.heard.as_ref().filter(|_| rank == 0 && !self.said).and_then(chosen_codec)?;
        self.said = true;
        Some(codec)
    }

    /// Why, for people.
    fn reason(&self, now: &Now) -> String {
        let heard = self.heard.as_ref().map(|heard| &heard.reason);
        let mut reason = match (now.why, heard) {
            (Why::Recipe, _) => "the recipe says so".into(),
            (Why::OneMachine, _) => "all ranks are one machine, and nothing leaves it".into(),
            (Why::Measuring, _) => format!("until {MEASURED_STEPS} steps are measured, for the choice of auto"),
            (Why::Chosen(_), Some(reason)) => reason.clone(),
            (Why::Chosen(chosen), None) => format!("it was chosen at step {}, as the checkpoint says", chosen.step),
        };
        if let Some(then) = now.then {
            let until = self.course.asked.warmup_steps;
            reason += &format!("; {} until step {until}, the end of the warm-up, then {then}", now.codec);
        }
        reason
    }

    /// The predictions that go with a choice of this process.
    fn predictions(&self, now: &Now) -> Value {
        match (&self.heard, now.why) {
            (Some(heard), Why::Chosen(_)) => heard
                .predictions
                .iter()
                .map(|one| (one.codec.clone(), json!(one.step_s)))
                .collect::<serde_json::Map<_, _>>()
                .into(),
            _ => Value::Null,
        }
    }
}

/// The codec that a choice names, if it is one that may be chosen.
fn chosen_codec(choice: &Message) -> Option<Codec> {
    Codec::from_name(&choice.codec).filter(|&codec| may_be_chosen(codec))
}

/// Whether a message is a choice that can be followed.
pub(super) fn may_be(choice: &Message) -> bool {
    chosen_codec(choice).is_some()
}

impl Run {
    /// Measures what is needed before the first step: the link, for a codec that is still to be chosen and for zstd. All
    /// ranks do it together.
    ///
    /// # Errors
    /// A rank is lost.
    pub(super) fn measure_link(&mut self) -> Result<()> {
        let Some(codecs) = &mut self.codecs else { return Ok(()) };
        let packs = self.recipe.compression.zstd == Zstd::Auto && !codecs.course.one_machine;
        if !codecs.course.is_open() && !packs {
            return Ok(());
        }
        let link_bytes_per_s = measure::link(&self.stepper, self.tamper.link_bytes_per_s)?;
        if codecs.course.is_open() {
            codecs.calibration = Some(Calibration::new(link_bytes_per_s));
        }
        if let Some(engine) = self.stepper.engine().filter(|_| packs) {
            engine.pack(link_bytes_per_s).map_err(Error::io("take memory for zstd in", "this process"))?;
        }
        Ok(())
    }

    /// Says which buckets zstd packs from now on, or no longer, and why.
    pub(super) fn note_zstd(&mut self, packed: Option<&Packed>) {
        let Some(packed) = packed else { return };
        self.zstd_buckets = packed.buckets;
        for Change { bucket, decision } in &packed.changes {
            let fields = json!({ "bucket": bucket, "packs": decision.packs, "reason": decision.reason });
            self.event("zstd", self.state.step, fields);
        }
    }

    /// Puts the codec of the step that is about to begin in force, and says so where it is another one, or the first.
    pub(super) fn put_codec_in_force(&mut self, step: u64) {
        let Some(codecs) = &mut self.codecs else { return };
        let now = codecs.course.at(step);
        if codecs.last.replace(now) == Some(now) {
            return;
        }
        self.stepper.set_codec(now.codec);
        let (reason, predictions) = (codecs.reason(&now), codecs.predictions(&now));
        let fields = json!({ "codec": now.codec, "reason": reason, "predictions": predictions });
        self.event("codec", step, fields);
        self.say(&format!("gradients travel as {} from step {step} on: {reason}", now.codec));
    }

    /// Takes what a step says of the codec: what rank 0's ballot carried, and what the step took.
    pub(super) fn learn_codec(&mut self, report: &Report) {
        let step = self.state.step;
        let Some(codecs) = &mut self.codecs else { return };
        if let Some(codec) = report.codec_chosen {
            codecs.course.chosen = Some(Chosen { codec, step });
        }
        if let Some(calibration) = codecs.calibration.as_mut().filter(|_| !report.skipped) {
            calibration.step(self.tamper.step_s.unwrap_or(report.step_s - report.wait_s), report.window_s);
        }
    }

    /// Once enough steps are measured, tells the coordinator; rank 0 waits for its choice, so that it is known which step
    /// it begins with. Everybody's heartbeat bounds that.
    ///
    /// # Errors
    /// The run has ended for everybody.
    pub(super) fn agree_on_codec(&mut self) -> Result<()> {
        let (Some(codecs), Some(group)) = (&mut self.codecs, &self.group) else { return Ok(()) };
        let Some(calibration) = codecs.calibration.take_if(|calibration| calibration.is_complete()) else {
            return Ok(());
        };
        let Recipe { parallel: Parallel { data, group: members, .. }, optimizer, .. } = &self.recipe;
        let facts = calibration.facts(self.stepper.plan(), (*members, *data), optimizer.sharded);
        group.control.say(From::CodecFacts(facts));
        if group.share.rank == 0 {
            self.stepper.progress().enter(Stage::Waiting);
            while self.codecs.as_ref().is_some_and(|codecs| codecs.heard.is_none()) {
                self.listen(LOOK)?;
            }
        }
        Ok(())
    }

    /// The coordinator has chosen.
    pub(super) fn hear_codec(&mut self, choice: Message) {
        if let Some(codecs) = &mut self.codecs {
            codecs.heard = Some(choice);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn course(codec: CodecChoice, warmup_steps: u64, chosen: Option<Codec>) -> Course {
        let chosen = chosen.map(|codec| Chosen { codec, step: 6 });
        Course { asked: Compression { codec, warmup_steps, zstd: Zstd::Off, threads: 0 }, chosen, one_machine: false }
    }

    #[test]
    fn the_warm_up_is_int8_for_codecs_of_fewer_bits_and_no_others() {
        use Codec::{Bf16, Fp32, Int4, Int8, Sparse24Int4, Sparse24Int8};
        let table =
            [(Fp32, Fp32), (Bf16, Bf16), (Int8, Int8), (Sparse24Int8, Int8), (Int4, Int8), (Sparse24Int4, Int8)];
        for (codec, first) in table {
            let course = course(CodecChoice::Fixed(codec), 3, None);
            let codecs: Vec<Codec> = (1..=6).map(|step| course.at(step).codec).collect();
            assert_eq!(codecs, [first, first, first, codec, codec, codec]);
            assert_eq!(course.at(3).then, (first != codec).then_some(codec));
            assert_eq!(course.at(4).then, None);
        }
        let without = course(CodecChoice::Fixed(Int4), 0, None);
        assert_eq!(without.at(1), Now { codec: Int4, why: Why::Recipe, then: None });
    }

    #[test]
    fn auto_is_measured_in_int8_and_then_what_was_chosen() {
        let open = course(CodecChoice::Auto, 0, None);
        assert!(open.is_open());
        assert_eq!(open.at(1), Now { codec: Codec::Int8, why: Why::Measuring, then: None });
        let chosen = course(CodecChoice::Auto, 8, Some(Codec::Int4));
        assert!(!chosen.is_open());
        assert_eq!((chosen.at(8).codec, chosen.at(8).then), (Codec::Int8, Some(Codec::Int4)));
        assert_eq!((chosen.at(9).codec, chosen.at(9).then), (Codec::Int4, None));
        assert_eq!(course(CodecChoice::Auto, 8, Some(Codec::Fp32)).at(7).codec, Codec::Fp32);
    }

    #[test]
    fn rank_0_says_what_it_heard_once_and_no_other_rank_says_it() {
        let message = |codec: &str| Message { codec: codec.into(), reason: "so".into(), predictions: Vec::new() };
        let mut codecs =
            Codecs::new(Compression { codec: CodecChoice::Auto, warmup_steps: 0, zstd: Zstd::Off, threads: 0 }, None);
        assert_eq!(codecs.take_word(0), None);
        codecs.heard = Some(message("int4"));
        assert_eq!(codecs.take_word(1), None);
        assert_eq!((codecs.take_word(0), codecs.take_word(0)), (Some(Codec::Int4), None));
        for no in ["int3", "sparse24-int4", "auto", ""] {
            assert_eq!(chosen_codec(&message(no)), None, "{no}");
        }
    }

    #[test]
    fn a_recipe_that_names_a_codec_forgets_an_older_choice() {
        let chosen = Some(Chosen { codec: Codec::Int4, step: 6 });
        let fixed = Codecs::new(
            Compression { codec: CodecChoice::Fixed(Codec::Bf16), warmup_steps: 0, zstd: Zstd::Off, threads: 0 },
            chosen,
        );
        assert_eq!((fixed.codec(7), fixed.chosen()), (Codec::Bf16, None));
        let auto =
            Codecs::new(Compression { codec: CodecChoice::Auto, warmup_steps: 0, zstd: Zstd::Off, threads: 0 }, chosen);
        assert_eq!((auto.codec(7), auto.chosen()), (Codec::Int4, chosen));
    }
}
