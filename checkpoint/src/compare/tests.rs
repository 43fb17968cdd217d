use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::RealDisk;
use crate::layout;
use crate::writer::{Attachment, Member, Outcome, PieceSpec, Retention, TensorSpec, Writer};

const KEEP_ALL: Retention = Retention::last(0);

struct Saved {
    _root: tempfile::TempDir,
    checkpoint: Checkpoint,
}

fn open(root: tempfile::TempDir, path: &Path) -> Saved {
    Saved { checkpoint: Checkpoint::open(path).unwrap(), _root: root }
}

/// A checkpoint of these tensors in one piece each, of step 5 unless the state says otherwise.
fn saved(tensors: &[(&str, &[usize], Vec<f32>)], state: Value, attachment: &str) -> Saved {
    let root = tempfile::tempdir().unwrap();
    let spec =
        |(name, shape, _): &(&str, &[usize], Vec<f32>)| TensorSpec { name: (*name).into(), shape: shape.to_vec() };
    let specs = tensors.iter().map(spec).collect();
    let mut writer = Writer::new(Arc::new(RealDisk), root.path().into(), specs, KEEP_ALL).unwrap();
    let step = state["step"].as_u64().unwrap_or(5);
    let attachment = Attachment { name: "recipe.toml".into(), bytes: Arc::from(attachment.as_bytes()) };
    writer.offer(step, state, vec![attachment], |snapshot| {
        for (index, (_, _, values)) in tensors.iter().enumerate() {
            snapshot.tensor(index).copy_from_slice(values);
        }
    });
    let outcomes = writer.flush();
    let [Outcome::Committed { path, .. }] = &outcomes[..] else { panic!("{outcomes:?}") };
    let path = path.clone();
    open(root, &path)
}

/// The tensor `w` of shape [3, 4], cut at `cuts`, of which the manifest has the pieces of the ranks `held`.
fn cut(values: &[f32; 12], cuts: &[usize], held: &[usize]) -> Saved {
    let root = tempfile::tempdir().unwrap();
    let bounds: Vec<usize> = [0].iter().chain(cuts).chain(&[12]).copied().collect();
    let mut parts = Vec::new();
    let mut lead = None;
    for (rank, bound) in bounds.windows(2).enumerate() {
        let range = bound[0]..bound[1];
        let piece = PieceSpec::interval("w", &[3, 4], range.clone());
        let member = Member { rank, lead: rank == 0 };

        let mut writer = Writer::member(Arc::new(RealDisk), root.path().into(), vec![piece], member, KEEP_ALL).unwrap();
        writer.offer(5, json!({}), vec![], |snapshot| snapshot.tensor(0).copy_from_slice(&values[range]));
        match &writer.flush()[..] {
            [Outcome::Written { part, .. }] if held.contains(&rank) => parts.push(part.clone()),
            [Outcome::Written { .. }] => {}
            other => panic!("{other:?}"),
        }
        lead = lead.or(Some(writer));
    }
    let mut lead = lead.unwrap();
    lead.commit(5, "id".into(), parts);
    lead.flush();
    let path = root.path().join(layout::committed(5));
    open(root, &path)
}

fn check(a: &Saved, b: &Saved) -> Comparison {
    let comparison = compare(&a.checkpoint, &b.checkpoint).unwrap();
    assert!(
        compare(&a.checkpoint, &a.checkpoint).unwrap().is_equal()
            && compare(&b.checkpoint, &b.checkpoint).unwrap().is_equal()
    );
    comparison
}

#[test]
fn the_first_differing_element_and_the_largest_difference_are_named() {
    let mut values: Vec<f32> = (0..CHUNK + 10).map(|index| index as f32).collect();
    let shape = [2, CHUNK / 2 + 5];
    let a = saved(&[("w", &shape, values.clone()), ("b", &[], vec![1.0])], json!({}), "");
    for (index, by) in [(7, 0.5), (CHUNK + 3, 8.0), (CHUNK + 4, -8.0)] {
        values[index] += by;
    }
    let b = saved(&[("w", &shape, values), ("b", &[], vec![1.0])], json!({}), "");
    let comparison = check(&a, &b);
    assert_eq!((comparison.equal, comparison.is_equal()), (1, false));
    let expected = Values {
        first: 7,
        index: vec![0, 7],
        a: 7.0,
        b: 7.5,
        count: 3,
        of: CHUNK + 10,
        largest: 8.0,
        largest_at: CHUNK + 3,
    };
    assert_eq!(comparison.tensors, [TensorDifference { name: "w".into(), how: How::Values(expected) }]);
}

