//! Copies of checkpoints in a store: an S3 server that this process starts on loopback, and real runs against it.
//!
//! - `protocol`: what of a copy is there after every request that may be the last. `damage`: what is named and goes nowhere.
//! - `ranks`: several ranks, and machines.
//! - `server`: the server. `tries`: what tries that fail leave behind.

mod damage;
mod protocol;
mod ranks;
mod server;
mod tries;

use std::process::{Command, Stdio};

use checkpoint::layout::committed;
use checkpoint::writer::Retention;
use serde_json::Value;

use crate::support::{Place, Ran, wait_until};
use server::{Asked, BUCKET, Fate, Server};

/// A run whose recipe names a place in the store, and what more its command line needs.
fn stored<'a>(name: &'a str, upload: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["train", "small.toml", "--name", name, "--set", upload], more].concat()
}

fn upload() -> String {
    format!("checkpoint.upload_to=s3://{BUCKET}/runs")
}

fn run(place: &Place, server: &Server, name: &str, more: &[&str]) -> Ran {
    let upload = upload();
    Ran::from(place.command(&stored(name, &upload, more)).envs(server.environment()).output().expect("it starts"))
}

fn of_kind(events: &[Value], kind: &str) -> Vec<u64> {
    let of_kind = events.iter().filter(|event| event["event"] == kind);
    of_kind.map(|event| event["step"].as_u64().expect("a step")).collect()
}

fn remove_run(place: &Place, run: &str) {
    std::fs::remove_dir_all(place.path(&format!("runs/{run}"))).expect("it is there");
}

