//! Several ranks: one folder has one copy, machines with folders of their own have one each.

use crate::dying::{RANKS, undisturbed};
use crate::joining::{APART, coordinator};
use crate::processes::{Job, nobody_is_left};
use crate::support::{Place, Ran};

use super::server::Server;
use super::{of_kind, run, upload};

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
