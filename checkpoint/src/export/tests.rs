use std::fs;

use super::*;
use crate::SimulatedDisk;

const CONFIG: &[u8] = b"{\"model_type\":\"llama\"}";

fn files() -> Vec<(&'static str, Vec<u8>)> {
    vec![("config.json", CONFIG.to_vec()), ("tokenizer.json", Vec::new())]
}

fn tensors() -> Vec<Tensor> {
    [("z.weight", vec![2, 2]), ("a.weight", vec![1]), ("scalar", vec![])]
        .into_iter()
        .map(|(name, shape)| Tensor { name: name.into(), shape })
        .collect()
}

/// Of six values those of each tensor.
fn of(values: &[f32], index: usize) -> &[f32] {
    [&values[..4], &values[4..5], &values[5..6]][index]
}

fn write(dir: &Path, files: &[(&str, Vec<u8>)], values: &[f32], dtype: Dtype) -> Result<u64, CheckpointError> {
    let content = Content { files, tensors: &tensors(), dtype };
    write_folder(dir, content, |index| Ok(Cow::Borrowed(of(values, index))))
}

#[test]
fn an_export_comes_back_in_every_type() {
    let root = tempfile::tempdir().unwrap();
    // All of these are exact in each of the three types.
    let values = [1.0, -2.5, 0.0, 96.0, f32::INFINITY, -0.125];
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        let dir = root.path().join("not/yet/there").join(dtype.to_string());
        let bytes = write(&dir, &files(), &values, dtype).unwrap();
        let on_disk: u64 = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
        assert_eq!(bytes, on_disk);
        let folder = Folder::open(&dir).unwrap();
        assert_eq!(folder.file("config.json").unwrap(), CONFIG);
        assert_eq!(folder.file("tokenizer.json").unwrap(), b"");
        let names = [("a.weight".into(), vec![1]), ("scalar".into(), vec![]), ("z.weight".into(), vec![2, 2])];
        assert_eq!(folder.names(), names);
        for (index, tensor) in tensors().into_iter().enumerate() {
            assert_eq!(folder.tensor(&tensor.name).unwrap(), (tensor.shape, of(&values, index).to_vec()), "{dtype}");
        }
    }
}

#[test]
fn what_is_not_in_the_folder_is_named() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    write(&dir, &files(), &[0.0; 6], Dtype::Bf16).unwrap();
    let folder = Folder::open(&dir).unwrap();
    let message = folder.file("merges.txt").unwrap_err().to_string();
    assert!(message.contains("merges.txt") && message.contains("config.json"), "{message}");
    assert!(folder.file("../secret").unwrap_err().to_string().contains("plain name"));
    assert!(folder.tensor("y").unwrap_err().to_string().contains("no tensor \"y\" among its 3"));
    fs::remove_file(dir.join(MODEL)).unwrap();
    let message = Folder::open(&dir).unwrap_err().to_string();
    assert!(message.contains(MODEL) && message.contains("config.json"), "{message}");
    fs::write(dir.join(MODEL), b"{}").unwrap();
    assert!(Folder::open(&dir).unwrap_err().to_string().contains("not a safetensors file"));
}

#[test]
fn a_folder_that_exists_is_not_replaced() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    fs::create_dir(&dir).unwrap();
    let message = write(&dir, &files(), &[0.0; 6], Dtype::F32).unwrap_err().to_string();
    assert!(message.contains("exists already") && message.contains("another name"), "{message}");
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "nothing was put beside it");
}

#[test]
fn a_left_over_of_ours_is_replaced_and_another_is_named() {
    let root = tempfile::tempdir().unwrap();
    let (dir, partial) = (root.path().join("model"), root.path().join("model.partial"));
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("thesis.tex"), b"years of work").unwrap();
    let message = write(&dir, &files(), &[0.0; 6], Dtype::F32).unwrap_err().to_string();
    assert!(message.contains("model.partial") && message.contains("thesis.tex"), "{message}");
    fs::remove_file(partial.join("thesis.tex")).unwrap();
    fs::write(partial.join(MODEL), b"half").unwrap();
    write(&dir, &files(), &[0.0; 6], Dtype::F32).unwrap();
    assert!(dir.join("config.json").exists() && !partial.exists());
}

