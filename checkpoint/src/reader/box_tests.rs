//! Tensors cut into any boxes and intervals by one mesh, and read in others by another.

use std::sync::Arc;

use compression::Region;
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};

use super::*;
use crate::manifest::Piece;
use crate::writer::{Member, Outcome, Part, PieceSpec, Retention, Writer};

/// Writes the tensor `w`, whose elements are their own places, in one piece a rank, and returns what the commit says.
pub(super) fn write(root: &Path, shape: &[usize], pieces: &[Region], packs: bool) -> Result<PathBuf, CheckpointError> {
    let mut parts: Vec<Part> = Vec::new();
    let mut lead = None;
    for (rank, region) in pieces.iter().enumerate() {
        let spec = PieceSpec { tensor: "w".into(), shape: shape.to_vec(), region: region.clone() };
        let (member, retention) = (Member { rank, lead: rank == 0 }, Retention::last(0));
        let mut writer = Writer::member(Arc::new(RealDisk), root.into(), vec![spec], member, retention)?;
        writer.pack(packs);
        writer.offer(5, json!({}), Vec::new(), |snapshot| {
            let places = region.runs(shape).flatten().map(|place| place as f32);
            snapshot.tensor(0).iter_mut().zip(places).for_each(|(to, place)| *to = place);
        });
        match writer.flush().remove(0) {
            Outcome::Written { part, .. } => parts.push(part),
            other => panic!("{other:?}"),
        }
        lead = lead.or(Some(writer));
    }
    let mut lead = lead.expect("one rank at least");
    lead.commit(5, "commit".into(), parts);
    match lead.flush().remove(0) {
        Outcome::Committed { path, .. } => Ok(path),
        Outcome::Failed { error, .. } => Err(error),
        other => panic!("{other:?}"),
    }
}

fn read(checkpoint: &Checkpoint, shape: &[usize], regions: &[Region]) -> Result<Vec<Vec<f32>>, CheckpointError> {
    let mut found: Vec<Vec<f32>> = regions.iter().map(|region| vec![-1.0; region.len()]).collect();
    let mut wants: Vec<Want<'_>> = (regions.iter().zip(&mut found))
        .map(|(region, out)| Want { tensor: "w", shape, region: region.clone(), out })
        .collect();
    let loaded = checkpoint.load(&mut wants);
    if loaded.is_err() {
        assert!(found.iter().flatten().all(|value| value.is_nan()), "nothing of it can be used");
    }
    loaded.map(|_| found)
}

fn expected(shape: &[usize], region: &Region) -> Vec<f32> {
    region.runs(shape).flatten().map(|place| place as f32).collect()
}

/// Cuts a region in two, some times: along a dimension where it is a box, or its interval.
fn cut(whole: Region, cuts: &[(Index, Index, bool)]) -> Vec<Region> {
    let mut pieces = vec![whole];
    for (which, at, flat) in cuts {
        let piece = pieces.swap_remove(which.index(pieces.len()));
        let sizes = piece.sizes();
        if *flat || !piece.is_box() || sizes.is_empty() {
            let middle = at.index(piece.len() + 1);
            pieces.extend([piece.part(0..middle), piece.part(middle..piece.len())]);
        } else {
            let dim = at.index(sizes.len());
            let middle = piece.start[dim] + which.index(sizes[dim] + 1);
            let with = |change: fn(&mut Region, usize, usize)| {
                let mut part = piece.clone();
                change(&mut part, dim, middle);
                Region::of_box(part.start, part.end).unwrap()
            };
            pieces.push(with(|part, dim, middle| part.end[dim] = middle));
            pieces.push(with(|part, dim, middle| part.start[dim] = middle));
        }
    }
    pieces
}

fn cuts() -> impl Strategy<Value = Vec<(Index, Index, bool)>> {
    prop::collection::vec(any::<(Index, Index, bool)>(), 0..9)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn any_mesh_reads_what_any_mesh_wrote(
        shape in prop::collection::vec(1usize..9, 0..5),
        writers in cuts(),
        readers in cuts(),
        packs in any::<bool>(),
    ) {
        let whole = Region::whole(&shape).unwrap();
        let root = tempfile::tempdir().unwrap();
        let pieces = cut(whole.clone(), &writers);
        let path = write(root.path(), &shape, &pieces, packs).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        checkpoint.verify().unwrap();
        let wanted = cut(whole.clone(), &readers);
        let found = read(&checkpoint, &shape, &wanted).unwrap();
        for (region, found) in wanted.iter().zip(&found) {
            prop_assert_eq!(found, &expected(&shape, region));
        }
        prop_assert_eq!(&read(&checkpoint, &shape, &[whole]).unwrap()[0], &expected(&shape, &Region::whole(&shape).unwrap()));
        let entry = &checkpoint.manifest().tensors["w"];
        prop_assert_eq!((entry.absent_count(), entry.held().len()), (0, 1));
        // The control: without one of the pieces, whoever wants some of it is told, and nobody else.
        if let Some(gone) = pieces.iter().position(|piece| !piece.is_empty()) {
            let file = path.join(layout::MANIFEST);
            let mut manifest = checkpoint.manifest().clone();
            let tensor = manifest.tensors.get_mut("w").unwrap();
            let lost = pieces[gone].clone();
            tensor.pieces.retain(|piece| piece.region != lost);
            fs::write(&file, manifest.render(&file).unwrap()).unwrap();
            let checkpoint = Checkpoint::open(&path).unwrap();
            for region in wanted {
                let found = read(&checkpoint, &shape, std::slice::from_ref(&region));
                match region.overlap(&lost) {
                    0 => prop_assert_eq!(&found.unwrap()[0], &expected(&shape, &region)),
                    _ => prop_assert!(matches!(found, Err(CheckpointError::Absent { .. })), "{:?}", found),
                }
            }
            prop_assert_eq!(checkpoint.manifest().tensors["w"].absent_count(), lost.len());
        }
    }
}