#[test]
fn bits_count_and_not_numbers() {
    let one = |value: f32| saved(&[("w", &[1], vec![value])], json!({}), "");
    let largest = |a: f32, b: f32| match &check(&one(a), &one(b)).tensors[..] {
        [] => None,
        [TensorDifference { how: How::Values(values), .. }] => Some(values.largest),
        other => panic!("{other:?}"),
    };
    assert_eq!(largest(f32::NAN, f32::NAN), None);
    assert_eq!(largest(0.0, -0.0), Some(0.0));
    assert_eq!(largest(f32::NAN, 1.0), Some(f64::INFINITY));
    assert_eq!(largest(f32::INFINITY, f32::NEG_INFINITY), Some(f64::INFINITY));
    assert_eq!(largest(f32::MAX, -f32::MAX), Some(2.0 * f64::from(f32::MAX)), "it is finite in f64");
}

#[test]
fn tensors_that_one_lacks_and_other_shapes_are_told_in_name_order() {
    let zeros = |count: usize| vec![0.0; count];
    let a = saved(&[("z", &[2], zeros(2)), ("w", &[2, 3], zeros(6)), ("v", &[1], zeros(1))], json!({}), "");
    let b = saved(&[("a", &[1], zeros(1)), ("w", &[3, 2], zeros(6)), ("v", &[1], zeros(1))], json!({}), "");
    let found: Vec<(String, How)> = check(&a, &b).tensors.into_iter().map(|other| (other.name, other.how)).collect();
    let shape = How::Shape { a: vec![2, 3], b: vec![3, 2] };
    let expected = [("a", How::OnlyInB), ("w", shape), ("z", How::OnlyInA)];
    assert_eq!(found, expected.map(|(name, how)| (name.to_owned(), how)));
}

#[test]
fn state_step_and_small_files_are_compared_by_path() {
    let tensors = [("w", &[1][..], vec![1.0])];
    let a = saved(&tensors, json!({ "step": 5, "model": { "heads": 4, "deep": [1] }, "loss": 1.5 }), "a");
    let b = saved(&tensors, json!({ "step": 6, "model": { "heads": 8, "deep": [1] }, "tokens": 7 }), "b");
    let comparison = check(&a, &b);
    let expected = [
        ("loss", Some(json!(1.5)), None),
        ("model.heads", Some(json!(4)), Some(json!(8))),
        ("step", Some(json!(5)), Some(json!(6))),
        ("tokens", None, Some(json!(7))),
    ];
    let found: Vec<_> = comparison.state.iter().map(|other| (&*other.path, other.a.clone(), other.b.clone())).collect();
    assert_eq!(found, expected);
    assert_eq!((comparison.attachments, comparison.tensors), (vec!["recipe.toml".to_owned()], vec![]));
}

#[test]
fn pieces_do_not_matter_but_what_is_held_does() {
    let values = std::array::from_fn(|index| index as f32);
    let mut other = values;
    other[8] = -1.0;
    let whole = cut(&values, &[], &[0]);
    let equal = check(&whole, &cut(&values, &[5, 8], &[0, 1, 2]));
    assert!(equal.is_equal() && equal.equal == 1, "{equal:?}");
    let how = |a: &Saved, b: &Saved| check(a, b).tensors.pop().map(|other| other.how);
    let Some(How::Values(found)) = how(&whole, &cut(&other, &[1, 9], &[0, 1, 2])) else { panic!("they differ") };
    assert_eq!((found.first, found.index, found.count), (8, vec![2, 0], 1));
    let held = how(&cut(&values, &[5, 8], &[0, 1]), &cut(&values, &[3], &[0]));
    assert_eq!(held, Some(How::Held { only_in_a: 5, only_in_b: 0 }));
    // Both lack the same elements: what they hold is compared.
    let part = |values| cut(values, &[5], &[0]);
    assert_eq!(how(&part(&values), &part(&other)), None);
}

#[test]
fn a_damaged_file_is_named_and_not_compared() {
    let a = saved(&[("w", &[2], vec![1.0, 2.0])], json!({}), "");
    let b = saved(&[("w", &[2], vec![1.0, 2.0])], json!({}), "");
    let file = b.checkpoint.path().join("rank-0000.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let message = compare(&a.checkpoint, &b.checkpoint).unwrap_err().to_string();
    assert!(message.contains(&*file.to_string_lossy()) && message.contains("damaged"), "{message}");
}
