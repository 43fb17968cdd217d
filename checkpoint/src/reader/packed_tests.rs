//! Packed files: bitwise at every border, damage named, and forged ones refused.

use std::sync::Arc;

use serde_json::json;

use super::stored::{Content, Stored};
use super::*;
use crate::packed::{PIECE, table};
use crate::writer::{Outcome, Retention, TensorSpec, Writer};

const FILE: &str = "rank-0000.safetensors.zst";
const ELEMENTS: usize = PIECE / 4;

/// Bits that a detour through arithmetic would lose, between noise.
fn hard(index: usize) -> f32 {
    let special = [0x7fc0_1234, 0xff80_0001, 0x0000_0001, 0x8000_0000, 0x807f_ffff, 0x7f80_0000, 0xff7f_ffff];
    let noise = (index as u32).wrapping_mul(0x9E37_79B9) >> 9 | 0x3c00_0000;
    f32::from_bits(if index.is_multiple_of(3) { special[index / 3 % special.len()] } else { noise })
}

/// A checkpoint of step 5 of the tensors `a` and `b` with so many elements; its folder, and its bytes packed and not.
fn saved(packs: bool, lengths: [usize; 2]) -> (tempfile::TempDir, PathBuf, [u64; 2]) {
    let root = tempfile::tempdir().unwrap();
    let spec = |(name, length): (&str, usize)| TensorSpec { name: name.into(), shape: vec![length] };
    let specs = ["a", "b"].into_iter().zip(lengths).map(spec).collect();
    let mut writer = Writer::new(Arc::new(RealDisk), root.path().into(), specs, Retention::last(0)).unwrap();
    writer.pack(packs);
    writer.offer(5, json!({}), Vec::new(), |snapshot| {
        for tensor in 0..2 {
            snapshot.tensor(tensor).iter_mut().enumerate().for_each(|(index, value)| *value = hard(index + tensor));
        }
    });
    let outcomes = writer.flush();
    let [Outcome::Committed { path, bytes, unpacked_bytes, .. }] = &outcomes[..] else { panic!("{outcomes:?}") };
    (root, path.clone(), [*bytes, *unpacked_bytes])
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn expected(tensor: usize, range: Range<usize>) -> Vec<u32> {
    range.map(|index| hard(index + tensor).to_bits()).collect()
}

#[test]
fn every_length_around_the_borders_of_pieces_comes_back_bitwise() {
    let near = |length: usize| [length - 1, length, length + 1];
    let lengths = [0, 1, 2, 3, 5].into_iter().chain(near(ELEMENTS)).chain(near(2 * ELEMENTS));
    for (first, second) in lengths.flat_map(|length| [(length, 0), (length, 7), (3, length)]) {
        let (_root, path, [bytes, unpacked]) = saved(true, [first, second]);
        let checkpoint = Checkpoint::open(&path).unwrap();
        checkpoint.verify().unwrap();
        assert!(first + second < 1000 || bytes < unpacked, "the exponents of noise are alike: {bytes} of {unpacked}");
        let (mut a, mut b) = (vec![0.0; first], vec![0.0; second]);
        let (shape_a, shape_b) = ([first], [second]);
        let mut wants = [Want::all("a", &shape_a, &mut a), Want::all("b", &shape_b, &mut b)];
        Checkpoint::open(&path).unwrap().load(&mut wants).unwrap();
        assert_eq!((bits(&a), bits(&b)), (expected(0, 0..first), expected(1, 0..second)), "{first} and {second}");
        for middle in [0, first / 2, first.saturating_sub(ELEMENTS), first] {
            let mut rest = vec![0.0; first - middle];
            checkpoint.region("a", &shape_a, middle..first, &mut rest).unwrap();
            assert_eq!(bits(&rest), expected(0, middle..first));
        }
    }
}

#[test]
fn frames_are_those_of_the_plain_file_and_zstd_itself_reads_them() {
    let lengths = [ELEMENTS - 2, 9];
    let (_plain_root, plain, [bytes, unpacked]) = saved(false, lengths);
    assert_eq!(bytes, unpacked);
    assert_eq!(Checkpoint::open(&plain).unwrap().manifest().version, 1);
    let (_root, path, [_, unpacked]) = saved(true, lengths);
    let manifest = Checkpoint::open(&path).unwrap().manifest().clone();
    assert_eq!(manifest.version, 2);
    let plain = fs::read(plain.join("rank-0000.safetensors")).unwrap();
    assert_eq!(manifest.files[FILE].unpacked_bytes, Some(plain.len() as u64));
    assert!(unpacked > plain.len() as u64, "the manifest counts too");
    // Skips the table, as its own tool does.
    let file = fs::read(path.join(FILE)).unwrap();
    let stream = zstd::bulk::decompress(&file, plain.len()).unwrap();
    let header = 8 + u64::from_le_bytes(*plain.first_chunk().unwrap()) as usize;
    assert_eq!(stream[..header], plain[..header]);
    let mut shuffled: Vec<u8> = Vec::new();
    for piece in plain[header..].chunks(PIECE) {
        (0..4).for_each(|plane| shuffled.extend(piece.iter().skip(plane).step_by(4)));
    }
    assert!(stream[header..] == shuffled, "plane by plane");
}

#[test]
fn every_flipped_byte_is_noticed_and_named() {
    let (_root, path, _) = saved(true, [5, 2]);
    for name in ["manifest.json", FILE] {
        let file = path.join(name);
        let good = fs::read(&file).unwrap();
        for index in 0..good.len() {
            let mut bytes = good.clone();
            bytes[index] ^= 1 << (index % 8);
            fs::write(&file, bytes).unwrap();
            let checkpoint = Checkpoint::open(&path);
            let message = checkpoint.and_then(|checkpoint| checkpoint.verify()).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains("damaged"), "byte {index} of {name}: {message}");
            let mut a = [0.0; 5];
            let loaded = Checkpoint::open(&path).and_then(|open| open.load(&mut [Want::all("a", &[5], &mut a)]));
            assert!(loaded.unwrap_err().to_string().contains(name));
            assert!(name != FILE || a.iter().all(|value| value.is_nan()));
        }
        fs::write(&file, good).unwrap();
        Checkpoint::open(&path).unwrap().verify().unwrap();
    }
}

