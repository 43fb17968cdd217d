//! Several ranks: one folder has one copy, machines with folders of their own have one each.

use checkpoint::layout::{committed, partial, shard};

use crate::dying::{RANKS, undisturbed};
use crate::joining::{APART, coordinator};
use crate::processes::{Job, nobody_is_left};
use crate::support::{Place, Ran};

use super::server::Server;
use super::{killed_while_it_brings, of_kind, run, upload};

fn hash(place: &Place, run: &str) -> String {
    place.summary(run)["parameter_hash"].as_str().expect("a hash").to_owned()
}

/// The parameters at the end of two ranks' run that nobody disturbs.
fn expected() -> String {
    undisturbed(2).1[3].as_str().expect("a hash").to_owned()
}

#[test]
fn ranks_of_one_folder_go_on_on_a_machine_that_has_nothing_of_it() {
    let (server, place) = (Server::new(), Place::with(RANKS));
    run(&place, &server, "a", &["--set", "train.stop_at_step=30"]).ok();
    assert!(of_kind(&place.events("a"), "uploaded").contains(&30));
    let keys = server.keys();
    assert!(
        ["0000", "0001"].iter().all(|rank| keys.contains(&format!("runs/a/step-00000030/rank-{rank}.safetensors")))
    );
    let fresh = Place::with(RANKS);
    run(&fresh, &server, "a", &[]).failed(2, &["has checkpoints of a run of this name"]);
    assert!(!fresh.path("runs/a").exists());
    run(&fresh, &server, "a", &["--resume"]).ok();
    let events = fresh.events("a");
    assert_eq!((of_kind(&events, "downloaded"), of_kind(&events, "resumed")), (vec![30], vec![30]));
    assert_eq!(hash(&fresh, "a"), expected());
}

#[test]
fn ranks_go_on_where_their_launcher_was_killed_while_it_brought_the_copy() {
    let (server, place) = (Server::new(), Place::with(RANKS));
    run(&place, &server, "a", &["--set", "train.stop_at_step=30"]).ok();
    let fresh = Place::with(RANKS);
    killed_while_it_brings(&fresh, &server);
    run(&fresh, &server, "a", &["--resume"]).ok();
    let events = fresh.events("a");
    assert_eq!((of_kind(&events, "downloaded"), of_kind(&events, "resumed")), (vec![30], vec![30]));
    assert_eq!(hash(&fresh, "a"), expected());
}

/// A coordinator and a worker on each of two machines with folders of their own.
fn apart(place: &Place, server: &Server, more: &[&str]) -> Vec<Ran> {
    let upload = upload();
    let (job, address) = coordinator(place, &[&["--set", &upload], more].concat());
    let worker = |own: &[&str]| {
        let mut command = place.command(&[&["worker", "--join", &address], own].concat());
        command.envs(server.environment());
        Job::spawn(place, command)
    };
    let workers = APART.map(worker);
    let mut rans: Vec<Ran> = workers.into_iter().map(Job::end).collect();
    rans.push(job.end());
    nobody_is_left(&place.path(""));
    rans
}

#[test]
fn what_machines_of_their_own_had_comes_together_on_one_and_back() {
    let (server, place) = (Server::new(), Place::with(RANKS));
    let wait = ["--set", "checkpoint.when_busy=wait"];
    let all_ok = |rans: Vec<Ran>| rans.into_iter().for_each(|ran| _ = ran.ok());
    all_ok(apart(&place, &server, &[&wait[..], &["--set", "train.stop_at_step=30"]].concat()));
    // Both ranks on one machine, which is a new one. They left out something of gradients, each on its own machine.
    let fresh = Place::with(RANKS);
    let ran =
        run(&fresh, &server, "a", &["--resume", "--set", "train.stop_at_step=45", "--set", "checkpoint.keep_last=0"])
            .ok();
    assert!(ran.stderr.contains("machine-0000/step-00000030 and s3://"), "{}", ran.stderr);
    let step = fresh.path("runs/a/checkpoints/step-00000030");
    fresh.run(&["verify", &step.display().to_string()]).ok();
    let manifest = std::fs::read_to_string(step.join("manifest.json")).expect("readable");
    let sender = ["sender.0000", "sender.0001"];
    assert!(sender.iter().all(|sender| manifest.contains(sender)), "what each had left out is there");
    // And back on two.
    let two = Place::with(RANKS);
    all_ok(apart(&two, &server, &["--resume"]));
    assert_eq!(two.names("runs/two/a/checkpoints").last().map(String::as_str), Some("step-00000060"));
    assert_eq!(hash(&two, "one/a"), expected());
}

#[test]
fn a_step_that_one_machine_has_not_copied_is_passed_over() {
    let (server, place) = (Server::new(), Place::with(RANKS));
    // All stay, so that all are copied in the end.
    let stop = ["train.stop_at_step=30", "checkpoint.when_busy=wait", "checkpoint.keep_last=0"];
    let stop: Vec<&str> = stop.iter().flat_map(|set| ["--set", set]).collect();
    apart(&place, &server, &stop).into_iter().for_each(|ran| _ = ran.ok());
    std::fs::remove_file(server.file("runs/a/machine-0001/step-00000030/manifest.json")).expect("it is there");
    let fresh = Place::with(RANKS);
    let rans = apart(&fresh, &server, &["--resume"]);
    let said = "the store lacks what ranks [1] had of step 30: looking further back";
    assert!(rans.iter().any(|ran| ran.stderr.contains(said)), "{rans:?}");
    rans.into_iter().for_each(|ran| _ = ran.ok());
    assert_eq!(of_kind(&fresh.events("one/a"), "downloaded"), [24]);
    assert_eq!(hash(&fresh, "one/a"), expected());
}

