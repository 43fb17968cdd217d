#![expect(clippy::single_range_in_vec_init, reason = "lists of ranges, some of one")]

use std::ops::Range;

use compression::Region;
use serde_json::json;

use super::*;
use crate::layout;

fn manifest() -> Manifest {
    let region = Region::whole(&[2, 3]).unwrap();
    let piece = Piece { file: "rank-0000.safetensors".into(), key: "w".into(), region };
    let tensor = TensorEntry { dtype: DTYPE.into(), shape: vec![2, 3], pieces: vec![piece] };
    let file = FileEntry { bytes: 96, blake3: "ab".repeat(32), unpacked_bytes: None, subtrees: None };
    Manifest {
        format: FORMAT.into(),
        version: VERSION,
        step: 7,
        id: String::new(),
        tensors: BTreeMap::from([("w".into(), tensor)]),
        files: BTreeMap::from([("rank-0000.safetensors".into(), file)]),
        state: json!({ "cursor": 18_446_744_073_709_551_615_u64, "scale": 0.1 }),
    }
}

fn path() -> &'static Path {
    Path::new("/runs/a/manifest.json")
}

#[test]
fn a_manifest_comes_back_as_it_was() {
    let text = manifest().render(path()).unwrap();
    assert_eq!(Manifest::parse(&text, path()).unwrap(), manifest());
}

#[test]
fn every_flipped_bit_of_the_text_is_noticed() {
    let mut text = manifest().render(path()).unwrap();
    for index in 0..text.len() {
        for bit in 0..8 {
            text[index] ^= 1 << bit;
            let fault = Manifest::parse(&text, path()).expect_err("a flipped bit");
            assert!(matches!(fault, CheckpointError::ManifestHash { .. }), "{fault}");
            text[index] ^= 1 << bit;
        }
        let cut = Manifest::parse(&text[..index], path()).unwrap_err().to_string();
        assert!(cut.contains("/runs/a/manifest.json"), "{cut}");
    }
    // The control: with the hash taken anew, the same kind of change passes.
    let mut body = serde_json::to_value(manifest()).unwrap();
    body["step"] = json!(6);
    assert_eq!(Manifest::parse(&sealed(&body), path()).unwrap().step, 6);
}

/// Sets `pointer` of an otherwise good manifest to `value` and expects a message with all of `words`.
fn check(pointer: &str, value: Value, words: &[&str]) {
    let mut body = serde_json::to_value(manifest()).unwrap();
    *body.pointer_mut(pointer).unwrap() = value;
    let message = Manifest::parse(&sealed(&body), path()).unwrap_err().to_string();
    for word in ["/runs/a/manifest.json"].iter().chain(words) {
        assert!(message.contains(word), "{message}");
    }
}

#[test]
fn another_version_or_format_is_named() {
    check("/version", json!(3), &["version 3", "reads version 2", "update"]);
    check("/version", json!(2), &["version 2 does not go with its files, which make it version 1"]);
    let packed = json!({ "bytes": 96, "blake3": "ab".repeat(32), "unpacked_bytes": 120 });
    check("/files/rank-0000.safetensors", packed, &["version 1 does not go with its files, which make it version 2"]);
    check("/version", json!(0), &["expected version 1 or 2"]);
    check("/version", json!("1"), &["expected version 1"]);
    check("/format", json!("torch"), &["tributary-checkpoint", "torch"]);
    check("/tensors", json!([]), &["expected a map"]);
}

#[test]
fn a_file_name_that_climbs_out_is_named() {
    for name in ["../../etc/passwd", "/etc/passwd", "a/b", "..", ""] {
        check("/files", json!({ name: { "bytes": 1, "blake3": "00" } }), &[&format!("{name:?}"), "plain name"]);
    }
    check("/files/rank-0000.safetensors/blake3", json!("AB".repeat(32)), &["64 lower-case hex digits"]);
}

#[test]
fn a_shape_that_overflows_is_named() {
    check("/tensors/w/shape", json!([usize::MAX, 3]), &["tensor w", "more elements than can be addressed"]);
    check("/tensors/w/shape", json!([2]), &["tensor w", "the tensor has 1"]);
    // A part of a larger tensor, then.
    let mut larger = serde_json::to_value(manifest()).unwrap();
    larger["tensors"]["w"]["shape"] = json!([2, 4]);
    assert_eq!(Manifest::parse(&sealed(&larger), path()).unwrap().tensors["w"].absent(&(0..8)), [3..4, 7..8]);
}

