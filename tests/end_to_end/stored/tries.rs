//! What tries that fail leave in the store, and what a request that fails costs: nothing that somebody wants.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use checkpoint::disk::RealDisk;
use checkpoint::layout::{MANIFEST, committed, partial, shard};
use checkpoint::writer::{Attachment, Retention, TensorSpec, Writer};
use serde_json::Value;

use super::protocol::{folder, is, look, next, rest, start, told, upload, write};
use super::server::{Fate, Server};

fn keys_of(server: &Server, step: u64) -> Vec<String> {
    let below = format!("runs/a/{}/", committed(step));
    server.keys().iter().filter_map(|key| key.strip_prefix(&below).map(Into::into)).collect()
}

#[test]
fn the_best_copy_stays_when_its_manifest_cannot_be_read_for_a_while() {
    // What cannot be read, and whether that leaves the best copy without a score: one that is damaged has none.
    for (damaged, kept) in [(false, true), (true, false)] {
        let (server, here) = (Server::new(), folder(&[2]));
        let retention = Retention { keep_last: 1, keep_every: 0, keep_best: 1 };
        let uploader = start(&server, here.path(), retention);
        assert_eq!(told(&next(&uploader)), (vec![2], vec![]));
        write(here.path(), &[3], 300, 0.0);
        // Only the first look at it fails, so that a removal would find what it needs.
        let once = AtomicBool::new(true);
        let (manifest, hidden) = (server.file("runs/a/step-00000002/manifest.json"), server.file("hidden"));
        server.rule(move |asked| {
            let best = is(asked, "GET", &format!("{}/{MANIFEST}", committed(2)));
            match best && once.swap(false, Ordering::SeqCst) {
                true if damaged => {
                    std::fs::copy(&manifest, &hidden).expect("there");
                    std::fs::write(&manifest, "{}").expect("writable");
                    Fate::Pass
                }
                true => Fate::Refuse(403),
                false => {
                    if best && damaged {
                        _ = std::fs::rename(&hidden, &manifest);
                    }
                    Fate::Pass
                }
            }
        });
        uploader.offer(3);
        assert_eq!(told(&next(&uploader)), (vec![3], vec![]));
        assert_eq!(look(&server).0.contains(&2), kept, "damaged: {damaged}");
    }
}

#[test]
fn parts_of_an_upload_that_cannot_be_completed_are_taken_back() {
    let (server, here) = (Server::new(), tempfile::tempdir().expect("a folder"));
    // Two parts.
    write(here.path(), &[1], 3_000_000, 0.0);
    for fate in [Fate::Refuse(403), Fate::DoAndRefuse(403)] {
        let completes = |method: &str, query: &str| method == "POST" && query.contains("uploadId=");
        server.rule(move |asked| if completes(&asked.method, &asked.query) { fate } else { Fate::Pass });
        let (uploaded, failed) = told(&upload(&server, here.path(), Retention::last(1)));
        assert!(uploaded.is_empty() && failed[0].contains("could not write s3://"), "{uploaded:?} {failed:?}");
        let asked = server.asked();
        let at = |found: &dyn Fn(&str, &str) -> bool| {
            asked.iter().position(|asked| found(&asked.method, &asked.query)).expect("it was asked")
        };
        let aborts = |method: &str, query: &str| method == "DELETE" && query.contains("uploadId=");
        assert!(at(&completes) < at(&aborts), "{asked:?}");
        assert_eq!(look(&server).0, [] as [u64; 0]);
    }
    server.rule(|_| Fate::Pass);
    assert_eq!(told(&upload(&server, here.path(), Retention::last(1))), (vec![1], vec![]));
    assert_eq!(look(&server), (vec![1], vec![]));
}

#[test]
fn what_was_begun_and_is_wanted_no_more_goes() {
    // The step is gone from the folder before it is tried again, or would not stay in the store.
    for (gone, why) in [(true, "retention has removed it"), (false, "would not stay there")] {
        let (server, here) = (Server::new(), folder(&[1]));
        server.rule(|asked| if is(asked, "PUT", "recipe.toml") { Fate::Refuse(403) } else { Fate::Pass });
        let uploader = start(&server, here.path(), Retention::last(1));
        assert_eq!(told(&next(&uploader)).1.len(), 1);
        // The control: it was begun.
        assert!(keys_of(&server, 1).contains(&partial(MANIFEST)), "{:?}", server.keys());
        server.rule(|_| Fate::Pass);
        if gone {
            std::fs::remove_dir_all(here.path().join(committed(1))).expect("there");
        }
        write(here.path(), &[2], 300, 0.0);
        uploader.offer(2);
        let (uploaded, said) = told(&rest(&uploader));
        assert!(uploaded == [2] && said.len() == 1 && said[0].contains(why), "{uploaded:?} {said:?}");
        assert_eq!(keys_of(&server, 1), [] as [String; 0]);
        assert_eq!(look(&server), (vec![2], vec![]));
    }
}

