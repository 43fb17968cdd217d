use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::writer::{Attachment, Outcome, Retention, TensorSpec, Writer};

/// A folder with the small checkpoint of step 5, and that checkpoint's path.
fn saved() -> (tempfile::TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let specs =
        vec![TensorSpec { name: "w".into(), shape: vec![2, 2] }, TensorSpec { name: "b".into(), shape: vec![] }];
    let mut writer = Writer::new(Arc::new(RealDisk), root.path().into(), specs, Retention::last(0)).unwrap();
    let attachment = Attachment { name: "recipe.toml".into(), bytes: Arc::from(*b"[model]\n") };
    writer.offer(5, json!({ "cursor": 80 }), vec![attachment], |snapshot| {
        snapshot.tensor(0).copy_from_slice(&[1.0, 2.0, 3.0, 4.0]);
        snapshot.tensor(1).fill(5.0);
    });
    let outcomes = writer.flush();
    let [Outcome::Committed { path, .. }] = &outcomes[..] else { panic!("{outcomes:?}") };
    (root, path.clone())
}

fn verify(path: &Path) -> Result<u64, CheckpointError> {
    Checkpoint::open(path)?.verify()
}

#[test]
fn every_flipped_byte_is_detected_and_its_file_named() {
    let (_root, path) = saved();
    verify(&path).unwrap();
    for name in ["manifest.json", "rank-0000.safetensors", "recipe.toml"] {
        let file = path.join(name);
        let mut bytes = fs::read(&file).unwrap();
        for index in 0..bytes.len() {
            bytes[index] ^= 1 << (index % 8);
            fs::write(&file, &bytes).unwrap();
            let message = verify(&path).expect_err("a flipped byte").to_string();
            assert!(message.contains(name), "byte {index} of {name}: {message}");
            bytes[index] ^= 1 << (index % 8);
        }
        fs::write(&file, &bytes).unwrap();
        verify(&path).unwrap();
    }
    // The control: a file that the manifest does not name may hold anything.
    fs::write(path.join("notes.txt"), b"flipped at will").unwrap();
    verify(&path).unwrap();
}

#[test]
fn a_damaged_file_is_refused_at_first_use_without_verify() {
    let (_root, path) = saved();
    let file = path.join("rank-0000.safetensors");
    let good = fs::read(&file).unwrap();
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 0x40;
    fs::write(&file, bad).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let mut out = [0.0; 4];
    let message = checkpoint.tensor("w", &[2, 2], &mut out).unwrap_err().to_string();
    assert!(message.contains("rank-0000.safetensors") && message.contains("damaged"), "{message}");
    assert!(out.iter().all(|value| value.is_nan()), "nothing of it can be used");
    fs::write(&file, good).unwrap();
    checkpoint.tensor("w", &[2, 2], &mut out).unwrap();
    assert_eq!(out, [1.0, 2.0, 3.0, 4.0]);
}

#[test]
fn a_file_that_is_cut_short_or_missing_is_named() {
    for name in ["rank-0000.safetensors", "recipe.toml"] {
        let (_root, path) = saved();
        let bytes = fs::read(path.join(name)).unwrap();
        fs::write(path.join(name), &bytes[..bytes.len() - 1]).unwrap();
        let message = Checkpoint::open(&path).unwrap_err().to_string();
        let expected = format!("expected {} bytes, found {}", bytes.len(), bytes.len() - 1);
        assert!(message.contains(name) && message.contains(&expected), "{message}");
        fs::remove_file(path.join(name)).unwrap();
        let message = Checkpoint::open(&path).unwrap_err().to_string();
        assert!(message.contains(name) && message.contains("missing"), "{message}");
    }
    let (_root, path) = saved();
    fs::remove_file(path.join("manifest.json")).unwrap();
    assert!(Checkpoint::open(&path).unwrap_err().to_string().contains("manifest.json"));
}

#[test]
fn a_tensor_that_is_not_as_asked_for_is_named() {
    let (_root, path) = saved();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let check = |name, shape: &[usize], count, words: &[&str]| {
        let message = checkpoint.tensor(name, shape, &mut vec![0.0; count]).unwrap_err().to_string();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    };
    check("v", &[2, 2], 4, &["no tensor \"v\" among its 2", "step-00000005"]);
    check("w", &[4], 4, &["tensor w", "expected shape [4], found [2, 2]"]);
    check("w", &[2, 2], 3, &["tensor w", "4 elements, the slice has 3"]);
    let message = checkpoint.attachment("tokenizer.json").unwrap_err().to_string();
    assert!(message.contains("tokenizer.json") && message.contains("recipe.toml"), "{message}");
    let mut scalar = [0.0];
    checkpoint.tensor("b", &[], &mut scalar).unwrap();
    assert_eq!(scalar, [5.0]);
    assert_eq!(checkpoint.attachment("recipe.toml").unwrap(), b"[model]\n");
}

#[test]
fn a_manifest_that_lies_about_its_shard_is_refused() {
    let (_root, path) = saved();
    let file = path.join("manifest.json");
    let good = Manifest::parse(&fs::read(&file).unwrap(), &file).unwrap();
    let check = |change: &dyn Fn(&mut Manifest), expected: &str| {
        let mut manifest = good.clone();
        change(&mut manifest);
        fs::write(&file, manifest.render(&file).unwrap()).unwrap();
        let message = verify(&path).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    let piece = |manifest: &mut Manifest, change: &dyn Fn(&mut TensorEntry)| {
        change(manifest.tensors.get_mut("w").unwrap());
    };
    check(&|m| piece(m, &|w| w.pieces[0].key = "x".into()), "no tensor \"x\"");
    check(&|m| piece(m, &|w| w.pieces[0].key = "b".into()), "expected shape [2, 2], found []");
    check(&|m| piece(m, &|w| w.pieces[0].file = "recipe.toml".into()), "not a safetensors file");
    check(&|m| m.step = 6, "named for step 5, its manifest says step 6");
}

#[test]
fn only_committed_folders_are_listed() {
    let (root, path) = saved();
    let at = |name: &str| root.path().join(name);
    for name in ["step-00000007.partial", "step-7", "best", "step-00000005.replaced"] {
        fs::create_dir(at(name)).unwrap();
    }
    fs::write(at("step-00000009"), b"a file").unwrap();
    fs::create_dir(at("step-00000003")).unwrap();
    assert_eq!(list(root.path()).unwrap(), [(3, at("step-00000003")), (5, path)]);
    assert_eq!(list(&at("nowhere")).unwrap(), []);
}

#[test]
fn a_checkpoint_stays_readable_while_retention_removes_it() {
    let (_root, path) = saved();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let mut out = [0.0; 4];
    checkpoint.tensor("w", &[2, 2], &mut out).unwrap();
    fs::remove_dir_all(&path).unwrap();
    out.fill(0.0);
    checkpoint.tensor("w", &[2, 2], &mut out).unwrap();
    assert_eq!(out, [1.0, 2.0, 3.0, 4.0], "what is open stays");
}