#[test]
fn names_that_climb_out_or_collide_are_named() {
    for name in ["../config.json", "/config.json", MODEL, "config.json"] {
        let root = tempfile::tempdir().unwrap();
        let files = [("config.json", Vec::new()), (name, Vec::new())];
        let message = write(&root.path().join("a"), &files, &[0.0; 6], Dtype::F32).unwrap_err().to_string();
        assert!(message.contains(&format!("{name:?}")), "{message}");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }
    assert!(write(Path::new("/"), &[], &[0.0; 6], Dtype::F32).is_err());
}

#[test]
fn a_value_out_of_range_leaves_nothing_behind() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    let message = write(&dir, &files(), &[1e5; 6], Dtype::F16).unwrap_err().to_string();
    assert!(message.contains("a.weight") && message.contains("bf16"), "{message}");
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
}

/// Exports on a disk that loses its power at operation `crash`. Says whether it got to the end, and what is left: `None`
/// for no folder, `Some(whole)` for one.
fn crashed_export(crash: usize) -> (bool, Option<bool>) {
    let disk = SimulatedDisk::new();
    disk.crash_at(crash);
    let dir = Path::new("/model");
    let content = Content { files: &files(), tensors: &tensors(), dtype: Dtype::F32 };
    let give = |index| Ok::<_, CheckpointError>(Cow::Borrowed(of(&[1.0; 6], index)));
    let done = write_folder_on(&disk, dir, content, give).is_ok();
    let left = disk.after_crash();
    let whole = || {
        let root = tempfile::tempdir().unwrap();
        left.dump(root.path()).unwrap();
        let folder = Folder::open(&root.path().join("model"));
        folder.is_ok_and(|folder| {
            folder.file("config.json").is_ok_and(|config| config == CONFIG)
                && folder.file("tokenizer.json").is_ok()
                && folder.tensor("z.weight").is_ok_and(|(_, values)| values == [1.0; 4])
        })
    };
    (done, left.exists(dir).unwrap().then(whole))
}

#[test]
fn a_crash_at_any_operation_leaves_a_whole_folder_or_none() {
    for crash in 0.. {
        let (done, left) = crashed_export(crash);
        assert_ne!(left, Some(false), "operation {crash} left half an export");
        if done {
            assert_eq!(left, Some(true));
            assert!(crash > 10, "an export has more operations than {crash}");
            return;
        }
    }
}

#[test]
fn tensors_are_asked_for_once_in_the_order_of_the_file_and_what_fails_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let (all, mut asked) = (tensors(), Vec::new());
    let content = Content { files: &files(), tensors: &all, dtype: Dtype::Bf16 };
    let values = [1.0; 6];
    let [whole, given] = ["whole", "given"].map(|name| root.path().join(name));
    write(&whole, &files(), &values, Dtype::Bf16).unwrap();
    write_folder(&given, content, |index| {
        asked.push(all[index].name.clone());
        Ok::<_, CheckpointError>(Cow::Owned(of(&values, index).to_vec()))
    })
    .unwrap();
    assert_eq!(asked, ["a.weight", "scalar", "z.weight"]);
    assert!(
        [MODEL, "config.json"]
            .iter()
            .all(|name| fs::read(whole.join(name)).unwrap() == fs::read(given.join(name)).unwrap())
    );
    // Whoever has nothing to give says why; whoever gives too little is told.
    let lost = |index| match index {
        0 => Err(CheckpointError::UnknownType { found: "lost".into() }),
        _ => Ok(Cow::Borrowed(of(&values, index))),
    };
    let failed = root.path().join("failed");
    assert!(matches!(write_folder(&failed, content, lost), Err(CheckpointError::UnknownType { .. })));
    let short = |index| Ok::<_, CheckpointError>(Cow::Borrowed(&of(&values, index)[1..]));
    assert!(matches!(write_folder(&failed, content, short), Err(CheckpointError::Elements { .. })));
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);
}