fn of_box(start: [usize; 2], end: [usize; 2]) -> Region {
    Region::of_box(start.to_vec(), end.to_vec()).unwrap()
}

#[test]
fn a_box_lies_in_its_file_in_its_own_shape_and_a_part_of_it_in_one_dimension() {
    let root = tempfile::tempdir().unwrap();
    let (left, right) = (of_box([0, 0], [3, 1]), of_box([0, 1], [3, 4]));
    let pieces = [left, right.part(0..5), right.part(5..9)];
    let path = write(root.path(), &[3, 4], &pieces, false).unwrap();
    let shapes = [vec![3, 1], vec![5], vec![4]];
    for (rank, shape) in shapes.into_iter().enumerate() {
        let bytes = fs::read(path.join(layout::shard(rank))).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor("w").unwrap().shape(), shape);
    }
    // Columns 1 and 2: elements of two files, and of one.
    let checkpoint = Checkpoint::open(&path).unwrap();
    let found = read(&checkpoint, &[3, 4], &[of_box([0, 1], [3, 3]), of_box([2, 2], [3, 4])]).unwrap();
    assert_eq!(found, [vec![1.0, 2.0, 5.0, 6.0, 9.0, 10.0], vec![10.0, 11.0]]);
    // A file that holds nothing of it is not read.
    fs::write(path.join(layout::shard(0)), vec![0; fs::read(path.join(layout::shard(0))).unwrap().len()]).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    read(&checkpoint, &[3, 4], &[of_box([0, 1], [3, 3])]).unwrap();
    let message = read(&checkpoint, &[3, 4], &[of_box([0, 0], [1, 2])]).unwrap_err().to_string();
    assert!(message.contains("rank-0000") && message.contains("damaged"), "{message}");
}

#[test]
fn pieces_that_share_an_element_are_refused_by_name_when_they_are_written() {
    let check = |pieces: &[Region], words: &[&str]| {
        let root = tempfile::tempdir().unwrap();
        let message = write(root.path(), &[4, 4], pieces, false).unwrap_err().to_string();
        assert!(["tensor w"].iter().chain(words).all(|word| message.contains(word)), "{message}");
        assert!(list(root.path()).unwrap().is_empty(), "nothing was committed");
    };
    let (rows, columns) = (of_box([0, 0], [2, 4]), of_box([0, 2], [4, 4]));
    check(
        &[rows.clone(), columns.clone()],
        &["overlap", "elements 0..8 of the box [0, 0] to [2, 4] in rank-0000", "rank-0001"],
    );
    check(&[columns.clone(), columns.clone()], &["overlap", "box [0, 2] to [4, 4]"]);
    check(&[columns.part(0..3), Region::interval(&[4, 4], 6..7)], &["overlap", "elements 6..7 in rank-0001"]);
    // The control: what touches, and shares nothing.
    let root = tempfile::tempdir().unwrap();
    write(root.path(), &[4, 4], &[columns.part(0..2), Region::interval(&[4, 4], 6..7), rows.part(0..2)], false)
        .unwrap();
}

