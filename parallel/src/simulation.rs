//! Whole runs in one thread, in simulated time, with faults, from a seed: either all ranks end with the same bits, or all
//! end with an error that names the guilty one.
//!
//! Buckets, stream, codecs, exchange, engine and coordinator are those of production. Network, clock and threads are not:
//! what happens next is drawn from the seed, so a run that fails can be had again.
//!
//! - [`fault`]: what goes wrong, and what must be said of it.
//! - [`setting`]: a run as a seed draws it.
//! - [`rank`]: one rank's training thread and its line to the coordinator.
//! - [`world`]: everything that happens, in order.

mod fault;
mod rank;
mod setting;
mod world;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use compression::Codec;

use crate::transport::simulated::Random;
use fault::Fault;
use setting::Setting;
use world::World;

/// Seeds that an ordinary test runs.
const FEW: u64 = 150;

/// What a run without delays and faults makes of the parameters, step by step.
type Reference = BTreeMap<Key, Vec<blake3::Hash>>;

/// Ranks, members of a node, codec, what parameters travel in, micro-batches, and the step that is skipped.
type Key = (usize, usize, &'static str, Option<&'static str>, usize, Option<u64>);

/// Runs one seed.
/// Returns what was to happen and whether it did, if anything was.
fn run(seed: u64, references: &Mutex<Reference>) -> Result<Option<(String, bool)>, String> {
    let setting = Setting::drawn(seed);
    let Setting { ranks, members, codec, parameters, micro_batches, .. } = setting;
    let key = (ranks, members, codec.name(), parameters.map(Codec::name), micro_batches, setting.skips());
    let known = references.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
    let expected = match known {
        Some(known) => known,
        None => {
            let calm = World::new(setting.calm()).run().map_err(|error| format!("without faults: {error}"))?;
            references.lock().unwrap_or_else(PoisonError::into_inner).insert(key, calm.clone());
            calm
        }
    };
    let mut world = World::new(setting.clone());
    let found = world.run().map_err(|error| format!("{setting:?}: {error}"))?;
    if expected.starts_with(&found) {
        let kind = format!("{:?}", setting.fault).chars().take_while(char::is_ascii_alphabetic).collect();
        Ok(world.is_struck().map(|struck| (kind, struck)))
    } else {
        Err(format!("{setting:?}: other parameters than without faults"))
    }
}

fn run_all(seeds: std::ops::Range<u64>) {
    let references = Mutex::new(Reference::new());
    let enough = seeds.end - seeds.start >= FEW;
    let next = Mutex::new(seeds);
    // Of each kind of fault, how many runs it has struck, and all.
    let faults = Mutex::new(BTreeMap::<String, [u64; 2]>::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let Some(seed) = next.lock().unwrap_or_else(PoisonError::into_inner).next() else { return };
                    let fault = run(seed, &references).unwrap_or_else(|error| {
                        panic!("seed {seed}: {error}\nonce more: TRIBUTARY_SEEDS={seed}..{} cargo test -p parallel simulation", seed + 1);
                    });
                    if let Some((kind, struck)) = fault {
                        let mut faults = faults.lock().unwrap_or_else(PoisonError::into_inner);
                        let [struck_by_it, all] = faults.entry(kind).or_default();
                        (*struck_by_it, *all) = (*struck_by_it + u64::from(struck), *all + 1);
                    }
                }
            });
        }
    });
    let faults = faults.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!("faults that struck, of all: {faults:?}");
    // Runs whose fault comes too late say nothing of it.
    if enough {
        assert!(faults.values().all(|[struck, all]| 2 * struck > *all), "{faults:?}");
    }
}

/// `TRIBUTARY_SEEDS=0..10000` runs those; docs/testing.md has the command.
#[test]
fn all_ranks_end_with_the_same_bits_or_name_the_guilty_one() {
    let asked = std::env::var("TRIBUTARY_SEEDS").ok();
    let seeds = asked.map(|text| {
        let (from, to) = text.split_once("..").expect("FROM..TO");
        from.parse().expect("a number")..to.parse().expect("a number")
    });
    run_all(seeds.unwrap_or(0..FEW));
}

#[test]
fn a_seed_can_be_had_again() {
    for seed in 0..20 {
        let story = || {
            let mut world = World::new(Setting::drawn(seed));
            let ended = world.run();
            (ended, world.story())
        };
        assert_eq!(story(), story(), "seed {seed}");
    }
}

#[test]
fn owners_that_send_parameters_as_they_are_end_with_the_bits_of_those_that_send_sums() {
    for seed in 0..30 {
        let drawn = Setting { codec: Codec::Fp32, ..Setting::drawn(seed).calm() };
        let end = |parameters| World::new(Setting { parameters, ..drawn.clone() }).run().expect("no fault");
        let sums = end(None);
        assert_eq!(end(Some(Codec::Fp32)), sums, "seed {seed}");
        // The control: in int8 they are others, but for one machine, in which everything travels as it is.
        assert_eq!(end(Some(Codec::Int8)) == sums, drawn.members == drawn.ranks, "seed {seed}");
    }
}

/// The controls: each breaks one thing that the runs rest on, and some seed must notice.
#[test]
fn sums_in_the_order_of_arrival_a_coordinator_that_never_looks_and_a_wrong_name_are_noticed() {
    let some_seed_fails = |breaks: fn(&mut Setting), said: &str| {
        let fails = |seed| {
            let mut setting = Setting::drawn(seed);
            (setting.ranks, setting.codec) = (setting.ranks.max(3), Codec::Fp32);
            breaks(&mut setting);
            let calm = World::new(Setting { by_arrival: false, ..setting.calm() }).run().expect("no fault");
            let found = World::new(setting).run();
            match found {
                Err(error) => error.contains(said),
                Ok(found) => said.is_empty() && !calm.starts_with(&found),
            }
        };
        assert!((0..40).any(fails), "no seed says {said:?}");
    };
    some_seed_fails(|setting| (setting.by_arrival, setting.fault) = (true, Fault::None), "");
    some_seed_fails(
        |setting| (setting.blind, setting.fault, setting.expects) = (true, Fault::Stop(1), Fault::Stop(1)),
        "hangs",
    );
    some_seed_fails(|setting| (setting.fault, setting.expects) = (Fault::Kill(1), Fault::Kill(0)), "does not name");
    some_seed_fails(
        |setting| (setting.fault, setting.expects) = (Fault::Differs(1), Fault::Differs(0)),
        "does not name",
    );
}
