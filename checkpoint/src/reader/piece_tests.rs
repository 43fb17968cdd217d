//! Tensors in several pieces, and checkpoints of earlier builds.

use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::writer::{Attachment, Member, Outcome, Part, PieceSpec, Retention, Writer};

/// A tensor w of twelve elements, each a hundred times its index, in three ranks' files.
const CUTS: [Range<usize>; 3] = [0..5, 5..8, 8..12];
pub(super) const SHAPE: [usize; 2] = [3, 4];

/// A folder with the checkpoint of step 5, whose manifest names the parts of `ranks` only, and that checkpoint's path.
pub(super) fn saved(ranks: &[usize]) -> (tempfile::TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let member = |(rank, range): (usize, &Range<usize>)| {
        let pieces = vec![PieceSpec::interval("w", &SHAPE, range.clone())];
        let (member, retention) = (Member { rank, lead: rank == 0 }, Retention::last(0));
        Writer::member(Arc::new(RealDisk), root.path().into(), pieces, member, retention).unwrap()
    };
    let mut writers: Vec<Writer> = CUTS.iter().enumerate().map(member).collect();
    let mut parts: Vec<Part> = Vec::new();
    for (writer, range) in writers.iter_mut().zip(CUTS) {
        let attachments = vec![Attachment { name: "recipe.toml".into(), bytes: Arc::from(*b"[model]\n") }];
        writer.offer(5, json!({}), attachments, |snapshot| {
            let values = range.map(|element| 100.0 * element as f32);
            snapshot.tensor(0).iter_mut().zip(values).for_each(|(place, value)| *place = value);
        });
        let outcomes = writer.flush();
        let [Outcome::Written { part, .. }] = &outcomes[..] else { panic!("{outcomes:?}") };
        parts.push(part.clone());
    }
    let chosen = ranks.iter().map(|&rank| parts[rank].clone()).collect();
    writers[0].commit(5, "commit 1".into(), chosen);
    let outcomes = writers[0].flush();
    let [Outcome::Committed { path, .. }] = &outcomes[..] else { panic!("{outcomes:?}") };
    (root, path.clone())
}

fn region(checkpoint: &Checkpoint, range: Range<usize>) -> Result<Vec<f32>, CheckpointError> {
    let mut out = vec![-1.0; range.len()];
    let read = checkpoint.region("w", &SHAPE, range, &mut out);
    if read.is_err() {
        assert!(out.iter().all(|value| value.is_nan()), "nothing of it can be used");
    }
    read.map(|()| out)
}

