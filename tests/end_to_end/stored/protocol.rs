//! What of a copy is there after every request that may be the last, what stays, and what is left to others.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use checkpoint::disk::RealDisk;
use checkpoint::layout::{MANIFEST, committed, partial, shard};
use checkpoint::reader::{Checkpoint, list};
use checkpoint::store::{At, News, Place, Remote, Seat, Settings, Task, Uploader};
use checkpoint::writer::{Attachment, Retention, TensorSpec, Writer};
use serde_json::json;
use tempfile::TempDir;

use super::server::{Asked, Fate, Server};

/// Objects that are not ours, some of them in places of ours.
const FOREIGN: [&str; 4] = [
    "runs/a/notes.txt",
    "runs/a/step-00000001/mine.txt",
    "runs/a/step-00000002/mine.bin",
    "runs/a/step-1/rank-0000.safetensors",
];

pub fn remote(server: &Server) -> Remote {
    let place = Place::parse(&server.url("runs/a")).expect("a URL");
    Remote::open(&place, &Settings::of(server.environment())).expect("a client")
}

pub fn at(step: u64) -> At {
    At { step, seat: Seat::Shared }
}

/// Writes checkpoints of one tensor, each of whose elements is its step plus `more`.
pub fn write(folder: &Path, steps: &[u64], elements: usize, more: f32) {
    let specs = vec![TensorSpec { name: "w".into(), shape: vec![elements] }];
    let mut writer = Writer::new(Arc::new(RealDisk), folder.into(), specs, Retention::last(0)).expect("a folder");
    for &step in steps {
        let scores = [9.0, 3.0, 0.5, 2.0, 1.0, 4.0];
        let attachment = Attachment { name: "recipe.toml".into(), bytes: (*b"[train]").into() };
        let state = json!({ "eval_loss": scores[step as usize] });
        writer.offer(step, state, vec![attachment], |snapshot| snapshot.tensor(0).fill(step as f32 + more));
        writer.flush();
    }
}

pub fn folder(steps: &[u64]) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    write(folder.path(), steps, 300, 0.0);
    folder
}

pub fn start(server: &Server, folder: &Path, retention: Retention) -> Uploader {
    start_from(server, folder, retention, u64::MAX)
}

/// As [`start`], of a run that goes on from step `from`.
fn start_from(server: &Server, folder: &Path, retention: Retention, from: u64) -> Uploader {
    let task = Task {
        folder: folder.into(),
        disk: Arc::new(RealDisk),
        seat: Seat::Shared,
        seats: vec![Seat::Shared],
        retention,
        from,
    };
    Uploader::start(remote(server), task).expect("a thread")
}

/// Copies what is not in the store, and says what became of it.
pub fn upload(server: &Server, folder: &Path, retention: Retention) -> Vec<News> {
    rest(&start(server, folder, retention))
}

/// All news of a thread up to its end, which it is asked for.
pub fn rest(uploader: &Uploader) -> Vec<News> {
    uploader.finish();
    let mut all = Vec::new();
    while let Some(news) = uploader.wait(Duration::from_secs(60)) {
        all.extend(news);
    }
    all
}

/// The steps that were uploaded, and what went wrong.
pub fn told(news: &[News]) -> (Vec<u64>, Vec<String>) {
    let mut said = (Vec::new(), Vec::new());
    for news in news {
        match news {
            News::Uploaded { step, .. } => said.0.push(*step),
            News::Failed { step, error } => said.1.push(format!("{step}: {error}")),
            News::Passed { step, why } => said.1.push(format!("{step}: {why}")),
        }
    }
    said
}

/// The steps whose copies count, and those of them that are not whole.
pub fn look(server: &Server) -> (Vec<u64>, Vec<u64>) {
    let remote = remote(server);
    let there: Vec<u64> = remote.list().expect("an answer").iter().map(|at| at.step).collect();
    let damaged = |step: &u64| !remote.audit(at(*step)).expect("an answer").damage.is_empty();
    (there.clone(), there.iter().copied().filter(damaged).collect())
}

pub fn is(asked: &Asked, method: &str, name: &str) -> bool {
    asked.method == method && asked.path.ends_with(name)
}

