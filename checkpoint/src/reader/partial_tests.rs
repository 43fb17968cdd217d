//! Only the blocks that hold what is wanted are read and checked; the manifest proves each of them.

use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::tree::{BLOCK, Subtrees};
use crate::writer::{Outcome, Retention, TensorSpec, Writer};

/// Elements of a tensor: three blocks and a bit.
const ELEMENTS: usize = (3 * BLOCK as usize + 4096) / 4;

/// A checkpoint of the tensors `a` and `b`, in a file of seven blocks (or packed).
fn saved(packs: bool) -> (tempfile::TempDir, PathBuf, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let specs = ["a", "b"].map(|name| TensorSpec { name: name.into(), shape: vec![ELEMENTS] }).to_vec();
    let mut writer = Writer::new(Arc::new(RealDisk), root.path().into(), specs, Retention::last(0)).unwrap();
    writer.pack(packs);
    writer.offer(5, json!({}), Vec::new(), |snapshot| {
        for tensor in 0..2 {
            snapshot.tensor(tensor).iter_mut().enumerate().for_each(|(index, value)| *value = value_at(tensor, index));
        }
    });
    let outcomes = writer.flush();
    let [Outcome::Committed { path, .. }] = &outcomes[..] else { panic!("{outcomes:?}") };
    let file = path.join(if packs { layout::packed_shard(0) } else { layout::shard(0) });
    (root, path.clone(), file)
}

fn value_at(tensor: usize, index: usize) -> f32 {
    // Noise, so that packing saves little and frames lie in many blocks.
    let mut x = (index as u32).wrapping_mul(2) + tensor as u32 + 1;
    x = (x ^ x >> 16).wrapping_mul(0x7FEB_352D);
    x = (x ^ x >> 15).wrapping_mul(0x846C_A68B);
    f32::from_bits(x ^ x >> 16)
}

fn read(path: &Path, tensor: &str, range: Range<usize>) -> Result<(u64, Vec<f32>), CheckpointError> {
    let mut out = vec![0.0; range.len()];
    let checkpoint = Checkpoint::open(path)?;
    let bytes = checkpoint.load(&mut [Want::interval(tensor, &[ELEMENTS], range, &mut out)])?;
    Ok((bytes, out))
}

/// Changes a byte of each of these blocks of a file.
fn damage(file: &Path, blocks: impl Iterator<Item = usize>) {
    let mut bytes = fs::read(file).unwrap();
    for block in blocks {
        let at = block * BLOCK as usize + 1000;
        bytes[at.min(file_bytes(file) - 1)] ^= 1;
    }
    fs::write(file, bytes).unwrap();
}

fn file_bytes(file: &Path) -> usize {
    fs::metadata(file).unwrap().len() as usize
}

fn check(range: Range<usize>, found: &[f32], tensor: usize) {
    let equal = |(index, value): (usize, &f32)| value.to_bits() == value_at(tensor, index).to_bits();
    assert!(range.zip(found).all(equal), "bit for bit");
}

#[test]
fn a_part_is_read_without_the_rest_and_damage_elsewhere_is_for_verify_to_find() {
    let (_root, path, file) = saved(false);
    let block = BLOCK as usize / 4;
    let (range, few) = (block..block + 5, BLOCK);
    let (bytes, found) = read(&path, "a", range.clone()).unwrap();
    assert_eq!(bytes, few, "one block of {}", file_bytes(&file));
    check(range.clone(), &found, 0);
    let (bytes, found) = read(&path, "b", 0..ELEMENTS).unwrap();
    assert_eq!(bytes, file_bytes(&file) as u64 - 3 * BLOCK, "the tensor behind begins in the fourth block");
    check(0..ELEMENTS, &found, 1);
    // All other blocks but the first, which has the header.
    let good = fs::read(&file).unwrap();
    damage(&file, 2..7);
    assert_eq!(read(&path, "a", range.clone()).unwrap().0, few);
    let message = read(&path, "b", 7..8).unwrap_err().to_string();
    assert!(
        message.contains("rank-0000") && message.contains("3145728..4194304") && message.contains("damaged"),
        "{message}"
    );
    let message = Checkpoint::open(&path).unwrap().verify().unwrap_err().to_string();
    assert!(message.contains("rank-0000") && message.contains("damaged"), "{message}");
    let mut out = [0.0; 5];
    let mut wants = [Want::interval("a", &[ELEMENTS], range.clone(), &mut out)];
    let message = Checkpoint::open(&path).unwrap().load_and_verify(&mut wants).unwrap_err().to_string();
    assert!(message.contains("2097152..3145728"), "the first that is damaged: {message}");
    assert!(out.iter().all(|value| value.is_nan()));
    // The controls: damage in what is read, in the header, and none.
    fs::write(&file, &good).unwrap();
    damage(&file, [1].into_iter());
    assert!(read(&path, "a", range.clone()).unwrap_err().to_string().contains("1048576..2097152"));
    fs::write(&file, &good).unwrap();
    damage(&file, [0].into_iter());
    assert!(read(&path, "a", range.clone()).unwrap_err().to_string().contains("0..1048576"));
    fs::write(&file, &good).unwrap();
    let mut wants = [Want::interval("a", &[ELEMENTS], range, &mut out)];
    let bytes = Checkpoint::open(&path).unwrap().load_and_verify(&mut wants).unwrap();
    assert_eq!(bytes, good.len() as u64, "each byte once");
}