#[test]
fn every_range_is_put_together_from_its_pieces() {
    let (_root, path) = saved(&[2, 0, 1]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    checkpoint.verify().unwrap();
    for start in 0..=12 {
        for end in start..=12 {
            let expected: Vec<f32> = (start..end).map(|element| 100.0 * element as f32).collect();
            assert_eq!(region(&checkpoint, start..end).unwrap(), expected);
        }
    }
    let mut whole = [0.0; 12];
    checkpoint.tensor("w", &SHAPE, &mut whole).unwrap();
    assert_eq!(whole.to_vec(), region(&checkpoint, 0..12).unwrap());
    assert!(checkpoint.has("w") && !checkpoint.has("v"));
    assert_eq!(checkpoint.id(), "commit 1");
}

#[test]
fn a_region_that_is_not_as_asked_for_is_named() {
    let (_root, path) = saved(&[0, 1, 2]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let check = |name, shape: &[usize], range: Range<usize>, count, words: &[&str]| {
        let message = checkpoint.region(name, shape, range, &mut vec![0.0; count]).unwrap_err().to_string();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    };
    check("v", &SHAPE, 0..1, 1, &["step-00000005", "no tensor \"v\""]);
    check("w", &[12], 0..1, 1, &["step-00000005", "tensor w", "expected shape [12], found [3, 4]"]);
    check("w", &SHAPE, 11..13, 2, &["step-00000005", "tensor w", "elements 11..13 of a box of 12"]);
    check("w", &SHAPE, Range { start: 3, end: 2 }, 0, &["tensor w", "elements 3..2"]);
    check("w", &SHAPE, 3..6, 2, &["tensor w", "elements 3..6 are 3, the slice has 2"]);
}

#[test]
fn only_the_files_that_hold_the_range_are_touched() {
    let (_root, path) = saved(&[0, 1, 2]);
    let file = path.join("rank-0001.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    for range in [0..5, 8..12, 2..3, 0..0, 5..5, 6..6, 12..12] {
        region(&checkpoint, range).unwrap();
    }
    for range in [4..6, 7..8, 0..12] {
        let message = region(&checkpoint, range).unwrap_err().to_string();
        assert!(message.contains("rank-0001.safetensors") && message.contains("damaged"), "{message}");
    }
    assert!(checkpoint.verify().unwrap_err().to_string().contains("rank-0001.safetensors"));
}

#[test]
fn what_no_piece_holds_is_named() {
    let check = |ranks: &[usize], range: Range<usize>, absent: &str| {
        let (_root, path) = saved(ranks);
        let checkpoint = Checkpoint::open(&path).unwrap();
        checkpoint.verify().unwrap();
        let message = region(&checkpoint, range).unwrap_err().to_string();
        let expected = format!("tensor w: elements {absent} of its 12 are in no piece of this checkpoint");
        assert!(message.contains("step-00000005") && message.contains(&expected), "{message}");
        assert!(message.contains("copy it from the machine that holds it"), "{message}");
    };
    check(&[0], 0..12, "5..12");
    check(&[0, 2], 0..12, "5..8");
    check(&[0, 2], 6..9, "6..8");
    check(&[0, 1], 10..11, "10..11");
    let error = CheckpointError::Absent {
        path: "/c".into(),
        tensor: "w".into(),
        absent: (0..6).map(|gap| 2 * gap..2 * gap + 1).collect(),
        count: 12,
    };
    assert!(error.to_string().contains("elements 0..1, 2..3, 4..5, 6..7 and 2 more ranges of its 12"), "{error}");
}

#[test]
fn a_manifest_that_lies_about_a_piece_is_refused() {
    let (_root, path) = saved(&[0, 1, 2]);
    let file = path.join("manifest.json");
    let good = Manifest::parse(&fs::read(&file).unwrap(), &file).unwrap();
    let check = |change: &dyn Fn(&mut TensorEntry), expected: &str| {
        let mut manifest = good.clone();
        change(manifest.tensors.get_mut("w").unwrap());
        fs::write(&file, manifest.render(&file).unwrap()).unwrap();
        let message = Checkpoint::open(&path).unwrap().verify().unwrap_err().to_string();
        assert!(message.contains(&*path.to_string_lossy()) && message.contains(expected), "{message}");
    };
    check(&|w| w.pieces[1].region.flat_end -= 1, "tensor w: expected shape [2], found [3]");
    check(&|w| w.pieces[1].key = "v".into(), "no tensor \"v\"");
    check(&|w| w.pieces[2].file = "recipe.toml".into(), "not a safetensors file");
    let swapped = |w: &mut TensorEntry| w.pieces[1].file = std::mem::replace(&mut w.pieces[2].file, layout::shard(1));
    check(&swapped, "tensor w: expected shape [4], found [3]");
    // A piece that is the whole has the tensor's own shape.
    let whole = |w: &mut TensorEntry| {
        w.pieces.truncate(1);
        w.pieces[0].region.flat_end = 12;
    };
    check(&whole, "tensor w: expected shape [3, 4], found [5]");
}

/// A checkpoint that the first build wrote, before there were pieces and ids, byte for byte.
#[test]
fn a_checkpoint_of_the_first_build_is_read() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("step-00000007");
    fs::create_dir(&path).unwrap();
    let golden: [(&str, &[u8]); 3] = [
        ("manifest.json", include_bytes!("golden/manifest.json")),
        ("rank-0000.safetensors", include_bytes!("golden/rank-0000.safetensors")),
        ("recipe.toml", include_bytes!("golden/recipe.toml")),
    ];
    for (name, bytes) in golden {
        fs::write(path.join(name), bytes).unwrap();
    }
    let checkpoint = Checkpoint::open(&path).unwrap();
    checkpoint.verify().unwrap();
    let mut a = [0.0; 2];
    checkpoint.tensor("a", &[1, 2], &mut a).unwrap();
    assert_eq!(a, [1.0, -2.0]);
    checkpoint.region("a", &[1, 2], 1..2, &mut a[..1]).unwrap();
    assert_eq!(a, [-2.0, -2.0]);
    checkpoint.tensor("none", &[0, 4], &mut []).unwrap();
    assert_eq!((checkpoint.step(), checkpoint.id(), checkpoint.state()), (7, "", &json!({ "cursor": 80 })));
    assert_eq!(checkpoint.attachment("recipe.toml").unwrap(), b"[model]\n");
    // What is written today of such a manifest is what was written then.
    assert_eq!(checkpoint.manifest().render(&path).unwrap(), golden[0].1);
}