/// Copies a second checkpoint, whose commit takes the first away, and lets one request after the other be the last; `fate` is
/// what becomes of that one. Returns how often a copy counted that was not whole.
fn at_every_request(fate: Fate, manifest_first: bool) -> usize {
    let mut violations = 0;
    let before = folder(&[1]);
    let after = folder(&[1, 2]);
    for last in 0.. {
        let server = Server::new();
        assert_eq!(told(&upload(&server, before.path(), Retention::last(1))), (vec![1], vec![]));
        for key in FOREIGN {
            std::fs::create_dir_all(server.file(key).parent().expect("a folder")).expect("writable");
            std::fs::write(server.file(key), key).expect("writable");
        }
        let manifest = after.path().join(committed(2)).join(MANIFEST);
        let too_early = server.file(&format!("runs/a/{}/{MANIFEST}", committed(2)));
        server.rule(move |asked| {
            if manifest_first && is(asked, "PUT", &partial(MANIFEST)) {
                std::fs::copy(&manifest, &too_early).expect("the folder is there");
            }
            match asked.number {
                number if number < last => Fate::Pass,
                number if number == last => fate,
                _ => Fate::Refuse(403),
            }
        });
        let (_, failed) = told(&upload(&server, after.path(), Retention::last(1)));
        let over = server.asked().len() <= last;
        server.rule(|_| Fate::Pass);
        let (there, damaged) = look(&server);
        assert!(!there.is_empty(), "after request {last}: neither the old copy nor the new one counts: {failed:?}");
        violations += damaged.len();
        // The next start puts everything in order, and touches nothing else.
        upload(&server, after.path(), Retention::last(1));
        let keys = server.keys();
        assert!(!keys.iter().any(|key| key.ends_with(".partial")), "after request {last}: {keys:?}");
        let ours: Vec<&String> = keys.iter().filter(|key| !FOREIGN.contains(&key.as_str())).collect();
        assert!(
            manifest_first || ours.len().is_multiple_of(3),
            "after request {last}, only whole copies of three objects: {ours:?}"
        );
        assert_eq!(keys.len(), ours.len() + FOREIGN.len(), "after request {last}: what is not ours stays");
        assert!(look(&server).0.contains(&2), "after request {last}: it was copied in the end");
        if over {
            assert_eq!(failed, [] as [String; 0]);
            assert!(last > 10, "only {last} requests");
            assert_eq!(there, [2], "nothing stood in the way: the new one is there, and the old one is gone");
            return violations;
        }
    }
    unreachable!("there are not so many numbers")
}

#[test]
fn whichever_request_is_the_last_every_copy_that_counts_is_whole() {
    assert_eq!(at_every_request(Fate::Refuse(403), false), 0);
    assert_eq!(at_every_request(Fate::DoAndRefuse(403), false), 0, "it was done, and nobody learned of it");
    // The control: with the manifest first, copies count that are not whole.
    assert!(at_every_request(Fate::Refuse(403), true) > 0);
}

#[test]
fn a_long_file_goes_in_parts_and_is_there_whole_or_not_at_all() {
    let (server, folder) = (Server::new(), tempfile::tempdir().expect("a folder"));
    // 12 MB, and a part is 8 MiB.
    write(folder.path(), &[1], 3_000_000, 0.0);
    server.rule(|asked| if asked.query.contains("partNumber=2") { Fate::Refuse(403) } else { Fate::Pass });
    let (uploaded, failed) = told(&upload(&server, folder.path(), Retention::last(1)));
    assert_eq!(uploaded, [] as [u64; 0]);
    assert!(
        failed[0].contains("could not write a part of s3://checkpoints/runs/a/step-00000001/rank-0000"),
        "{failed:?}"
    );
    assert!(
        server.asked().iter().any(|asked| asked.method == "DELETE" && asked.query.contains("uploadId")),
        "it was aborted"
    );
    assert!(!server.keys().iter().any(|key| key.ends_with(&shard(0))), "{:?}", server.keys());
    server.rule(|_| Fate::Pass);
    assert_eq!(told(&upload(&server, folder.path(), Retention::last(1))), (vec![1], vec![]));
    let parts = server.asked().iter().filter(|asked| asked.query.contains("partNumber")).count();
    assert_eq!((parts, look(&server)), (2, (vec![1], vec![])));
    let back = tempfile::tempdir().expect("a folder");
    let path = remote(&server).fetch(1, &[Seat::Shared], &RealDisk, back.path()).expect("it comes back");
    for name in [shard(0), "recipe.toml".into(), MANIFEST.into()] {
        let same = std::fs::read(path.join(&name)).expect("there")
            == std::fs::read(folder.path().join(committed(1)).join(&name)).expect("there");
        assert!(same, "{name}");
    }
}