#[test]
fn an_older_copy_that_follows_the_newest_makes_room_for_itself() {
    let (server, here) = (Server::new(), folder(&[1]));
    let uploader = start(&server, here.path(), Retention::last(2));
    assert_eq!(told(&next(&uploader)), (vec![1], vec![]));
    server.rule(|asked| if asked.method == "PUT" { Fate::Refuse(403) } else { Fate::Pass });
    write(here.path(), &[2], 300, 0.0);
    uploader.offer(2);
    assert_eq!(told(&next(&uploader)).1.len(), 1);
    server.rule(|_| Fate::Pass);
    write(here.path(), &[3], 300, 0.0);
    uploader.offer(3);
    let (uploaded, _) = told(&rest(&uploader));
    assert_eq!((uploaded, look(&server)), (vec![3, 2], (vec![2, 3], vec![])));
}

#[test]
fn half_of_another_checkpoint_of_the_step_goes_before_the_new_one_comes() {
    let (server, here) = (Server::new(), folder(&[1]));
    server.rule(|asked| if is(asked, "PUT", &format!("/{MANIFEST}")) { Fate::Refuse(403) } else { Fate::Pass });
    let uploader = start(&server, here.path(), Retention::last(1));
    assert_eq!(told(&next(&uploader)).1.len(), 1);
    assert_eq!(keys_of(&server, 1), [partial(MANIFEST), shard(0), "recipe.toml".into()]);
    server.rule(|_| Fate::Pass);
    // The same step, whose file has another name.
    std::fs::remove_dir_all(here.path().join(committed(1))).expect("there");
    let specs = vec![TensorSpec { name: "w".into(), shape: vec![300] }];
    let mut writer = Writer::new(Arc::new(RealDisk), here.path().into(), specs, Retention::last(1)).expect("a folder");
    writer.pack(true);
    writer.offer(1, Value::Null, Vec::new(), |snapshot| snapshot.tensor(0).fill(1.0));
    writer.flush();
    uploader.offer(1);
    assert_eq!(told(&next(&uploader)), (vec![1], vec![]));
    assert_eq!(keys_of(&server, 1), [MANIFEST.to_owned(), "rank-0000.safetensors.zst".into()]);
    assert_eq!(look(&server), (vec![1], vec![]));
}

#[test]
fn a_file_that_is_missing_is_named_and_not_taken_for_what_retention_did() {
    let (server, here) = (Server::new(), folder(&[1]));
    let file = here.path().join(committed(1)).join(shard(0));
    std::fs::remove_file(&file).expect("there");
    let (uploaded, said) = told(&upload(&server, here.path(), Retention::last(1)));
    assert!(uploaded.is_empty() && said[0].contains(&file.display().to_string()), "{said:?}");
    assert!(said[0].contains("the manifest names this file and it is missing"), "{said:?}");
}

/// The files below `folder` that this process has open.
fn open_below(folder: &Path) -> usize {
    let links = std::fs::read_dir("/proc/self/fd").expect("Linux").flatten();
    links.filter(|link| std::fs::read_link(link.path()).is_ok_and(|to| to.starts_with(folder))).count()
}

#[test]
fn a_checkpoint_of_many_files_is_copied_with_few_of_them_open() {
    let (server, here) = (Server::new(), tempfile::tempdir().expect("a folder"));
    let specs = vec![TensorSpec { name: "w".into(), shape: vec![300] }];
    let mut writer = Writer::new(Arc::new(RealDisk), here.path().into(), specs, Retention::last(1)).expect("a folder");
    let attachment = |index| Attachment { name: format!("file-{index:03}"), bytes: (*b"text").into() };
    writer.offer(1, Value::Null, (0..300).map(attachment).collect(), |snapshot| snapshot.tensor(0).fill(1.0));
    writer.flush();
    let (seen, path) = (Arc::new(std::sync::Mutex::new(0)), here.path().to_owned());
    let most = Arc::clone(&seen);
    server.rule(move |_| {
        let mut most = most.lock().expect("nobody panics");
        *most = open_below(&path).max(*most);
        Fate::Pass
    });
    assert_eq!(told(&upload(&server, here.path(), Retention::last(1))), (vec![1], vec![]));
    assert_eq!((keys_of(&server, 1).len(), look(&server)), (302, (vec![1], vec![])));
    let most = *seen.lock().expect("nobody panics");
    assert!((100..=130).contains(&most), "{most} were open");
}
