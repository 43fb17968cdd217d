//! Machines with folders of their own that go on on another mesh: parts of the model, moments, masters, and what was left out,
//! from whichever machine has them.

use crate::joining::coordinator;
use crate::processes::{Job, nobody_is_left};
use crate::ranks::WIDE;
use crate::support::{Place, Ran};

/// The mesh on which machines go on, whose folder each of its ranks sees, and until which step.
struct Stage {
    machines: &'static [&'static str],
    sets: &'static [&'static str],
    stop: u64,
}

const fn stage(machines: &'static [&'static str], sets: &'static [&'static str], stop: u64) -> Stage {
    Stage { machines, sets, stop }
}

impl Stage {
    fn args(&self, more: &[&str]) -> Vec<String> {
        let stop = format!("train.stop_at_step={}", self.stop);
        let sets = self.sets.iter().copied().chain([&*stop]);
        sets.flat_map(|set| ["--set", set]).chain(more.iter().copied()).map(String::from).collect()
    }

    /// A coordinator, and a worker in the folder of its machine for each rank, to their ends.
    #[track_caller]
    fn gather(&self, place: &Place, faults: &str, more: &[&str]) -> Vec<Ran> {
        let args = self.args(more);
        let (job, address) = coordinator(place, &args.iter().map(String::as_str).collect::<Vec<_>>());
        let worker = |(rank, machine): (usize, &&str)| {
            let (rank, runs) = (rank.to_string(), format!("metrics.runs_dir=runs/{machine}"));
            let mut command = place.command(&["worker", "--join", &address, "--rank", &rank, "--set", &runs]);
            command.env("TRIBUTARY_FAULTS", faults);
            Job::spawn(place, command)
        };
        let workers: Vec<Job> = self.machines.iter().enumerate().map(worker).collect();
        let mut rans: Vec<Ran> = workers.into_iter().map(Job::end).collect();
        rans.push(job.end());
        nobody_is_left(&place.path(""));
        rans
    }
}

/// Goes from stage to stage in folders of the machines, and in one folder that all share, and comes to the same, bit for bit.
#[track_caller]
fn as_in_one_folder(place: &Place, name: &str, stages: &[Stage]) {
    for (number, stage) in stages.iter().enumerate() {
        let resume: &[&str] = if number > 0 { &["--resume"] } else { &[] };
        stage.gather(place, "", resume).into_iter().for_each(|ran| _ = ran.ok());
        let args = stage.args(resume);
        place.train("shared", &args.iter().map(String::as_str).collect::<Vec<_>>()).ok();
        let (apart, shared) = (place.curve("one/a"), place.curve("shared"));
        assert_eq!(apart.len(), stage.stop as usize, "{name}, until step {}", stage.stop);
        assert_eq!(apart, shared, "{name}, until step {}", stage.stop);
        let hash = |run: &str| place.summary(run)["parameter_hash"].clone();
        assert!(hash("shared").is_string());
        assert_eq!(hash("one/a"), hash("shared"), "{name}, until step {}", stage.stop);
    }
}

const TENSOR: [&str; 3] = ["parallel.data=1", "parallel.tensor=2", "train.micro_batches=4"];
const DATA: [&str; 3] = ["parallel.data=2", "parallel.tensor=1", "train.micro_batches=2"];
const BOTH: [&str; 3] = ["parallel.data=2", "parallel.tensor=2", "train.micro_batches=2"];
const SHARDED: [&str; 4] = ["parallel.data=2", "parallel.tensor=1", "train.micro_batches=2", "optimizer.sharded=true"];
const SHARDED_MASTERS: [&str; 5] = [
    "parallel.data=2",
    "parallel.tensor=1",
    "train.micro_batches=2",
    "optimizer.sharded=true",
    "compression.parameter_codec=int8",
];
const SHARDED_SLICES: [&str; 5] = [
    "parallel.data=2",
    "parallel.tensor=2",
    "train.micro_batches=2",
    "optimizer.sharded=true",
    "compression.parameter_codec=int8",
];
/// Two layers, one for each stage.
const STAGES: [&str; 4] =
    ["model.num_hidden_layers=2", "parallel.data=1", "parallel.pipeline=2", "train.micro_batches=4"];
const STAGES_TWICE: [&str; 4] =
    ["model.num_hidden_layers=2", "parallel.data=2", "parallel.pipeline=2", "train.micro_batches=2"];
const DATA_OF_STAGES: [&str; 3] = ["model.num_hidden_layers=2", "parallel.data=2", "train.micro_batches=2"];
const SLICES_OF_STAGES: [&str; 4] =
    ["model.num_hidden_layers=2", "parallel.data=1", "parallel.tensor=2", "train.micro_batches=4"];
/// Three owners of norms that have two blocks: one of them owns nothing of a norm, which its folder may not name.
const SHARDED_THREE_OF_STAGES: [&str; 4] =
    ["model.num_hidden_layers=2", "parallel.data=3", "parallel.micro_batches=[2,1,1]", "optimizer.sharded=true"];