/// Puts these bytes into the place of the packed file, with a right hash and this size unpacked, and expects that each way
/// to read it says `words`.
fn refused(path: &Path, bytes: &[u8], unpacked: u64, words: &[&str]) {
    let text = path.join(layout::MANIFEST);
    let mut manifest = Manifest::parse(&fs::read(&text).unwrap(), &text).unwrap();
    let blake3 = blake3::hash(bytes).to_hex().to_string();
    let entry = FileEntry { bytes: bytes.len() as u64, blake3, unpacked_bytes: Some(unpacked), subtrees: None };
    manifest.files.insert(FILE.into(), entry);
    fs::write(path.join(FILE), bytes).unwrap();
    fs::write(&text, manifest.render(&text).unwrap()).unwrap();
    let open = || Checkpoint::open(path).unwrap();
    let [mut one, mut other] = [[0.0; 5]; 2];
    let faults = [
        open().verify().unwrap_err(),
        open().load(&mut [Want::all("a", &[5], &mut one)]).unwrap_err(),
        open().tensor("a", &[5], &mut other).unwrap_err(),
    ];
    for message in faults.map(|fault| fault.to_string()) {
        assert!([FILE].iter().chain(words).all(|word| message.contains(word)), "{words:?}: {message}");
    }
    assert!(one.iter().all(|value| value.is_nan()));
    assert!(other.iter().all(|value| value.is_nan()), "nothing of it was handed over: {other:?}");
}

/// A file of these frames, each with what the table says that it holds.
fn file(frames: &[(&[u8], u32)]) -> Vec<u8> {
    let entries: Vec<[u32; 2]> = frames.iter().map(|(frame, held)| [frame.len() as u32, *held]).collect();
    [frames.iter().map(|(frame, _)| *frame).collect::<Vec<_>>().concat(), table(&entries)].concat()
}

fn pack(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 1).unwrap()
}