/// Regions that nobody writes, in a manifest whose hash is right: each is refused by name, and quickly.
#[test]
fn hostile_regions_are_typed_errors() {
    let root = tempfile::tempdir().unwrap();
    let path = write(root.path(), &[4, 4], &[of_box([0, 0], [4, 2]), of_box([0, 2], [4, 4])], false).unwrap();
    let text = path.join(layout::MANIFEST);
    let good: Value = serde_json::from_slice(&fs::read(&text).unwrap()).unwrap();
    let check = |change: &dyn Fn(&mut Value), words: &[&str]| {
        let mut body = good["body"].clone();
        change(&mut body["tensors"]["w"]);
        fs::write(&text, crate::manifest::sealed(&body)).unwrap();
        let message = Checkpoint::open(&path).unwrap_err().to_string();
        assert!(["tensor w"].iter().chain(words).all(|word| message.contains(word)), "{message}");
    };
    let region = |start: Value, end: Value, flat: [u64; 2]| {
        move |w: &mut Value| {
            let region = json!({ "start": start, "end": end, "flat_start": flat[0], "flat_end": flat[1] });
            w["pieces"][1]["region"] = region;
        }
    };
    let max = u64::MAX;
    check(&region(json!([0, 2]), json!([4, 5]), [0, 8]), &["dimension 1", "2..5", "has 4 there"]);
    check(&region(json!([0, 3]), json!([4, 2]), [0, 8]), &["dimension 1", "3..2"]);
    check(&region(json!([max, 2]), json!([max, 4]), [0, 8]), &["dimension 0"]);
    check(&region(json!([0, 2]), json!([4, 4]), [0, 9]), &["elements 0..9 of a box of 8"]);
    check(&region(json!([0, 2]), json!([4, 4]), [5, 4]), &["elements 5..4 of a box of 8"]);
    check(&region(json!([0, 2]), json!([4, 4]), [max - 1, max]), &["of a box of 8"]);
    check(&region(json!([0]), json!([4, 4]), [0, 4]), &["1 and 2 dimensions", "the tensor has 2"]);
    check(&region(json!([0, 1]), json!([4, 4]), [0, 12]), &["overlap"]);
    check(&|w| w["pieces"].as_array_mut().unwrap().swap(0, 1), &["do not ascend"]);
    check(&|w| w["shape"] = json!([max, 4]), &["more elements than can be addressed"]);
    check(&|w| w["shape"] = json!([4, 4, 1]), &["the tensor has 3"]);
    let many = |w: &mut Value| {
        w["shape"] = json!([4, 1_000_000]);
        let piece = |column: usize| {
            let region = json!({ "start": [0, column], "end": [4, column + 1], "flat_start": 0, "flat_end": 4 });
            json!({ "file": "rank-0000.safetensors", "key": column.to_string(), "region": region })
        };
        w["pieces"] = (0..5000).map(piece).collect();
    };
    check(&many, &["5000 pieces", "4096 of 8 at the most"]);
    let deep = |w: &mut Value| {
        w["shape"] = json!(vec![2; 9]);
        w["pieces"][0]["region"] = json!({ "start": vec![0; 9], "end": vec![1; 9], "flat_start": 0, "flat_end": 1 });
        w["pieces"][1]["region"] = json!({ "start": vec![1; 9], "end": vec![2; 9], "flat_start": 0, "flat_end": 1 });
    };
    check(&deep, &["2 pieces of 9 dimensions"]);
    // The control: a tensor without elements may have a dimension that cannot be multiplied.
    let mut body = good["body"].clone();
    body["tensors"]["w"]["pieces"].as_array_mut().unwrap().pop();
    body["tensors"]["none"] = json!({ "dtype": "F32", "shape": [0, max, 4], "pieces": [] });
    fs::write(&text, crate::manifest::sealed(&body)).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    checkpoint.tensor("none", &[0, usize::MAX, 4], &mut []).unwrap();
    let held = of_box([0, 0], [4, 2]);
    assert_eq!(read(&checkpoint, &[4, 4], std::slice::from_ref(&held)).unwrap()[0], expected(&[4, 4], &held));
    let absent = read(&checkpoint, &[4, 4], &[of_box([1, 1], [3, 3])]).unwrap_err().to_string();
    assert!(absent.contains("elements 6..7, 10..11 of its 16 are in no piece"), "{absent}");
}

#[test]
fn a_want_that_cannot_be_is_named() {
    let root = tempfile::tempdir().unwrap();
    let path = write(root.path(), &[4, 4], &[of_box([0, 0], [4, 4])], false).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let check = |region: Region, places: usize, words: &str| {
        let mut out = vec![0.0; places];
        let mut wants = [Want { tensor: "w", shape: &[4, 4], region, out: &mut out }];
        let message = checkpoint.load(&mut wants).unwrap_err().to_string();
        assert!(message.contains("tensor w") && message.contains(words), "{message}");
    };
    check(of_box([3, 0], [5, 1]), 2, "the region takes 3..5, the tensor has 4 there");
    check(of_box([1, 1], [3, 3]), 5, "elements 0..4 of the box [1, 1] to [3, 3] are 4, the slice has 5");
    check(Region { flat_end: 5, ..of_box([1, 1], [3, 3]) }, 5, "elements 0..5 of a box of 4");
    check(Region { start: vec![], end: vec![], flat_start: 0, flat_end: 1 }, 1, "0 and 0 dimensions");
}

/// A tensor in thin columns: more runs than are looked at together.
#[test]
fn thin_columns_are_put_together_in_several_goes() {
    let shape = [50_000, 6];
    let root = tempfile::tempdir().unwrap();
    let columns =
        |cuts: &[usize]| -> Vec<Region> { cuts.windows(2).map(|cut| of_box([0, cut[0]], [50_000, cut[1]])).collect() };
    let path = write(root.path(), &shape, &columns(&[0, 1, 4, 6]), false).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let wanted = columns(&[0, 2, 3, 6]);
    let found = read(&checkpoint, &shape, &wanted).unwrap();
    for (region, found) in wanted.iter().zip(found) {
        assert!(found == expected(&shape, region));
    }
    let piece: &Piece = &checkpoint.manifest().tensors["w"].pieces[1];
    assert_eq!(piece.stored_shape(), [50_000, 3]);
}
