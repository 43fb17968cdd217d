//! Random victims, random moments.

use std::time::Duration;

use rustix::process::Signal;

use super::{Launcher, RANKS, STEPS, Worker, resumes_bitwise, strike, train};
use crate::processes::Job;
use crate::support::Place;

/// Numbers from a seed (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % bound as u64) as usize
    }
}

/// Strikes a random victim of two or three ranks at a random moment, with SIGKILL or SIGSTOP, and resumes.
fn round(seed: u64) {
    let mut random = Random(seed);
    let (ranks, signal) = (2 + random.below(2), [Signal::KILL, Signal::STOP][random.below(2)]);
    let (who, lines, micros) = (random.below(ranks + 1), random.below(STEPS - 10), random.below(20_000));
    let victim = if who == ranks { Launcher } else { Worker(who) };
    print!("seed {seed}: {ranks} ranks, after {lines} lines and {micros} µs: ");
    for _ in 0..10 {
        let place = Place::with(RANKS);
        let moment = |job: &Job, place: &Place| {
            let is_there =
                place.lines("a") >= lines && (victim == Launcher || (0..ranks).all(|r| job.worker(r).is_some()));
            if is_there {
                // A random moment inside of a step.
                std::thread::sleep(Duration::from_micros(micros as u64));
            }
            is_there
        };
        if strike(train(&place, ranks, &[]), &place, victim, signal, moment).is_some() {
            return resumes_bitwise(&place, ranks);
        }
    }
    panic!("ten runs ended before the moment came");
}

/// `TRIBUTARY_ROUNDS=20 cargo test --workspace --test end_to_end dying::rounds -- --nocapture`
#[test]
fn five_or_as_many_as_are_wanted() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let (count, first) = (number("TRIBUTARY_ROUNDS").unwrap_or(5), number("TRIBUTARY_SEED").unwrap_or(1));
    (first..first + count).for_each(round);
}