#[test]
fn frames_that_are_foreign_cut_or_too_large_are_refused_by_name_though_their_hash_is_right() {
    let (_root, path, _) = saved(true, [5, 2]);
    let manifest = Checkpoint::open(&path).unwrap().manifest().clone();
    let total = manifest.files[FILE].unpacked_bytes.unwrap();
    let good = fs::read(path.join(FILE)).unwrap();
    let head_frame = zstd::zstd_safe::find_frame_compressed_size(&good).unwrap();
    let (head_frame, head) = (&good[..head_frame], (total - 28) as u32);
    let frame = pack(&[7; 28]);
    let check = |frames: &[(&[u8], u32)], words: &[&str]| refused(&path, &file(frames), total, words);

    check(&[(head_frame, head), (b"no frame at all, and no zstd", 28)], &["frame 1", "not one zstd frame"]);
    check(&[(head_frame, head), (&frame[..frame.len() - 1], 28)], &["frame 1", "not one zstd frame"]);
    check(&[(head_frame, head), (&[&frame[..], &pack(&[])].concat(), 28)], &["frame 1", "not one zstd frame"]);
    // A bomb of 64 MiB in a few bytes: what it wants is never taken.
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    assert!(bomb.len() < PIECE);
    check(&[(head_frame, head), (&bomb, 28)], &["frame 1", "expected 28 bytes in it"]);
    check(&[(&pack(&[0; 2 * PIECE]), head), (&frame, 28)], &["frame 0", "expected"]);
    check(&[(head_frame, head), (&pack(&[7; 29]), 28)], &["frame 1", "expected 28 bytes in it"]);
    check(&[(head_frame, head), (&pack(&[7; 27]), 28)], &["frame 1", "expected 28 bytes in it, found 27"]);
    // Tables that do not fit.
    check(&[(head_frame, head), (&frame, 24)], &["frame 1: expected 28 bytes in it, found 24"]);
    check(&[(head_frame, head), (&frame, PIECE as u32 + 1)], &["frame 1", "holds 1048576 at the most"]);
    check(&[(head_frame, head)], &["expected 2 frames, found 1"]);
    check(&[(head_frame, head), (&frame, 28), (&frame, 28)], &["not 3 frames"]);
    check(&[], &["have 0 bytes"]);
    check(&[(&pack(&[1; 5]), 5), (&frame, 28)], &["shorter than a header"]);
    check(&[(&pack(&[0xff; 8]), 8), (&frame, 28)], &["its header wants"]);
    check(&[(&pack(&[0; 8]), 8), (&frame, 28)], &["expected"]);
    for cut in [0, 1, 16, good.len() / 2, good.len() - 1] {
        refused(&path, &good[..cut], total, &["not a packed safetensors file"]);
    }
    let mut endless = good.clone();
    let at = good.len() - 9;
    endless[at..at + 4].fill(0xff);
    refused(&path, &endless, u64::MAX, &["are not 4294967295 frames"]);
    refused(&path, &good, u64::MAX, &["not"]);
    refused(&path, &good, total + 4, &["frame 1: expected 32 bytes in it, found 28"]);
    refused(&path, &good, total - 2, &["not whole values"]);
    // The control: as it was.
    let text = path.join(layout::MANIFEST);
    fs::write(path.join(FILE), &good).unwrap();
    fs::write(&text, manifest.render(&text).unwrap()).unwrap();
    Checkpoint::open(&path).unwrap().verify().unwrap();
}

#[test]
fn bytes_that_change_after_the_hash_was_taken_are_noticed_by_their_frame() {
    let (_root, path, _) = saved(true, [5, 2]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let mut a = [0.0; 5];
    checkpoint.tensor("a", &[5], &mut a).unwrap();
    assert_eq!(bits(&a), expected(0, 0..5));
    let stored = Stored::open(&path, FILE, checkpoint.entry(FILE).unwrap(), true).unwrap();
    let reading = stored.reading().unwrap();
    reading.check().unwrap();
    let Content::Packed(packed, _) = reading.content().unwrap() else { panic!("it is packed") };
    packed.check(&reading.file).unwrap();
    let mut bytes = fs::read(path.join(FILE)).unwrap();
    let table_bytes = 17 + 2 * 8;
    let at = bytes.len() - table_bytes - 6;
    bytes[at] ^= 4;
    fs::write(path.join(FILE), bytes).unwrap();
    let message = packed.check(&reading.file).unwrap_err().to_string();
    assert!(message.contains(FILE) && message.contains("frame 1"), "{message}");
    let message = checkpoint.tensor("a", &[5], &mut a).unwrap_err().to_string();
    assert!(message.contains(FILE) && message.contains("damaged"), "what is read again is hashed again: {message}");
    assert!(a.iter().all(|value| value.is_nan()));
}
