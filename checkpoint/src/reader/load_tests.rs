//! Loading many ranges at once, and what is damaged, all of it.

#![expect(clippy::single_range_in_vec_init, reason = "lists of ranges, some of one")]

use super::piece_tests::{SHAPE, saved};
use super::*;

fn load(checkpoint: &Checkpoint, ranges: &[Range<usize>]) -> Result<Vec<Vec<f32>>, CheckpointError> {
    let mut found: Vec<Vec<f32>> = ranges.iter().map(|range| vec![-1.0; range.len()]).collect();
    let mut wants: Vec<Want<'_>> =
        (ranges.iter().zip(&mut found)).map(|(range, out)| Want::interval("w", &SHAPE, range.clone(), out)).collect();
    let loaded = checkpoint.load(&mut wants);
    if loaded.is_err() {
        assert!(found.iter().flatten().all(|value| value.is_nan()), "nothing of it can be used: {found:?}");
    }
    loaded.map(|_| found)
}

fn flip(path: &Path, index: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[index] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn any_ranges_are_loaded_at_once_as_one_by_one() {
    let (_root, path) = saved(&[2, 0, 1]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    for first in 0..=12 {
        for second in first..=12 {
            let ranges = [second..12, 0..first, first..second];
            let expected = ranges.clone().map(|range| range.map(|element| 100.0 * element as f32).collect::<Vec<_>>());
            assert_eq!(load(&checkpoint, &ranges).unwrap(), expected);
        }
    }
}

#[test]
fn what_several_want_is_given_to_each() {
    let (_root, path) = saved(&[0, 1, 2]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let of = |range: Range<usize>| range.map(|element| 100.0 * element as f32).collect::<Vec<_>>();
    let ranges = [0..12, 2..9, 6..7, 6..12, 3..3];
    assert_eq!(load(&checkpoint, &ranges).unwrap(), ranges.map(of));
    // Two tensors whose pieces are the same bytes, as another writer may store tied weights.
    let file = path.join(layout::MANIFEST);
    let mut manifest = checkpoint.manifest().clone();
    manifest.tensors.insert("tied".into(), manifest.tensors["w"].clone());
    fs::write(&file, manifest.render(&file).unwrap()).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    checkpoint.verify().unwrap();
    let (mut w, mut tied) = ([0.0; 12], [0.0; 5]);
    let all = Want::all("w", &SHAPE, &mut w);
    checkpoint.load(&mut [all, Want::interval("tied", &SHAPE, 4..9, &mut tied)]).unwrap();
    assert_eq!((w.to_vec(), tied.to_vec()), (of(0..12), of(4..9)));
}

#[test]
fn headers_that_no_writer_makes_are_refused_by_name() {
    let (_root, path) = saved(&[0]);
    let (file, text) = (path.join("rank-0000.safetensors"), path.join(layout::MANIFEST));
    let good = Manifest::parse(&fs::read(&text).unwrap(), &text).unwrap();
    // The file of these bytes, with the size and hash that belong to them.
    let forge = |bytes: &[u8]| {
        fs::write(&file, bytes).unwrap();
        let mut manifest = good.clone();
        let blake3 = blake3::hash(bytes).to_hex().to_string();
        manifest.files.insert(
            "rank-0000.safetensors".into(),
            FileEntry { bytes: bytes.len() as u64, blake3, unpacked_bytes: None, subtrees: None },
        );
        fs::write(&text, manifest.render(&text).unwrap()).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let mut one = [0.0];
        (load(&checkpoint, &[0..5]), checkpoint.region("w", &SHAPE, 0..1, &mut one), checkpoint.verify())
    };
    let with = |length: u64, header: &str, data: usize| {
        [&length.to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
    };
    let header = |header: &str, data: usize| with(header.len() as u64, header, data);
    let one = |shape: &str, end: u64| format!(r#"{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}"#);
    let two = r#"{"w":{"dtype":"F32","shape":[5],"data_offsets":[0,20]},"v":{"dtype":"F32","shape":[5],"data_offsets":[8,28]}}"#;
    // Eight of the longest that a header may have, and a ninth: end to end up to four bytes below the end of the address space.
    let longest = (1u64 << 61) - 4;
    let entry = |index: u64, elements: u64, from: u64| {
        let to = from + 4 * elements;
        format!(r#""{index}":{{"dtype":"F32","shape":[{elements}],"data_offsets":[{from},{to}]}}"#)
    };
    let mut nine: Vec<String> = (0..8).map(|index| entry(index, longest / 4, index * longest)).collect();
    nine.push(entry(8, 7, 8 * longest));
    let nine = format!("{{{}}}", nine.join(","));
    let cases = [
        (vec![1; 7], "not a safetensors file"),
        (with(u64::MAX, "{}", 0), "not a safetensors file"),
        (with(3, "{}", 0), "not a safetensors file"),
        (header("{", 0), "not a safetensors file"),
        (header(&one("[18446744073709551615, 3]", 20), 20), "not a safetensors file"),
        (header(&one("[5]", u64::MAX), 20), "not a safetensors file"),
        (header(&one("[1099511627776]", 1 << 42), 20), "not a safetensors file"),
        (header(two, 28), "not a safetensors file"),
        (header(&nine, 28), "not a safetensors file: incomplete metadata"),
        (header(&one("[5]", 20), 21), "not a safetensors file"),
        (header(&one("[5]", 20).replace("F32", "I32"), 20), "expected F32, found type I32"),
        (header(&one("[4]", 16), 16), "expected shape [5], found [4]"),
        (header(&one("[5]", 20).replace('w', "x"), 20), "no tensor \"w\""),
    ];
    for (bytes, said) in cases {
        let (loaded, read, verified) = forge(&bytes);
        let messages = [loaded.unwrap_err(), read.unwrap_err(), verified.unwrap_err()].map(|fault| fault.to_string());
        for message in messages {
            assert!(message.contains("rank-0000.safetensors") && message.contains(said), "{said}: {message}");
        }
    }
    // The control.
    let (loaded, read, verified) = forge(&header(&one("[5]", 20), 20));
    assert_eq!(loaded.unwrap(), [[0.0; 5]]);
    read.and(verified).unwrap();
}

#[test]
fn only_the_files_that_hold_what_is_wanted_are_read_and_every_flipped_byte_of_them_is_named() {
    let (_root, path) = saved(&[0, 1, 2]);
    let file = path.join("rank-0001.safetensors");
    let bytes = fs::metadata(&file).unwrap().len() as usize;
    for index in 0..bytes {
        flip(&file, index);
        let checkpoint = Checkpoint::open(&path).unwrap();
        load(&checkpoint, &[8..12, 0..5]).unwrap();
        let message = load(&checkpoint, &[8..12, 7..8, 0..5]).unwrap_err().to_string();
        assert!(message.contains("rank-0001.safetensors") && message.contains("damaged"), "byte {index}: {message}");
        flip(&file, index);
    }
    load(&Checkpoint::open(&path).unwrap(), &[0..12]).unwrap();
}

#[test]
fn a_want_that_cannot_be_is_named_and_nothing_is_read() {
    let (_root, path) = saved(&[0, 2]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let mut out = [0.0; 3];
    let mut check = |tensor, shape: &[usize], range: Range<usize>, words: &[&str]| {
        let message = checkpoint.load(&mut [Want::interval(tensor, shape, range, &mut out)]).unwrap_err().to_string();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    };
    check("v", &SHAPE, 0..3, &["no tensor \"v\""]);
    check("w", &[12], 0..3, &["expected shape [12], found [3, 4]"]);
    check("w", &SHAPE, 10..13, &["elements 10..13 of a box of 12"]);
    check("w", &SHAPE, 0..2, &["elements 0..2 are 2, the slice has 3"]);
    check("w", &SHAPE, 4..7, &["elements 5..7 of its 12 are in no piece"]);
    // The control.
    checkpoint.load(&mut [Want::interval("w", &SHAPE, 2..5, &mut out)]).unwrap();
    assert_eq!(out, [200.0, 300.0, 400.0]);
}

#[test]
fn a_file_that_is_changed_or_cut_after_it_was_opened_is_noticed() {
    let (_root, path) = saved(&[0, 1, 2]);
    let file = path.join("rank-0001.safetensors");
    let checkpoint = Checkpoint::open(&path).unwrap();
    load(&checkpoint, &[0..12]).unwrap();
    let bytes = fs::read(&file).unwrap();
    flip(&file, bytes.len() - 1);
    assert!(
        load(&checkpoint, &[0..12]).unwrap_err().to_string().contains("damaged"),
        "what was read once is read anew"
    );
    fs::write(&file, &bytes[..bytes.len() - 4]).unwrap();
    assert!(load(&checkpoint, &[0..12]).unwrap_err().to_string().contains("cut short"));
    fs::write(&file, &bytes).unwrap();
    load(&checkpoint, &[0..12]).unwrap();
    fs::remove_file(&file).unwrap();
    load(&checkpoint, &[0..12]).expect("it was opened before retention took it");
    assert!(Checkpoint::open(&path).unwrap_err().to_string().contains("missing"));
}

#[test]
fn an_audit_names_everything_that_is_damaged() {
    let (_root, path) = saved(&[0, 1, 2]);
    let at = |name: &str| path.join(name);
    let whole = audit(&path);
    assert!(whole.damage.is_empty() && whole.step == Some(5) && whole.files == 4, "{whole:?}");
    assert_eq!(whole.bytes_good, Checkpoint::open(&path).unwrap().verify().unwrap());
    let damaged = |files: &[(&str, &str)]| {
        let audit = audit(&path);
        let found: Vec<(&str, String)> = audit.damage.iter().map(|one| (&*one.file, one.error.to_string())).collect();
        assert_eq!(found.len(), files.len(), "{found:?}");
        for ((name, words), (file, message)) in files.iter().zip(&found) {
            assert!(name == file && message.contains(words) && message.contains(name), "{file}: {message}");
        }
        audit
    };
    flip(&at("rank-0001.safetensors"), 3);
    assert_eq!(damaged(&[("rank-0001.safetensors", "damaged")]).damage[0].tensors, ["w"]);
    fs::write(at("recipe.toml"), "[mode]").unwrap();
    fs::remove_file(at("rank-0002.safetensors")).unwrap();
    let audit = damaged(&[
        ("rank-0001.safetensors", "damaged"),
        ("rank-0002.safetensors", "missing"),
        ("recipe.toml", "cut short or changed"),
    ]);
    assert_eq!(audit.bytes_good, fs::metadata(at("rank-0000.safetensors")).unwrap().len());
    flip(&at("manifest.json"), 100);
    damaged(&[("manifest.json", "the manifest is damaged")]);
    fs::remove_file(at("manifest.json")).unwrap();
    damaged(&[("manifest.json", "could not read")]);
}