/// A piece of the tensor w with the elements `range` in the file of `rank`.
fn piece(rank: usize, range: Range<usize>) -> Piece {
    let region = Region { flat_start: range.start, flat_end: range.end, ..Region::whole(&[2, 3]).unwrap() };
    Piece { file: layout::shard(rank), key: "w".into(), region }
}

/// The good manifest, with these pieces in the files of three ranks.
fn in_pieces(pieces: Vec<Piece>) -> Manifest {
    let mut manifest = manifest();
    let file = manifest.files["rank-0000.safetensors"].clone();
    manifest.files.extend((1..3).map(|rank| (layout::shard(rank), file.clone())));
    manifest.tensors.get_mut("w").unwrap().pieces = pieces;
    manifest
}

#[test]
fn pieces_that_do_not_fit_together_are_named() {
    let parse = |pieces| {
        let manifest = in_pieces(pieces);
        let text = sealed(&serde_json::to_value(&manifest).unwrap());
        // What is refused when it is read is refused when it is written.
        assert_eq!(manifest.render(path()).is_ok(), Manifest::parse(&text, path()).is_ok());
        Manifest::parse(&text, path())
    };
    let check = |pieces, words: &[&str]| {
        let message = parse(pieces).unwrap_err().to_string();
        let all = ["/runs/a/manifest.json", "tensor w"];
        assert!(all.iter().chain(words).all(|word| message.contains(word)), "{message}");
    };
    let named = ["rank-0000.safetensors", "rank-0001.safetensors"];
    check(vec![piece(0, 0..4), piece(1, 3..6)], &["overlap", "0..4", "3..6", named[0], named[1]]);
    check(vec![piece(0, 0..6), piece(1, 2..3)], &["overlap", "0..6", "2..3"]);
    check(vec![piece(0, 0..6), piece(1, 0..6)], &["overlap", "0..6"]);
    check(vec![piece(1, 3..6), piece(0, 0..3)], &["do not ascend", "elements 3..6 stand before elements 0..3"]);
    check(vec![piece(0, 0..3), piece(0, 3..6)], &["two of its pieces", named[0], "\"w\""]);
    check(vec![piece(0, 0..3), piece(3, 3..6)], &["rank-0003.safetensors", "not among the files"]);
    check(vec![piece(0, 0..7)], &["elements 0..7 of a box of 6"]);
    // The controls: pieces that touch, in any files, and gaps anywhere.
    for ranges in [vec![0..6], vec![0..2, 2..5, 5..6], vec![1..2, 4..5], vec![0..0, 0..6], vec![]] {
        let pieces = ranges.iter().cloned().enumerate().map(|(rank, range)| piece(rank, range)).collect();
        assert_eq!(parse(pieces).unwrap().tensors["w"].pieces.len(), ranges.len(), "{ranges:?}");
    }
}

#[test]
fn a_piece_of_another_type_or_of_a_box_that_is_too_small_is_named() {
    check("/tensors/w/pieces/0/region/start", json!([1, 0]), &["tensor w", "elements 0..6 of a box of 3"]);
    check("/tensors/w/dtype", json!("I8"), &["tensor w", "expected F32", "I8"]);
}

#[test]
fn what_no_piece_holds_is_known() {
    let manifest = in_pieces(vec![piece(0, 1..2), piece(1, 3..3), piece(2, 4..5)]);
    let tensor = &manifest.tensors["w"];
    let check = |range: Range<usize>, files: &[usize], absent: &[Range<usize>]| {
        let region = Region::interval(&tensor.shape, range.clone());
        let found: Vec<String> = tensor.near(&region).map(|piece| piece.file.clone()).collect();
        assert_eq!(found, files.iter().map(|&rank| layout::shard(rank)).collect::<Vec<_>>(), "{range:?}");
        assert_eq!(tensor.absent(&range), absent, "{range:?}");
    };
    check(0..6, &[0, 2], &[0..1, 2..4, 5..6]);
    check(1..2, &[0], &[]);
    check(1..5, &[0, 2], &[2..4]);
    check(2..4, &[], &[2..4]);
    check(4..6, &[2], &[5..6]);
    check(6..6, &[], &[]);
}

#[test]
fn the_id_is_left_out_where_there_is_none() {
    let text = |manifest: &Manifest| String::from_utf8(manifest.render(path()).unwrap()).unwrap();
    assert!(!text(&manifest()).contains("\"id\""));
    let named = Manifest { id: "run 7, commit 3".into(), ..manifest() };
    assert!(text(&named).contains("run 7, commit 3"));
    assert_eq!(Manifest::parse(text(&named).as_bytes(), path()).unwrap(), named);
}