#[test]
fn a_part_of_a_packed_file_is_read_without_the_rest() {
    let (_root, path, file) = saved(true);
    let blocks = file_bytes(&file).div_ceil(BLOCK as usize);
    assert!(blocks > 4, "there is something to leave out");
    let (bytes, found) = read(&path, "a", 3..9).unwrap();
    assert!(bytes <= 2 * BLOCK);
    check(3..9, &found, 0);
    damage(&file, 2..blocks - 1);
    check(3..9, &read(&path, "a", 3..9).unwrap().1, 0);
    assert!(read(&path, "b", 0..ELEMENTS).unwrap_err().to_string().contains("damaged"));
    assert!(Checkpoint::open(&path).unwrap().verify().is_err());
    damage(&file, [0].into_iter());
    assert!(read(&path, "a", 3..9).unwrap_err().to_string().contains("damaged"));
}

/// Puts other values of blocks into the manifest, and returns what opening says.
fn with_subtrees(path: &Path, subtrees: Option<Subtrees>) -> Result<Checkpoint, CheckpointError> {
    let text = path.join(layout::MANIFEST);
    let mut body: Value = serde_json::from_slice(&fs::read(&text).unwrap()).unwrap();
    let entry = body["body"]["files"]["rank-0000.safetensors"].as_object_mut().unwrap();
    match subtrees {
        Some(subtrees) => entry.insert("subtrees".into(), serde_json::to_value(subtrees).unwrap()),
        None => entry.remove("subtrees"),
    };
    fs::write(&text, crate::manifest::sealed(&body["body"])).unwrap();
    Checkpoint::open(path)
}

#[test]
fn a_manifest_without_values_of_blocks_has_the_whole_file_read_and_hashed() {
    let (_root, path, file) = saved(false);
    let good = Checkpoint::open(&path).unwrap().manifest().clone();
    assert_eq!((good.version, good.files["rank-0000.safetensors"].subtrees.as_ref().unwrap().bytes), (1, BLOCK));
    with_subtrees(&path, None).unwrap();
    let (bytes, found) = read(&path, "a", 3..9).unwrap();
    assert_eq!(bytes, BLOCK, "after the header's check the blocks are known");
    check(3..9, &found, 0);
    damage(&file, [5].into_iter());
    let message = read(&path, "a", 3..9).unwrap_err().to_string();
    assert!(message.contains("expected BLAKE3") && message.contains("damaged"), "{message}");
}

#[test]
fn values_that_are_not_those_of_the_file_are_refused_and_nothing_is_read() {
    let (_root, path, _) = saved(false);
    let good = Checkpoint::open(&path).unwrap().manifest().files["rank-0000.safetensors"].subtrees.clone().unwrap();
    let check = |subtrees: Subtrees, words: &str| {
        let message = with_subtrees(&path, Some(subtrees)).unwrap_err().to_string();
        assert!(message.contains("file rank-0000.safetensors") && message.contains(words), "{message}");
    };
    let swapped = good.values[64..128].to_owned() + &good.values[..64] + &good.values[128..];
    check(Subtrees { values: swapped, bytes: good.bytes }, "its subtrees make BLAKE3");
    check(Subtrees { bytes: 2 * BLOCK, ..good.clone() }, "448 digits for 4");
    check(Subtrees { bytes: 3, ..good.clone() }, "no power of two");
    // The control.
    with_subtrees(&path, Some(good)).unwrap().verify().unwrap();
}
