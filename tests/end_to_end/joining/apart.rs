//! Machines with folders of their own, whose ranks change or whose checkpoints are damaged.

use crate::dying::{RANKS, outcome, undisturbed};
use crate::joining::{APART, coordinator, gathered};
use crate::processes::{Job, nobody_is_left};
use crate::resharding::until;
use crate::resume::spoil;
use crate::support::{Place, Ran};

/// A coordinator, and a worker in the folder of a machine for each rank, to their ends.
#[track_caller]
fn gather(place: &Place, machines: &[&str], stop: u64, faults: &str, more: &[&str]) -> Vec<Ran> {
    let until = until(machines.len(), stop);
    let args: Vec<&str> = until.iter().map(String::as_str).chain(more.iter().copied()).collect();
    let (job, address) = coordinator(place, &args);
    let worker = |(rank, machine): (usize, &&str)| {
        let (rank, runs) = (rank.to_string(), format!("metrics.runs_dir=runs/{machine}"));
        let mut command = place.command(&["worker", "--join", &address, "--rank", &rank, "--set", &runs]);
        command.env("TRIBUTARY_FAULTS", faults);
        Job::spawn(place, command)
    };
    let workers: Vec<Job> = machines.iter().enumerate().map(worker).collect();
    let mut rans: Vec<Ran> = workers.into_iter().map(Job::end).collect();
    rans.push(job.end());
    nobody_is_left(&place.path(""));
    rans
}

fn all_ok(rans: Vec<Ran>) {
    rans.into_iter().for_each(|ran| _ = ran.ok());
}

#[test]
fn what_another_machine_has_is_brought_from_there_so_that_ranks_may_change_bit_for_bit_as_with_one_folder() {
    let place = Place::with(RANKS);
    let machines: [(&[&str], u64); 3] =
        [(&["one", "two"], 5), (&["one", "one", "two", "two"], 8), (&["one", "two", "one"], 12)];
    for (machines, stop) in machines {
        let resume: &[&str] = if stop > 5 { &["--resume"] } else { &[] };
        all_ok(gather(&place, machines, stop, "", resume));
        // The same in one folder.
        let until = until(machines.len(), stop);
        let args: Vec<&str> = until.iter().map(String::as_str).chain(resume.iter().copied()).collect();
        place.train("shared", &args).ok();
        let (apart, shared) = (outcome(&place, "one/a"), outcome(&place, "shared"));
        assert_eq!(apart, shared, "{} ranks", machines.len());
    }
    let recuts = place.events("one/a").into_iter().filter(|event| event["event"] == "recut");
    assert!(recuts.map(|event| event["residuals"].clone()).eq(["folded", "folded"]));
    // The control: what one machine has left out counts.
    let shared = outcome(&place, "shared");
    let place = Place::with(RANKS);
    for (machines, stop, faults) in [(machines[0].0, 5, ""), (machines[1].0, 8, "forget-owner")] {
        let resume: &[&str] = if stop > 5 { &["--resume"] } else { &[] };
        all_ok(gather(&place, machines, stop, faults, resume));
    }
    all_ok(gather(&place, machines[2].0, 12, "", &["--resume"]));
    assert_ne!(outcome(&place, "one/a").1, shared.1);
}

#[test]
fn ranks_that_change_machines_bring_each_other_what_they_had_left_out_bitwise() {
    let place = Place::with(RANKS);
    // Packed or not makes no difference.
    all_ok(gather(&place, &["one", "two"], 5, "", &["--set", "checkpoint.zstd=on"]));
    // Rank 0 keeps the run's files, and stays; the others come back the other way round.
    all_ok(gather(&place, &["one", "two", "one"], 9, "", &["--resume", "--set", "checkpoint.zstd=on"]));
    all_ok(gather(&place, &["one", "one", "two"], 12, "", &["--resume"]));
    for (ranks, stop) in [(2, 5), (3, 9), (3, 12)] {
        let until = until(ranks, stop);
        let resume = (stop > 5).then_some("--resume");
        let args: Vec<&str> = until.iter().map(String::as_str).chain(resume).collect();
        place.train("shared", &args).ok();
    }
    assert_eq!(outcome(&place, "one/a"), outcome(&place, "shared"));
}

#[test]
fn what_a_machine_had_that_is_gone_is_named_with_its_host_and_nothing_starts() {
    let place = Place::with(RANKS);
    all_ok(gather(&place, &["one", "two"], 5, "", &[]));
    let host = crate::dying::hostname();
    let gone = format!("what rank 1 wrote on host {host} is in no run folder of the ranks that are here");
    let said =
        [&gone, "its checkpoint of step 5 is of 2 ranks", ".sender.0001, and of ", "start a worker on that machine"];
    let before = place.names("runs/one/a/checkpoints");
    // By itself, as one of three on this machine, and as one machine of two that never had the other's.
    let one = until(1, 9);
    let one: Vec<&str> =
        one.iter().map(String::as_str).chain(["--resume", "--set", "metrics.runs_dir=runs/one"]).collect();
    place.train("a", &one).failed(2, &said);
    for ran in gather(&place, &["one", "one", "one"], 9, "", &["--resume"]) {
        ran.failed(2, &said);
    }
    let copy =
        std::process::Command::new("cp").args(["-r", "runs/one", "runs/three"]).current_dir(place.path("")).status();
    assert!(copy.expect("cp").success());
    for ran in gather(&place, &["one", "three", "one"], 9, "", &["--resume"]) {
        ran.failed(2, &said);
    }
    assert_eq!(place.names("runs/one/a/checkpoints"), before);
    // The control: with the machine that has it.
    all_ok(gather(&place, &["one", "three", "two"], 9, "", &["--resume"]));
    let lost = place.events("one/a").into_iter().filter(|event| event["event"] == "residuals_lost");
    assert_eq!(lost.count(), 0);
}