const SHARDED_THREE: [&str; 5] = [
    "parallel.data=3",
    "parallel.tensor=1",
    "parallel.micro_batches=[2,1,1]",
    "optimizer.sharded=true",
    "compression.parameter_codec=int8",
];

#[test]
fn slices_on_two_machines_become_whole_models_and_slices_again() {
    let place = Place::with(WIDE);
    as_in_one_folder(
        &place,
        "tensor 2 to data 2 and back",
        &[stage(&["one", "two"], &TENSOR, 4), stage(&["one", "two"], &DATA, 8), stage(&["one", "two"], &TENSOR, 12)],
    );
}

#[test]
fn slices_of_two_replicas_and_what_they_left_out_go_to_machines_that_had_none_of_it() {
    let place = Place::with(WIDE);
    as_in_one_folder(
        &place,
        "2 x 1 x 2 and back",
        &[
            // Each machine has one slice of both replicas, then each a replica, then whole models.
            stage(&["one", "two", "one", "two"], &BOTH, 4),
            stage(&["one", "one", "two", "two"], &BOTH, 7),
            stage(&["one", "two"], &DATA, 10),
            stage(&["one", "two", "two", "one"], &BOTH, 12),
        ],
    );
}

#[test]
fn stages_on_two_machines_become_whole_models_and_stages_again() {
    let place = Place::with(WIDE);
    as_in_one_folder(
        &place,
        "pipeline 2 to data 2, to both, to tensor 2 and back",
        &[
            stage(&["one", "two"], &STAGES, 3),
            stage(&["one", "two"], &DATA_OF_STAGES, 6),
            // Each machine has one stage of both replicas.
            stage(&["one", "two", "one", "two"], &STAGES_TWICE, 9),
            stage(&["one", "two"], &SLICES_OF_STAGES, 11),
            stage(&["one", "two"], &STAGES, 13),
        ],
    );
}

#[test]
fn what_owners_have_of_a_sharded_optimiser_goes_to_slices_and_back() {
    let place = Place::with(WIDE);
    as_in_one_folder(
        &place,
        "sharded 2 to tensor 2 and back",
        &[
            stage(&["one", "two"], &SHARDED, 4),
            stage(&["one", "two"], &TENSOR, 8),
            stage(&["one", "two"], &SHARDED, 12),
            stage(&["one", "one", "two", "two"], &SHARDED_SLICES, 14),
            stage(&["one", "two", "one", "two"], &SHARDED_SLICES, 16),
        ],
    );
}

#[test]
fn stages_go_to_more_owners_than_a_norm_has_blocks() {
    let place = Place::with(WIDE);
    as_in_one_folder(
        &place,
        "pipeline 2 to sharded 3",
        &[stage(&["one", "two"], &STAGES, 3), stage(&["one", "two", "two"], &SHARDED_THREE_OF_STAGES, 5)],
    );
}

#[test]
fn moments_and_masters_of_two_owners_go_to_three_and_back() {
    let place = Place::with(WIDE);
    as_in_one_folder(
        &place,
        "sharded 2 to sharded 3 and back",
        &[
            stage(&["one", "two"], &SHARDED_MASTERS, 4),
            stage(&["one", "two", "two"], &SHARDED_THREE, 8),
            stage(&["one", "two"], &SHARDED_MASTERS, 12),
        ],
    );
}

#[test]
fn a_slice_that_no_machine_has_any_more_is_named_with_its_host_and_nothing_starts() {
    let place = Place::with(WIDE);
    stage(&["one", "two"], &TENSOR, 4).gather(&place, "", &[]).into_iter().for_each(|ran| _ = ran.ok());
    let copy = |from: &str, to: &str| {
        let copied = std::process::Command::new("cp").args(["-r", from, to]).current_dir(place.path("")).status();
        assert!(copied.expect("cp").success());
    };
    copy("runs/two", "kept");
    std::fs::remove_dir_all(place.path("runs/two")).expect("ours");
    copy("runs/one", "runs/two");
    let host = crate::dying::hostname();
    let gone = format!("what rank 1 wrote on host {host} is in no run folder of the ranks that are here");
    let said = ["its checkpoint of step 4 is of 2 ranks", &gone, "are missing", "start a worker on that machine too"];
    for next in [stage(&["one", "two"], &DATA, 8), stage(&["one", "two"], &TENSOR, 8), stage(&["one", "one"], &DATA, 8)]
    {
        for ran in next.gather(&place, "", &["--resume"]) {
            ran.failed(2, &said);
        }
    }
    assert_eq!(place.names("runs/one/a/checkpoints"), ["step-00000004"]);
    // One process alone says what it lacks.
    let alone = ["--resume", "--set", "metrics.runs_dir=runs/one", "--set", "parallel.data=1", "--set"];
    let alone = [&alone[..], &["train.micro_batches=4"]].concat();
    place.train("a", &alone).failed(2, &said);
    // The control: with the machine that has it.
    std::fs::remove_dir_all(place.path("runs/two")).expect("ours");
    copy("kept", "runs/two");
    let next = stage(&["one", "two"], &DATA, 8);
    next.gather(&place, "", &["--resume"]).into_iter().for_each(|ran| _ = ran.ok());
}