#[test]
fn a_copy_that_comes_back_half_way_is_no_checkpoint() {
    let (server, here) = (Server::new(), folder(&[1]));
    upload(&server, here.path(), Retention::last(1));
    for last in 0.. {
        let back = tempfile::tempdir().expect("a folder");
        // What a process that was killed has left.
        let left = back.path().join(partial(&committed(1)));
        std::fs::create_dir(&left).expect("writable");
        std::fs::write(left.join(shard(0)), "half").expect("writable");
        server.rule(move |asked| if asked.number < last { Fate::Pass } else { Fate::Refuse(403) });
        let fetched = remote(&server).fetch(1, &[Seat::Shared], &RealDisk, back.path());
        let names: Vec<PathBuf> = list(back.path()).expect("readable").into_iter().map(|(_, path)| path).collect();
        match fetched {
            Err(error) => {
                assert!(error.to_string().contains("refuses these credentials"), "{error}");
                assert_eq!(names, [] as [PathBuf; 0], "after {last} requests");
            }
            Ok(path) => {
                assert_eq!(names, std::slice::from_ref(&path));
                Checkpoint::open(&path).and_then(|checkpoint| checkpoint.verify()).expect("it is whole");
                assert!(last >= 4, "only {last} requests");
                return;
            }
        }
    }
}

/// Waits for the next news of a thread.
pub fn next(uploader: &Uploader) -> Vec<News> {
    loop {
        let news = uploader.wait(Duration::from_secs(60)).expect("it lives");
        if !news.is_empty() {
            return news;
        }
    }
}

#[test]
fn what_stays_in_the_store_is_what_retention_says() {
    let (server, here) = (Server::new(), tempfile::tempdir().expect("a folder"));
    let uploader = start_from(&server, here.path(), Retention { keep_last: 1, keep_every: 3, keep_best: 1 }, 0);
    for step in 1..=5 {
        write(here.path(), &[step], 300, 0.0);
        uploader.offer(step);
        assert_eq!(told(&next(&uploader)), (vec![step], vec![]));
    }
    // Step 2 has the lowest loss.
    assert_eq!(look(&server), (vec![2, 3, 5], vec![]));
    let keys = server.keys();
    assert_eq!(keys.len(), 9, "no file of the others is left: {keys:?}");
}

#[test]
fn what_could_not_be_copied_is_tried_again_with_the_next_or_said() {
    for (keep_last, then) in [(2, "uploaded"), (1, "would not stay there")] {
        let (server, here) = (Server::new(), folder(&[1]));
        server.rule(|asked| if asked.method == "GET" { Fate::Pass } else { Fate::Refuse(403) });
        let uploader = start(&server, here.path(), Retention::last(keep_last));
        let (uploaded, failed) = told(&next(&uploader));
        assert_eq!((uploaded, failed.len()), (vec![], 1));
        assert!(failed[0].contains("1: could not write s3://checkpoints/runs/a/step-00000001/"), "{failed:?}");
        server.rule(|_| Fate::Pass);
        write(here.path(), &[2], 300, 0.0);
        uploader.offer(2);
        let (uploaded, said) = told(&rest(&uploader));
        match keep_last {
            2 => assert_eq!((uploaded, said), (vec![2, 1], vec![]), "{then}: the newest first"),
            _ => assert!(uploaded == [2] && said.len() == 1 && said[0].contains(then), "{uploaded:?} {said:?}"),
        }
        assert_eq!(uploader.missing(), [] as [u64; 0]);
    }
}