#[test]
fn what_a_machine_had_that_is_gone_for_ever_is_given_up_when_that_is_said_and_in_no_other_way() {
    let place = Place::with(RANKS);
    all_ok(gather(&place, &["one", "two"], 5, "", &[]));
    std::fs::remove_dir_all(place.path("runs/two")).expect("a folder");
    let copy =
        std::process::Command::new("cp").args(["-r", "runs/one", "runs/four"]).current_dir(place.path("")).status();
    assert!(copy.expect("cp").success());
    for ran in gather(&place, &["one", "one", "one"], 9, "", &["--resume"]) {
        ran.failed(2, &["what rank 1 wrote on host", "--resume-without-residuals goes on without it"]);
    }
    // Three ranks of one machine, where two of two machines were; and one alone.
    let rans = gather(&place, &["one", "one", "one"], 9, "", &["--resume-without-residuals"]);
    let said = "LOST: what rank 1 on host";
    assert!(rans.iter().any(|ran| ran.stderr.contains(said)), "{}", rans[0].stderr);
    all_ok(rans);
    let alone = until(1, 9);
    let alone =
        alone.iter().map(String::as_str).chain(["--resume-without-residuals", "--set", "metrics.runs_dir=runs/four"]);
    let ran = place.train("a", &alone.collect::<Vec<_>>()).ok();
    assert!(ran.stderr.contains(said), "{}", ran.stderr);
    for run in ["one/a", "four/a"] {
        let events = place.events(run);
        let lost: Vec<_> = events.iter().filter(|event| event["event"] == "residuals_lost").collect();
        assert!(lost.len() == 1 && lost[0]["ranks"] == serde_json::json!([1]) && lost[0]["step"] == 5, "{lost:?}");
        assert_eq!(place.summary(run)["step"], 9);
    }
    // From then on nothing is missing: a plain resume goes on.
    all_ok(gather(&place, &["one", "one", "one"], 12, "", &["--resume"]));
}

/// The checkpoints that both machines have, the newest first: when a disk is slow, some steps are left out.
fn kept(place: &Place) -> Vec<String> {
    let kept = place.names("runs/one/a/checkpoints");
    assert_eq!(kept, place.names("runs/two/a/checkpoints"));
    kept.into_iter().rev().collect()
}

/// "step-00000024": step 24.
fn going_on_after(name: &str) -> String {
    format!("going on after step {}", name.trim_start_matches("step-").trim_start_matches('0'))
}

#[test]
fn a_checkpoint_that_is_damaged_on_one_machine_stops_all_and_all_take_an_earlier_one_when_that_is_said() {
    let place = Place::with(RANKS);
    gathered(&place, &["--set", "train.stop_at_step=30"], APART).into_iter().for_each(|ran| _ = ran.ok());
    let kept = kept(&place);
    spoil(&place.path(&format!("runs/two/a/checkpoints/{}/rank-0001.safetensors", kept[0])));
    let said = ["its newest checkpoint is damaged", "rank-0001.safetensors", "--resume-from-earlier goes on from step"];
    for ran in gathered(&place, &["--resume"], APART) {
        ran.failed(2, &said);
    }
    let [_, one, two] = gathered(&place, &["--resume-from-earlier"], APART).map(Ran::ok);
    let aside = format!("{}.damaged", kept[0]);
    assert!(one.stderr.contains(&going_on_after(&kept[1])), "{}", one.stderr);
    assert!(two.stderr.contains(&aside), "{}", two.stderr);
    assert_eq!(outcome(&place, "one/a"), undisturbed(2));
    let checkpoints = |machine| place.names(&format!("runs/{machine}/a/checkpoints"));
    assert!(checkpoints("two").contains(&aside), "it is kept: {:?}", checkpoints("two"));
    assert!(!checkpoints("one").iter().any(|name| name.contains("damaged")));
}

#[test]
fn an_earlier_checkpoint_that_is_damaged_on_another_machine_is_passed_over_too() {
    let place = Place::with(RANKS);
    let keep = ["--set", "train.stop_at_step=30", "--set", "checkpoint.keep_last=3"];
    gathered(&place, &keep, APART).into_iter().for_each(|ran| _ = ran.ok());
    let had = kept(&place);
    spoil(&place.path(&format!("runs/two/a/checkpoints/{}/manifest.json", had[0])));
    spoil(&place.path(&format!("runs/one/a/checkpoints/{}/rank-0000.safetensors", had[1])));
    let [_, one, _] = gathered(&place, &["--resume-from-earlier"], APART).map(Ran::ok);
    assert!(one.stderr.contains(&going_on_after(&had[2])), "{}", one.stderr);
    assert_eq!(outcome(&place, "one/a"), undisturbed(2));
    // And with nothing whole in common that is said.
    let place = Place::with(RANKS);
    gathered(&place, &["--set", "train.stop_at_step=30"], APART).into_iter().for_each(|ran| _ = ran.ok());
    let had = kept(&place);
    spoil(&place.path(&format!("runs/two/a/checkpoints/{}/manifest.json", had[0])));
    spoil(&place.path(&format!("runs/one/a/checkpoints/{}/rank-0000.safetensors", had[1])));
    for ran in gathered(&place, &["--resume-from-earlier"], APART) {
        ran.failed(2, &["the machines have no checkpoint of this run in common"]);
    }
}
