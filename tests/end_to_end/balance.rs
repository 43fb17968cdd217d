//! No rank sends or receives more than 1.1 times the mean of all, by the plan and at the sockets.

use std::path::Path;

use compression::Codec;
use parallel::data::plan::Parameter;
use parallel::data::rules::codec_of;
use parallel::data::shard::{payload_bytes_sent, shard};
use trainer::model::Config;
use trainer::recipe::resolved::TokenizerSource;

use crate::ranks::WIDE;
use crate::support::Place;

/// The largest of these numbers over their mean.
fn over_mean(bytes: &[usize]) -> f64 {
    let sum: usize = bytes.iter().sum();
    *bytes.iter().max().expect("a rank") as f64 * bytes.len() as f64 / sum as f64
}

const MOST: f64 = 1.1;

/// The parameters of every recipe, with the vocabulary that it asks for.
fn models() -> Vec<(String, Vec<Parameter>)> {
    let recipes = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../recipes"));
    let model = |entry: std::fs::DirEntry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(entry.path()).expect("readable");
        let (_, recipe) = trainer::recipe::read(&name, &text, &[]).expect("every recipe parses");
        let TokenizerSource::Train { vocab_size } = recipe.tokenizer.source else { return None };
        let config = Config::from_keys(&recipe.model, vocab_size, recipe.train.seq_len, None)?;
        Some((name, config.parameters()))
    };
    std::fs::read_dir(recipes).expect("a folder").flatten().filter_map(model).collect()
}

/// Payload bytes that each rank sends in a step, and that each receives.
fn planned(parameters: &[Parameter], codec: Codec, ranks: usize) -> [Vec<usize>; 2] {
    let elements = |parameter: &Parameter| parameter.shape.iter().product();
    let tensors: Vec<(usize, Codec)> = parameters.iter().map(|p| (elements(p), codec_of(p, codec))).collect();
    let sent = (0..ranks).map(|rank| payload_bytes_sent(&tensors, rank, ranks)).collect();
    // From each other rank the part of it that this one owns; from each other owner its sum.
    let received = |rank: usize| {
        let of = |&(elements, codec): &(usize, Codec)| {
            let own = (ranks - 1) * codec.payload_bytes(shard(elements, rank, ranks).len());
            let others = (0..ranks).filter(|&owner| owner != rank);
            let sums = others.map(|owner| codec.second_stage().payload_bytes(shard(elements, owner, ranks).len()));
            own + sums.sum::<usize>()
        };
        tensors.iter().map(of).sum()
    };
    [sent, (0..ranks).map(received).collect()]
}

#[test]
fn by_the_plan_no_rank_sends_or_receives_more_than_a_tenth_above_the_mean() {
    let models = models();
    assert!(models.len() >= 3, "{:?}", models.iter().map(|(name, _)| name).collect::<Vec<_>>());
    for (name, parameters) in &models {
        for codec in Codec::ALL {
            for ranks in 2..=16 {
                let [sent, received] = planned(parameters, codec, ranks);
                assert_eq!(
                    sent.iter().sum::<usize>(),
                    received.iter().sum::<usize>(),
                    "what one sends another receives"
                );
                for (way, bytes) in [("sent", sent), ("received", received)] {
                    assert!(over_mean(&bytes) <= MOST, "{name}, {codec}, {ranks} ranks, {way}: {bytes:?}");
                }
            }
            // The control: one rank that owned everything would send and receive far more.
            let all: usize = parameters.iter().map(|p| p.shape.iter().product::<usize>()).sum();
            let [first, second] = [codec, codec.second_stage()].map(|codec| codec.payload_bytes(all));
            assert!(over_mean(&[3 * second, first, first, first]) > MOST, "{name}, {codec}");
        }
    }
}

/// Bytes that the ranks of a run counted at their sockets until they had said goodbye, as their logs have them.
pub fn at_the_sockets(place: &Place, run: &str, ranks: usize, key: &str) -> Vec<usize> {
    let of = |rank: usize| {
        let log = std::fs::read_to_string(place.path(&format!("runs/{run}/logs/rank-{rank}.log"))).expect("a log");
        let line = log.lines().find(|line| line.contains("bytes at the sockets in all")).expect("the totals");
        let number = line.split(&format!("{key}=")).nth(1).expect(key);
        number.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number")
    };
    (0..ranks).map(of).collect()
}

#[test]
fn at_the_sockets_of_four_ranks_none_sends_or_receives_more_than_a_tenth_above_the_mean() {
    let place = Place::with(WIDE);
    for codec in [Codec::Int8, Codec::Int4] {
        let (name, set) = (codec.name(), format!("compression.codec={codec}"));
        place.train(name, &["--set", "parallel.data=4", "--set", &set]).ok();
        for key in ["sent", "received"] {
            let bytes = at_the_sockets(&place, name, 4, key);
            assert!(over_mean(&bytes) <= MOST, "{codec}, {key}: {bytes:?}");
        }
    }
}
