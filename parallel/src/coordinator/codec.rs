//! Which codec all ranks are to use: chosen from what all of them measured, by the slowest link and the slowest rank.

use compression::Codec;
use compression::cost::{CANDIDATES, Choice, Elements, Facts, Speed, choose};

use crate::wire::control::{CodecChoice, CodecElements, CodecFacts, CodecPrediction, CodecSpeed};

/// What the ranks have measured so far.
#[derive(Debug)]
pub(super) struct Calibration {
    facts: Vec<Option<CodecFacts>>,
    chosen: bool,
}

impl Calibration {
    pub(super) fn new(ranks: usize) -> Self {
        Self { facts: vec![None; ranks], chosen: false }
    }

    /// A rank's facts are here. When all ranks' are, the choice is made, once for the life of the group.
    pub(super) fn take(&mut self, rank: usize, facts: CodecFacts) -> Option<CodecChoice> {
        if self.chosen {
            tracing::warn!(rank, "facts about codecs after the choice are ignored");
            return None;
        }
        self.facts[rank] = Some(facts);
        let all: Vec<&CodecFacts> = self.facts.iter().flatten().collect();
        if all.len() < self.facts.len() {
            return None;
        }
        self.chosen = true;
        Some(message(choose(&slowest(&all))))
    }
}

/// What counts of all ranks' facts: the slowest link, the slowest rank, the slowest codecs, the shortest window.
fn slowest(all: &[&CodecFacts]) -> Facts {
    // Not a number counts as the worst: a minimum of zero, a maximum of infinity.
    let least = |of: fn(&CodecFacts) -> f64| {
        all.iter().map(|facts| of(facts)).map(|x| if x.is_nan() { 0.0 } else { x }).fold(f64::INFINITY, f64::min)
    };
    let most = |values: &mut dyn Iterator<Item = f64>| {
        values.map(|x| if x.is_nan() { f64::INFINITY } else { x }).fold(0.0, f64::max)
    };
    let speed = |codec: Codec| {
        let of = |facts: &&CodecFacts| facts.speeds.iter().find(|speed| speed.codec == codec.name()).cloned();
        let speeds: Vec<CodecSpeed> = all.iter().filter_map(of).collect();
        // One that a rank has not measured is no candidate.
        (speeds.len() == all.len()).then(|| Speed {
            codec,
            encode_s: most(&mut speeds.iter().map(|speed| speed.encode_s)),
            decode_add_s: most(&mut speeds.iter().map(|speed| speed.decode_add_s)),
        })
    };
    // The same on all ranks: their recipes are.
    let elements = |of: fn(&CodecFacts) -> Option<CodecElements>| {
        let CodecElements { any, int8_at_least, fp32 } = all.first().and_then(|facts| of(facts)).unwrap_or_default();
        Elements { any, int8_at_least, fp32 }
    };
    let sums = all.first().map_or(0, |facts| facts.ranks as usize);
    let members = all.first().map_or(1, |facts| facts.members.max(1) as usize);
    Facts {
        ranks: if sums == 0 { all.len() } else { sums.min(all.len()) },
        members,
        link_bytes_per_s: least(|facts| facts.link_bytes_per_s),
        elements: elements(|facts| facts.elements),
        last_bucket: elements(|facts| facts.last_bucket),
        step_s: most(&mut all.iter().map(|facts| facts.step_s)),
        window_s: least(|facts| facts.window_s),
        // The same on all ranks, as above.
        parameters: all.first().and_then(|facts| Codec::from_name(&facts.parameters)),
        speeds: CANDIDATES.into_iter().filter_map(speed).collect(),
    }
}

fn message(choice: Choice) -> CodecChoice {
    let prediction =
        |one: &compression::cost::Prediction| CodecPrediction { codec: one.codec.name().into(), step_s: one.step_s };
    CodecChoice {
        codec: choice.codec.name().into(),
        reason: choice.reason,
        predictions: choice.predictions.iter().map(prediction).collect(),
    }
}
