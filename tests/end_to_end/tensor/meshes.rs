//! From one mesh onto another: losses, what was left out of gradients, exports.

use std::path::Path;

use super::{Mesh, RECIPE, distance, train, train_with};
use crate::ranks::same;
use crate::support::Place;

/// One rank; two that hold a model; two pairs, by tokens; and more than there are key and value heads.
const MESHES: [Mesh; 4] = [(1, 1, false), (1, 2, false), (2, 2, true), (1, 4, false)];

/// Tensors large enough to travel compressed, whose slices are not.
const WIDE: &str = r#"
[model]
hidden_size = 128
intermediate_size = 520
num_hidden_layers = 1
num_attention_heads = 4
num_key_value_heads = 2

[tokenizer]
vocab_size = 299

[data]
source = "text"
train = ["TEXT/train.txt"]
cache_dir = "TEXT/cache"

[train]
steps = 12
seq_len = 16
micro_batch_size = 2

[schedule]
learning_rate = 3e-3

[compression]
codec = "int8"

[checkpoint]
every = 0

[export]
at_end = false
"#;

pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("writable");
    for entry in std::fs::read_dir(from).expect("a folder").flatten() {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).expect("readable");
        }
    }
}

#[test]
fn a_checkpoint_of_any_mesh_goes_on_on_any_other_with_the_losses_of_one_rank() {
    let place = Place::with(RECIPE);
    train(&place, "one", (1, 1, false), &[]);
    for (number, from) in MESHES.into_iter().enumerate() {
        let first = format!("from-{number}");
        train(&place, &first, from, &["--set", "train.stop_at_step=9"]);
        for (number, to) in MESHES.into_iter().enumerate() {
            let second = format!("{first}-to-{number}");
            copy(&place.path(&format!("runs/{first}")), &place.path(&format!("runs/{second}")));
            train(&place, &second, to, &["--resume", "--set", "train.stop_at_step=20"]);
            let loss = distance(&place, &second, "one");
            assert!(loss <= 1e-6, "{from:?} to {to:?}: {loss:e}");
            let recut = place.events(&second).iter().any(|event| event["event"] == "recut");
            assert_eq!(recut, (from.0, from.1) != (to.0, to.1), "{from:?} to {to:?}");
        }
    }
}

#[test]
fn every_mesh_exports_the_same_folder() {
    let place = Place::with(RECIPE);
    train(&place, "a", (1, 2, false), &[]);
    let export = |folder: &str| {
        place
            .names(folder)
            .into_iter()
            .map(|name| {
                let bytes = std::fs::read(place.path(&format!("{folder}/{name}"))).expect("readable");
                (name, bytes)
            })
            .collect::<Vec<_>>()
    };
    let expected = export("runs/a/export");
    assert!(expected.iter().any(|(name, _)| name == "model.safetensors"));
    place.run(&["export", "a", "--out", "alone"]).ok();
    assert_eq!(export("alone"), expected, "one process, from the checkpoint");
    let hash = place.summary("a")["parameter_hash"].clone();
    for mesh in MESHES {
        // Everything was trained: what is left is to put the parts together.
        train(&place, "a", mesh, &["--resume"]);
        assert_eq!(export("runs/a/export"), expected, "{mesh:?}");
        assert_eq!(place.summary("a")["parameter_hash"], hash, "{mesh:?}");
    }
}

#[test]
fn what_compressed_slices_left_out_is_kept_and_goes_to_any_mesh() {
    let place = Place::with(WIDE);
    let (four, pair) = ((2, 2, false), (1, 2, false));
    let stop = ["--set", "train.stop_at_step=6"];
    let on = ["--resume", "--set", "train.stop_at_step=12"];
    train(&place, "whole", four, &[]);
    for name in ["a", "b", "c"] {
        train(&place, name, four, &stop);
    }
    // On the same mesh it is the run that nobody stopped.
    train(&place, "a", four, &on);
    same(&place, ["whole", "a"]);
    assert!(place.events("a").iter().all(|event| event["event"] != "recut"));

    // On another one all of it is in the next gradient that counts; the control forgets it.
    let said = train(&place, "b", pair, &on);
    assert!(said.contains("the checkpoint is of 4 ranks, 2 x 1 x 2 (data x pipeline x tensor)"), "{said}");
    let event = place.events("b").into_iter().find(|event| event["event"] == "recut").expect("another mesh");
    assert_eq!((&event["residuals"], &event["before"]["tensor"]), (&"folded".into(), &2.into()));
    train_with(&place, "forget-owner", "c", pair, &on);
    let (b, c) = (place.curve("b"), place.curve("c"));
    assert_eq!((&b[..6], &b[6][1]), (&c[..6], &c[6][1]), "the first loss is of the same parameters");
    assert_ne!(b[6][3], c[6][3], "its gradient is another one");
    assert_ne!(place.summary("b")["parameter_hash"], place.summary("c")["parameter_hash"]);

    // Whoever goes on alone owes the same: the first steps after it are the pair's, but for the order of additions.
    train(&place, "d", four, &stop);
    train(&place, "d", (1, 1, false), &on);
    let (alone, forgot) = (distance(&place, "d", "b"), distance(&place, "c", "b"));
    assert!(alone <= 1e-5 && forgot > 10.0 * alone, "{alone:e} {forgot:e}");
}

#[test]
fn a_folded_residual_of_slices_goes_on_too() {
    let place = Place::with(WIDE);
    let folded = ["--set", "checkpoint.residuals=folded"];
    let stop = [&folded[..], &["--set", "train.stop_at_step=6"]].concat();
    let on = [&folded[..], &["--resume", "--set", "train.stop_at_step=12"]].concat();
    for name in ["a", "b"] {
        train(&place, name, (2, 2, true), &stop);
    }
    train(&place, "a", (2, 2, true), &on);
    train(&place, "b", (1, 1, false), &on);
    // One goes on in int8 and one without a codec, so that they are near and not equal.
    assert!(distance(&place, "a", "b") < 1e-2);
    train(&place, "c", (2, 2, true), &stop);
    train_with(&place, "forget-owner", "c", (1, 1, false), &on);
    assert_ne!(place.summary("b")["parameter_hash"], place.summary("c")["parameter_hash"]);
}