/// Starts it, and kills it once the store holds back what it asks; from then on the store answers again.
fn killed_when(hangs: impl Fn(&Asked) -> bool + Copy + Send + 'static, server: &Server, mut command: Command) {
    server.rule(move |asked| if hangs(asked) { Fate::Hold } else { Fate::Pass });
    let quiet = command.envs(server.environment()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = quiet.spawn().expect("it starts");
    assert!(wait_until(&mut child, || server.asked().iter().any(hangs)), "it waits for the store");
    child.kill().expect("our child");
    assert!(!child.wait().expect("our child").success());
    server.rule(|_| Fate::Pass);
}

/// The parameters at the end of the run that nobody disturbs.
fn undisturbed(place: &Place) -> Value {
    place.train("undisturbed", &[]).ok();
    place.summary("undisturbed")["parameter_hash"].clone()
}

#[test]
fn a_run_goes_on_bit_for_bit_on_a_machine_that_has_nothing_of_it() {
    let (server, place) = (Server::new(), Place::new());
    run(&place, &server, "a", &["--set", "train.stop_at_step=30"]).ok();
    let uploaded = of_kind(&place.events("a"), "uploaded");
    assert!(uploaded.contains(&30), "the last was waited for: {uploaded:?}");
    assert!(!server.keys().iter().any(|key| key.ends_with(".partial")), "{:?}", server.keys());

    let fresh = Place::new();
    // Whatever can be refused is refused before there is a folder.
    run(&fresh, &server, "a", &["--resume", "--set", "train.seed=9"]).failed(2, &["train.seed: the run has 1"]);
    run(&fresh, &server, "a", &[])
        .failed(2, &["has checkpoints of a run of this name, the newest of step 30", "--name"]);
    assert!(!fresh.path("runs/a").exists());
    let ran = run(&fresh, &server, "a", &["--resume"]).ok();
    assert!(ran.stderr.contains("going on after step 30"), "{}", ran.stderr);
    let events = fresh.events("a");
    assert_eq!((of_kind(&events, "downloaded"), of_kind(&events, "resumed")), (vec![30], vec![30]));
    assert_eq!(fresh.summary("a")["parameter_hash"], undisturbed(&place));
    assert_eq!(fresh.lines("a"), 30, "metrics are no part of a checkpoint: those before it stayed where they were");

    // What was copied after it is whole, and there is nothing to bring.
    let upload = format!("s3://{BUCKET}/runs/a");
    let command =
        |args: &[&str]| Ran::from(fresh.command(args).envs(server.environment()).output().expect("it starts"));
    let verified = command(&["verify", &upload]).ok();
    assert!(verified.stdout.contains(&format!("{upload}/{}: whole", committed(60))), "{}", verified.stdout);
    let inspected: Value = serde_json::from_str(&command(&["inspect", &upload, "--json"]).ok().stdout).expect("JSON");
    let here: Value = serde_json::from_str(&command(&["inspect", "a", "--json"]).ok().stdout).expect("JSON");
    assert_eq!((&inspected["step"], &inspected["files"]), (&Value::from(60), &here["files"]));
    assert_eq!(inspected["tensors"], here["tensors"]);
    let one = format!("{upload}/{}", committed(60));
    command(&["inspect", &one]).ok();
    command(&["inspect", &one, "--checksums"]).failed(2, &["copy the checkpoint to one"]);
    command(&["verify", &format!("s3://{BUCKET}/runs/nobody")]).failed(2, &["there is no checkpoint below it"]);
    let shard = server.file(&format!("runs/a/{}/rank-0000.safetensors", committed(60)));
    std::fs::write(&shard, "").expect("writable");
    let damaged = command(&["verify", &one]);
    assert_eq!(damaged.code, Some(1), "{}", damaged.stderr);
    assert!(damaged.stdout.contains("rank-0000.safetensors: expected"), "{}", damaged.stdout);
}

#[test]
fn a_machine_that_is_taken_away_in_the_middle_of_a_copy_costs_steps_and_no_run() {
    let (server, place) = (Server::new(), Place::new());
    let (expected, upload) = (undisturbed(&place), upload());
    let mut begun_anew = 0;
    // So many requests are answered; then the store hangs, and the machine goes. The first copy is complete with the twelfth.
    for (index, last) in [2, 7, 15, 20, 26].into_iter().enumerate() {
        let (name, lost) = (format!("a{index}"), Place::new());
        let hangs = move |asked: &Asked| asked.number >= last && asked.method != "GET";
        // A step each, so that there is always one to copy; the disk must not leave one out.
        let sets = ["--set", "checkpoint.every=1", "--set", "checkpoint.when_busy=wait"];
        killed_when(hangs, &server, lost.command(&stored(&name, &upload, &sets)));
        drop(lost);
        let fresh = Place::new();
        let ran = run(&fresh, &server, &name, &["--resume"]).ok();
        begun_anew += usize::from(ran.stderr.contains("there is nothing to resume"));
        assert_eq!(fresh.summary(&name)["parameter_hash"], expected, "taken away after {last} requests");
        let keys = server.keys();
        assert!(!keys.iter().any(|key| key.contains(&name) && key.ends_with(".partial")), "{keys:?}");
    }
    assert!((1..4).contains(&begun_anew), "the first had no copy, the last had some: {begun_anew} had none");
}

/// Resumes a run of which the place has nothing, and kills it when it waits for the first file of rank 0.
fn killed_while_it_brings(fresh: &Place, server: &Server) {
    let is_shard = |asked: &Asked| asked.method == "GET" && asked.path.contains("rank-0000.safetensors");
    killed_when(is_shard, server, fresh.command(&stored("a", &upload(), &["--resume"])));
    let left = fresh.names("runs/a/checkpoints");
    assert!(left.len() == 1 && left[0].ends_with(".partial"), "{left:?}");
}

#[test]
fn a_machine_that_dies_while_it_brings_a_copy_brings_it_again() {
    let expected = undisturbed(&Place::new());
    // As this build leaves it, and as builds did that wrote the recipe last.
    for has_recipe in [true, false] {
        // What goes on is copied too: each has a store in which step 30 is the newest.
        let (server, place, fresh) = (Server::new(), Place::new(), Place::new());
        run(&place, &server, "a", &["--set", "train.stop_at_step=30"]).ok();
        killed_while_it_brings(&fresh, &server);
        let recipe = fresh.path("runs/a/recipe.toml");
        assert!(recipe.exists(), "it is the folder of a run");
        if !has_recipe {
            std::fs::remove_file(&recipe).expect("writable");
        }
        run(&fresh, &server, "a", &["--resume"]).ok();
        let events = fresh.events("a");
        assert_eq!((of_kind(&events, "downloaded"), of_kind(&events, "resumed")), (vec![30], vec![30]));
        assert_eq!(fresh.summary("a")["parameter_hash"], expected, "with a recipe: {has_recipe}");
    }
}

#[test]
fn training_goes_on_whatever_the_store_does_and_what_was_missed_is_copied_later() {
    let (server, place) = (Server::new(), Place::new());
    let expected = undisturbed(&place);
    server.rule(|asked| if asked.method == "GET" { Fate::Pass } else { Fate::Refuse(403) });
    let ran = run(&place, &server, "a", &["--set", "checkpoint.when_busy=wait"]).ok();
    let events = place.events("a");
    assert!(of_kind(&events, "upload_failed").contains(&60), "{events:?}");
    assert_eq!(of_kind(&events, "uploaded"), [] as [u64; 0]);
    assert!(ran.stderr.contains("the checkpoint of step 60 was not uploaded: could not write s3://"), "{}", ran.stderr);
    // Besides 60 one more may be tried while the run waits at its end, and then it is said why that failed.
    let not_tried = |step| {
        format!(
            "the checkpoint of step {step} was not uploaded: the store did not take another one, and it was not tried"
        )
    };
    assert!([48, 56].iter().any(|step| ran.stderr.contains(&not_tried(step))), "{}", ran.stderr);
    assert_eq!(place.summary("a")["parameter_hash"], expected);
    server.rule(|_| Fate::Pass);
    run(&place, &server, "a", &["--resume"]).ok();
    let uploaded = of_kind(&place.events("a"), "uploaded");
    assert!(uploaded.contains(&60) && uploaded.contains(&56), "both that stay: {uploaded:?}");
}

#[test]
fn nobody_waits_for_the_store_but_at_the_end_and_then_not_for_ever() {
    let (server, place) = (Server::new(), Place::new());
    server.rule(|asked| if asked.method == "PUT" { Fate::Hold } else { Fate::Pass });
    let upload = upload();
    let mut command = place.command(&stored("a", &upload, &[]));
    let quiet = command.envs(server.environment()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = quiet.spawn().expect("it starts");
    assert!(wait_until(&mut child, || place.path("runs/a/export").is_dir()), "it trains to its end, and exports");
    assert!(child.try_wait().expect("our child").is_none(), "it waits for the copy");
    assert_eq!(of_kind(&place.events("a"), "uploaded"), [] as [u64; 0]);
    server.release();
    assert!(child.wait().expect("our child").success());
    assert!(of_kind(&place.events("a"), "uploaded").contains(&60));

    let held = Server::new();
    held.rule(|asked| if asked.method == "PUT" { Fate::Hold } else { Fate::Pass });
    let ran = run(&place, &held, "b", &["--set", "checkpoint.upload_wait_s=0.5"]).ok();
    assert!(
        ran.stderr.contains("it was not done 0.5 s after the run's end (checkpoint.upload_wait_s)"),
        "{}",
        ran.stderr
    );
    assert_eq!(place.summary("b")["status"], "done");
    held.rule(|_| Fate::Pass);
    held.release();
    run(&place, &held, "b", &["--resume"]).ok();
    assert!(of_kind(&place.events("b"), "uploaded").contains(&60));
}

#[test]
fn a_store_that_cannot_be_used_is_refused_before_a_run_begins_and_not_missed_by_one_that_goes_on() {
    let (server, place) = (Server::new(), Place::new());
    for (url, said) in [
        ("ftp://bucket/a", "expected a URL that begins with one of s3://"),
        ("s3://key:secret@bucket/a", "come from the environment"),
    ] {
        let set = format!("checkpoint.upload_to={url}");
        place.train("a", &["--set", &set]).failed(2, &["checkpoint.upload_to", said]);
    }
    let upload = upload();
    let with = |name: &str, value: &str, more: &[&str]| {
        let mut command = place.command(&stored("a", &upload, more));
        Ran::from(command.envs(server.environment()).env(name, value).output().expect("it starts"))
    };
    with("AWS_SECRET_ACCESS_KEY", "wrong", &[]).failed(1, &["the store refuses these credentials"]);
    with("AWS_ENDPOINT_URL", "http://127.0.0.1:1", &[]).failed(75, &["there is no answer"]);
    let nowhere = ["--set", "checkpoint.upload_to=s3://nobody-has-it"];
    with("AWS_REGION", "us-east-1", &nowhere).failed(1, &["there is no such bucket"]);
    // Not from the beginning, as if there were nothing to resume.
    with("AWS_ENDPOINT_URL", "http://127.0.0.1:1", &["--resume"]).failed(75, &["there is no answer"]);
    assert!(!place.path("runs/a").exists());
    // With a checkpoint here, a store that is away for a while stops nobody.
    run(&place, &server, "a", &["--set", "train.stop_at_step=20"]).ok();
    let ran = with("AWS_ENDPOINT_URL", "http://127.0.0.1:1", &["--resume", "--set", "train.stop_at_step=24"]).ok();
    assert!(ran.stderr.contains("going on from what is here, the store may have more"), "{}", ran.stderr);
    assert!(ran.stderr.contains("going on after step 20"), "{}", ran.stderr);
    run(&place, &server, "a", &["--resume"]).ok();
    assert_eq!(place.summary("a")["parameter_hash"], undisturbed(&place));
}

#[test]
fn a_damaged_copy_is_not_passed_over_unless_somebody_says_so() {
    let (server, place) = (Server::new(), Place::new());
    run(&place, &server, "a", &["--set", "train.stop_at_step=24", "--set", "checkpoint.when_busy=wait"]).ok();
    assert!(of_kind(&place.events("a"), "uploaded").contains(&24));
    // One more, so that there are two.
    run(&place, &server, "a", &["--resume", "--set", "train.stop_at_step=30"]).ok();
    let shard = format!("runs/a/{}/rank-0000.safetensors", committed(30));
    let mut bytes = std::fs::read(server.file(&shard)).expect("it is there");
    *bytes.last_mut().expect("not empty") ^= 1;
    std::fs::write(server.file(&shard), bytes).expect("writable");
    let fresh = Place::new();
    let said =
        ["its newest checkpoint, of step 30, is in the store alone, and damaged", &shard, "--resume-from-earlier"];
    run(&fresh, &server, "a", &["--resume"]).failed(2, &said);
    assert!(!fresh.path("runs/a").exists());
    let ran = run(&fresh, &server, "a", &["--resume-from-earlier"]).ok();
    assert!(ran.stderr.contains("going on after step 24"), "{}", ran.stderr);
    assert_eq!(fresh.summary("a")["parameter_hash"], undisturbed(&place));
}

#[test]
fn a_store_is_trusted_as_the_system_trusts_it() {
    let ((server, authority), place) = (Server::with_tls(), Place::new());
    let file = place.path("authority.pem");
    std::fs::write(&file, authority).expect("writable");
    let upload = upload();
    let train = |trusted: Option<&std::path::Path>| {
        let mut command = place.command(&stored("a", &upload, &["--set", "train.stop_at_step=5"]));
        command.envs(server.environment()).env_remove("SSL_CERT_DIR").env_remove("SSL_CERT_FILE");
        Ran::from(command.envs(trusted.map(|file| ("SSL_CERT_FILE", file))).output().expect("it starts"))
    };
    // Who does not know the authority does not send a word.
    train(None).failed(1, &["could not list s3://checkpoints/runs/a", "certificate"]);
    assert_eq!(server.asked(), []);
    train(Some(&file)).ok();
    assert_eq!(of_kind(&place.events("a"), "uploaded"), [5]);
}

#[test]
fn a_bucket_of_googles_will_do_as_far_as_a_server_of_s3_can_tell() {
    let (server, place, fresh) = (Server::google(), Place::new(), Place::new());
    let train = |place: &Place, more: &[&str]| {
        let upload = format!("checkpoint.upload_to={}", server.url("runs"));
        Ran::from(place.command(&stored("a", &upload, more)).envs(server.environment()).output().expect("it starts"))
    };
    let ran = train(&place, &["--set", "train.stop_at_step=30"]).ok();
    assert!(of_kind(&place.events("a"), "uploaded").contains(&30), "{}", ran.stderr);
    train(&fresh, &["--resume"]).ok();
    assert_eq!(of_kind(&fresh.events("a"), "downloaded"), [30]);
    assert_eq!(fresh.summary("a")["parameter_hash"], undisturbed(&place));
    let keys = server.keys();
    assert!(keys.contains(&format!("runs/a/{}/manifest.json", committed(60))), "it was this server: {keys:?}");
    assert!(!keys.iter().any(|key| key.ends_with(".partial")), "{keys:?}");
    // One that goes in parts.
    let (server, folder) = (Server::google(), tempfile::tempdir().expect("a folder"));
    protocol::write(folder.path(), &[1], 3_000_000, 0.0);
    assert_eq!(protocol::told(&protocol::upload(&server, folder.path(), Retention::last(1))), (vec![1], vec![]));
    assert!(server.asked().iter().any(|asked| asked.query.contains("partNumber=2")), "{:?}", server.asked());
    assert_eq!(protocol::look(&server), (vec![1], vec![]));
}

#[test]
fn a_folder_will_do_for_a_store() {
    let place = Place::new();
    let upload = format!("checkpoint.upload_to=file://{}", place.path("mounted").display());
    let train = |place: &Place, more: &[&str]| place.run(&stored("a", &upload, more));
    train(&place, &[]).failed(1, &["could not look into the folder file:///", "mounted", "or make the folder"]);
    std::fs::create_dir(place.path("mounted")).expect("writable");
    train(&place, &["--set", "train.stop_at_step=30"]).ok();
    remove_run(&place, "a");
    train(&place, &["--resume"]).ok();
    assert_eq!(of_kind(&place.events("a"), "downloaded"), [30]);
    assert_eq!(place.summary("a")["parameter_hash"], undisturbed(&place));
    let ran = place.run(&["verify", &format!("file://{}/a", place.path("mounted").display())]).ok();
    assert!(ran.stdout.contains("step-00000060: whole"), "{}", ran.stdout);
}