#[test]
fn machines_with_folders_of_their_own_bring_each_its_own_or_anothers() {
    let (server, place) = (Server::new(), Place::with(RANKS));
    let stop = ["--set", "train.stop_at_step=30", "--set", "checkpoint.when_busy=wait"];
    apart(&place, &server, &stop).into_iter().for_each(|ran| _ = ran.ok());
    let keys = server.keys();
    for machine in ["machine-0000", "machine-0001"] {
        assert!(keys.contains(&format!("runs/a/{machine}/step-00000030/manifest.json")), "{keys:?}");
    }
    // One machine is a new one. It has what it had, what ranks left out of gradients too.
    std::fs::remove_dir_all(place.path("runs/two")).expect("ours");
    apart(&place, &server, &["--resume"]).into_iter().for_each(|ran| _ = ran.ok());
    assert!(place.path("runs/two/a/checkpoints/step-00000060").is_dir());
    assert_eq!(hash(&place, "one/a"), expected());
    // Both are new, and there is nothing left to train.
    std::fs::remove_dir_all(place.path("runs")).expect("ours");
    apart(&place, &server, &["--resume"]).into_iter().for_each(|ran| _ = ran.ok());
    assert_eq!(hash(&place, "one/a"), expected());
}

/// Two machines' run until step 30, of which all copies stay.
fn until_30(place: &Place, server: &Server) {
    let stop = ["train.stop_at_step=30", "checkpoint.when_busy=wait", "checkpoint.keep_last=0"];
    let stop: Vec<&str> = stop.iter().flat_map(|set| ["--set", set]).collect();
    apart(place, server, &stop).into_iter().for_each(|ran| _ = ran.ok());
}

#[test]
fn machines_that_were_killed_while_they_brought_their_copies_bring_them_again() {
    let (server, place) = (Server::new(), Place::with(RANKS));
    until_30(&place, &server);
    let fresh = Place::with(RANKS);
    // What is left half-way: with the recipe, as this build writes it first, and without, as builds did that wrote it last.
    for (machine, has_recipe) in [("one", true), ("two", false)] {
        let run = format!("runs/{machine}/a");
        let (had, has) = (place.path(&run), fresh.path(&run));
        let half = has.join("checkpoints").join(partial(&committed(30)));
        std::fs::create_dir_all(&half).expect("writable");
        std::fs::write(half.join(shard(0)), "half of it").expect("writable");
        std::fs::write(has.join(".lock"), "1").expect("writable");
        if has_recipe {
            std::fs::copy(had.join("recipe.toml"), has.join("recipe.toml")).expect("it is there");
        }
    }
    apart(&fresh, &server, &["--resume"]).into_iter().for_each(|ran| _ = ran.ok());
    for machine in ["one/a", "two/a"] {
        assert_eq!(of_kind(&fresh.events(machine), "downloaded"), [30]);
    }
    assert_eq!(of_kind(&fresh.events("one/a"), "resumed"), [30]);
    assert_eq!(hash(&fresh, "one/a"), expected());
}

#[test]
fn a_machine_that_has_newer_ones_brings_the_older_one_that_all_can_have() {
    let (server, place) = (Server::new(), Place::with(RANKS));
    until_30(&place, &server);
    // The newest step of which all is in the store is 24. One machine is a new one, the other has step 30 alone.
    std::fs::remove_file(server.file("runs/a/machine-0001/step-00000030/manifest.json")).expect("it is there");
    std::fs::remove_dir_all(place.path("runs/two")).expect("ours");
    for step in place.names("runs/one/a/checkpoints").into_iter().filter(|name| name != "step-00000030") {
        std::fs::remove_dir_all(place.path(&format!("runs/one/a/checkpoints/{step}"))).expect("ours");
    }
    apart(&place, &server, &["--resume"]).into_iter().for_each(|ran| _ = ran.ok());
    assert_eq!(of_kind(&place.events("one/a"), "downloaded"), [24]);
    assert_eq!(hash(&place, "one/a"), expected());
}

#[test]
fn a_copy_that_is_damaged_on_one_machine_makes_all_go_on_from_an_earlier_one() {
    let (server, place) = (Server::new(), Place::with(RANKS));
    until_30(&place, &server);
    let file = server.file("runs/a/machine-0001/step-00000030/rank-0001.safetensors");
    let mut bytes = std::fs::read(&file).expect("readable");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&file, bytes).expect("ours");
    let fresh = Place::with(RANKS);
    let rans = apart(&fresh, &server, &["--resume", "--resume-from-earlier"]);
    assert!(rans.iter().any(|ran| ran.stderr.contains("is damaged, and passed over")), "{rans:?}");
    rans.into_iter().for_each(|ran| _ = ran.ok());
    let brought = of_kind(&fresh.events("one/a"), "downloaded");
    assert!(brought.contains(&24), "{brought:?}");
    assert_eq!(of_kind(&fresh.events("one/a"), "resumed"), [24]);
    assert_eq!(hash(&fresh, "one/a"), expected());
}
