//! SIGKILL in the middle of saves, on a machine that has other things to do, until enough of them have hit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::Signal;

use crate::dying::rounds::Random;
use crate::resume::same_as_uninterrupted;
use crate::support::{Place, end, wait_until};

/// Kills of one run at the most; it is resumed after each.
const KILLS_OF_A_RUN: usize = 4;
/// Of this many kills at least one finds a checkpoint half-written.
const ONE_IN: usize = 2;

/// Somebody else's work: a core that computes, and a disk that syncs.
pub struct Load {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    pub fn begin(place: &Place) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let (computing, syncing, file) = (Arc::clone(&over), Arc::clone(&over), place.path("somebody-elses"));
        let compute = move || {
            while !computing.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        };
        let sync = move || {
            while !syncing.load(Ordering::Relaxed) {
                std::fs::write(&file, vec![1; 1 << 16]).expect("writable");
                std::fs::File::open(&file).and_then(|file| file.sync_all()).expect("it syncs");
            }
        };
        Self { over, threads: vec![std::thread::spawn(compute), std::thread::spawn(sync)] }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

pub fn half_written(place: &Place) -> bool {
    let names = place.names("runs/a/checkpoints");
    names.iter().any(|name| name.ends_with(".partial") || name.ends_with(".replaced"))
}

/// Kills one run up to so often, each time a random while after a save of a random step has begun, resumes it after each,
/// and compares its end with that of the run that nobody disturbs. Returns how many kills there were, and how many of them
/// left a checkpoint half-written.
fn run(seed: u64, kills: usize) -> (usize, usize) {
    let mut random = Random(seed);
    // A disk that is held back makes the writing of files long beside the commit.
    let (limit, micros_max) = [("0", 5_000), ("0", 20_000), ("8000000", 60_000)][random.below(3)];
    let limit = format!("checkpoint.write_bytes_per_s_max={limit}");
    let mut after: Vec<usize> = (0..kills).map(|_| random.below(55)).collect();
    after.sort_unstable();
    let place = Place::new();
    let load = Load::begin(&place);
    let (mut killed, mut hit) = (0, 0);
    for &lines in &after {
        let resume: &[&str] = if killed == 0 { &[] } else { &["--resume"] };
        let mut child = place.start("a", &[&["--set", "checkpoint.every=2", "--set", &limit], resume].concat());
        // What the kill before has left goes when the run begins.
        wait_until(&mut child, || place.lines("a") > 0 && !half_written(&place));
        let began = wait_until(&mut child, || place.lines("a") >= lines && half_written(&place));
        std::thread::sleep(Duration::from_micros(random.below(micros_max) as u64));
        let ran = end(child, Signal::KILL);
        if ran.code.is_some() || !began {
            assert!(ran.code.is_none_or(|code| code == 0), "{}", ran.stderr);
            break;
        }
        killed += 1;
        hit += usize::from(half_written(&place));
    }
    println!("seed {seed}: {killed} kills after lines {after:?}, {limit}: {hit} left a checkpoint half-written");
    drop(load);
    place.train("a", &["--resume"]).ok();
    same_as_uninterrupted(&place, "a");
    assert!(!half_written(&place));
    (killed, hit)
}

/// `TRIBUTARY_KILLS=200 cargo test --workspace --test end_to_end saving::killed -- --nocapture`
#[test]
fn twenty_kills_in_saves_or_as_many_as_are_wanted_end_at_the_same_parameters() {
    as_many_as_are_wanted(20, run);
}

/// Has runs killed until there were `TRIBUTARY_KILLS` kills, or so many. `run` is given its seed and the most kills of it, and
/// returns how many there were, and how many of them left a checkpoint half-written.
pub fn as_many_as_are_wanted(unless_written: usize, run: impl Fn(u64, usize) -> (usize, usize)) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<usize>().expect("a number"));
    let (wanted, first) = (number("TRIBUTARY_KILLS").unwrap_or(unless_written), number("TRIBUTARY_SEED").unwrap_or(1));
    let (mut killed, mut hit) = (0, 0);
    for seed in first..first + 2 * wanted {
        if killed >= wanted {
            break;
        }
        let (kills, hits) = run(seed as u64, KILLS_OF_A_RUN.min(wanted - killed));
        (killed, hit) = (killed + kills, hit + hits);
    }
    println!("{killed} kills, {hit} of them left a checkpoint half-written");
    assert!(killed >= wanted, "only {killed} of {wanted} runs were killed before their end");
    assert!(ONE_IN * hit >= killed, "only {hit} of {killed} kills found a checkpoint half-written");
}
