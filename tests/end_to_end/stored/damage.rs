//! What is damaged, here or in the store, is named and goes nowhere; so is a store that cannot be used.

use std::path::Path;

use checkpoint::disk::RealDisk;
use checkpoint::layout::{MANIFEST, committed, shard};
use checkpoint::store::{Place, Remote, Seat, Settings};
use checkpoint::writer::Retention;

use super::protocol::{at, folder, look, remote, told, upload, write};
use super::server::Server;

fn flip(file: &Path) {
    let mut bytes = std::fs::read(file).expect("it is there");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(file, bytes).expect("writable");
}

#[test]
fn a_file_that_changed_underneath_is_not_uploaded() {
    for elements in [300, 3_000_000] {
        let changes: [fn(&Path); 3] = [
            flip,
            |file| std::fs::write(file, "").expect("writable"),
            |file| {
                let bytes = std::fs::read(file).expect("there");
                std::fs::write(file, [&bytes[..], b"more"].concat()).expect("writable");
            },
        ];
        for change in changes {
            let (server, folder) = (Server::new(), tempfile::tempdir().expect("a folder"));
            write(folder.path(), &[1], elements, 0.0);
            let file = folder.path().join(committed(1)).join(shard(0));
            change(&file);
            let (uploaded, failed) = told(&upload(&server, folder.path(), Retention::last(1)));
            assert_eq!(uploaded, [] as [u64; 0]);
            assert!(failed[0].contains(&file.display().to_string()) && failed[0].contains("expected"), "{failed:?}");
            assert_eq!(look(&server).0, [] as [u64; 0]);
            assert!(!server.keys().iter().any(|key| key.ends_with(&shard(0))), "{:?}", server.keys());
        }
    }
    // It is in nobody's way.
    let (server, here) = (Server::new(), folder(&[1, 2]));
    flip(&here.path().join(committed(2)).join(shard(0)));
    let (uploaded, failed) = told(&upload(&server, here.path(), Retention::last(0)));
    assert!(uploaded == [1] && failed.len() == 1 && failed[0].starts_with("2: "), "{uploaded:?} {failed:?}");
}

#[test]
fn whatever_is_damaged_in_the_store_is_named_and_not_brought() {
    let damages: [fn(&Path); 3] =
        [flip, |file| std::fs::write(file, "").expect("writable"), |file| std::fs::remove_file(file).expect("there")];
    for (number, damage) in damages.into_iter().enumerate() {
        for name in [shard(0), "recipe.toml".into(), MANIFEST.into()] {
            let (server, here) = (Server::new(), folder(&[1]));
            upload(&server, here.path(), Retention::last(1));
            assert_eq!(look(&server), (vec![1], vec![]), "the control: nothing is damaged");
            damage(&server.file(&format!("runs/a/step-00000001/{name}")));
            let (back, remote) = (tempfile::tempdir().expect("a folder"), remote(&server));
            let error = remote.fetch(1, &[Seat::Shared], &RealDisk, back.path()).expect_err("it is damaged");
            assert!(error.to_string().contains(&format!("s3://checkpoints/runs/a/step-00000001/{name}")), "{error}");
            assert!(std::fs::read_dir(back.path()).expect("a folder").next().is_none(), "nothing is left");
            if (number, &*name) == (2, MANIFEST) {
                assert_eq!(look(&server).0, [] as [u64; 0], "without a manifest there is no copy");
                continue;
            }
            assert!(error.is_damage(), "{error}");
            let audit = remote.audit(at(1)).expect("an answer");
            assert_eq!(audit.damage.iter().map(|damage| &damage.file).collect::<Vec<_>>(), [&name]);
        }
    }
}

type Variables = Vec<(String, String)>;

#[test]
fn a_store_that_lets_nobody_in_is_not_there_or_has_no_such_bucket_says_so() {
    let server = Server::new();
    let ask = |url: &str, change: &dyn Fn(&mut Variables)| {
        let mut environment = server.environment();
        change(&mut environment);
        let remote = Remote::open(&Place::parse(url).expect("a URL"), &Settings::of(environment));
        remote.and_then(|remote| remote.list()).expect_err("refused").to_string()
    };
    let set = |name: &'static str, value: &'static str| {
        move |all: &mut Variables| {
            all.retain(|(known, _)| known != name);
            all.push((name.into(), value.into()));
        }
    };
    let here = "s3://checkpoints/runs/a";
    let message = ask(here, &set("AWS_SECRET_ACCESS_KEY", "wrong"));
    assert!(
        message.contains("could not list s3://checkpoints/runs/a: the store refuses these credentials"),
        "{message}"
    );
    assert!(message.contains("SignatureDoesNotMatch"), "{message}");
    let message = ask("s3://nobody-has-it/runs/a", &|_| {});
    assert!(message.contains("there is no such bucket"), "{message}");
    // A port that nobody listens at.
    let message = ask(here, &set("AWS_ENDPOINT_URL", "http://127.0.0.1:1"));
    assert!(message.contains("there is no answer: is the address right (AWS_ENDPOINT_URL)"), "{message}");
    let message = ask(here, &set("AWS_ALLOW_HTTP", "false"));
    assert!(message.contains("set AWS_ALLOW_HTTP=true if that is meant"), "{message}");
    let message = ask(here, &set("AWS_ACCESS_KEY_ID", ""));
    assert!(message.contains("belong together"), "{message}");
}