#[test]
fn a_step_that_comes_again_takes_the_place_of_the_other_one() {
    let (server, here) = (Server::new(), folder(&[1]));
    let uploader = start(&server, here.path(), Retention::last(1));
    assert_eq!(told(&next(&uploader)), (vec![1], vec![]));
    // The same once more: there is no moment without it.
    server.rule(|_| Fate::Pass);
    uploader.offer(1);
    assert_eq!(told(&next(&uploader)), (vec![1], vec![]));
    assert!(!server.asked().iter().any(|asked| is(asked, "DELETE", MANIFEST)), "{:?}", server.asked());
    // Another one: its manifest goes before its files change.
    write(here.path(), &[1], 300, 0.5);
    server.rule(|_| Fate::Pass);
    uploader.offer(1);
    assert_eq!(told(&next(&uploader)), (vec![1], vec![]));
    let asked = server.asked();
    let index = |method: &str, name: &str| asked.iter().position(|asked| is(asked, method, name)).expect("asked");
    assert!(index("DELETE", &format!("/{MANIFEST}")) < index("PUT", &shard(0)), "{asked:?}");
    assert!(index("PUT", &shard(0)) < index("PUT", &format!("/{MANIFEST}")), "{asked:?}");
    assert_eq!(look(&server), (vec![1], vec![]));
    let stored = std::fs::read(server.file("runs/a/step-00000001/manifest.json")).expect("there");
    assert_eq!(stored, std::fs::read(here.path().join(committed(1)).join(MANIFEST)).expect("there"));
}

#[test]
fn a_run_that_was_rewound_copies_on_and_leaves_what_is_later() {
    let (server, before) = (Server::new(), folder(&[1, 2, 3, 4, 5]));
    upload(&server, before.path(), Retention::last(0));
    assert_eq!(look(&server), (vec![1, 2, 3, 4, 5], vec![]));
    let here = folder(&[1, 2]);
    let uploader = start(&server, here.path(), Retention::last(1));
    write(here.path(), &[3], 300, 0.5);
    uploader.offer(3);
    let news = next(&uploader);
    assert!(matches!(&news[..], [News::Uploaded { step: 3, removed, .. }] if *removed == [1, 2]), "{news:?}");
    assert_eq!(look(&server), (vec![3, 4, 5], vec![]));
    let stored = std::fs::read(server.file("runs/a/step-00000003/manifest.json")).expect("there");
    assert_eq!(stored, std::fs::read(here.path().join(committed(3)).join(MANIFEST)).expect("there"));
}

#[test]
fn what_is_later_here_than_the_run_goes_on_from_is_not_copied_and_pushes_nothing_out() {
    let (server, here) = (Server::new(), folder(&[2, 4, 5]));
    let uploader = start_from(&server, here.path(), Retention::last(2), 2);
    write(here.path(), &[3], 300, 0.5);
    uploader.offer(3);
    let news = rest(&uploader);
    let (mut copied, failed) = told(&news);
    copied.sort_unstable();
    // Either may be first: 3 is offered while the uploader looks through the folder.
    assert_eq!((copied, failed), (vec![2, 3], vec![]), "{news:?}");
    assert_eq!(look(&server), (vec![2, 3], vec![]));
    // The control: of a run that goes on from its last one they are copied.
    let control = Server::new();
    upload(&control, here.path(), Retention::last(0));
    assert_eq!(look(&control), (vec![2, 3, 4, 5], vec![]));
}

#[test]
fn a_step_that_was_written_again_before_the_start_is_copied_again_whichever_it_is() {
    let (server, here) = (Server::new(), folder(&[1, 2, 3]));
    upload(&server, here.path(), Retention::last(0));
    assert!(upload(&server, here.path(), Retention::last(0)).is_empty(), "nothing is missing");
    write(here.path(), &[2], 300, 0.5);
    assert_eq!(told(&upload(&server, here.path(), Retention::last(0))), (vec![2], vec![]));
    let stored = std::fs::read(server.file("runs/a/step-00000002/manifest.json")).expect("there");
    assert_eq!(stored, std::fs::read(here.path().join(committed(2)).join(MANIFEST)).expect("there"));
}

#[test]
fn who_sweeps_while_another_writes_is_noticed() {
    let (server, here) = (Server::new(), folder(&[1]));
    let announced = server.file("runs/a/step-00000001/manifest.json.partial");
    server.rule(move |asked| {
        if is(asked, "PUT", "recipe.toml") {
            std::fs::remove_file(&announced).expect("it was announced");
        }
        Fate::Pass
    });
    let (uploaded, failed) = told(&upload(&server, here.path(), Retention::last(1)));
    assert_eq!(uploaded, [] as [u64; 0]);
    assert!(failed[0].contains("another process writes to the same place"), "{failed:?}");
    assert_eq!(look(&server).0, [] as [u64; 0]);
}
