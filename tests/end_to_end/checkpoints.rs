//! What people do with checkpoints: `inspect`, `verify`, `checkpoint diff`, and what these say of damaged ones.

use std::fs;
use std::path::Path;

use checkpoint::Manifest;
use checkpoint::reader::Checkpoint;
use serde_json::{Value, json};

use crate::support::Place;

/// A run of two ranks with checkpoints of steps 8 and 16.
fn trained(name: &str, more: &[&str]) -> Place {
    let place = Place::new();
    let set = ["--set", "parallel.data=2", "--set", "compression.codec=int8", "--set", "train.stop_at_step=16"];
    place.train(name, &[&set, more].concat()).ok();
    place
}

fn object(text: &str) -> Value {
    serde_json::from_str(text).expect("one JSON object")
}

/// The CRC-32 of zlib, bit by bit.
fn crc32(bytes: &[u8]) -> String {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xEDB8_8320 & 0u32.wrapping_sub(crc & 1));
        }
    }
    format!("{:08x}", !crc)
}

#[test]
fn inspect_tells_all_that_a_checkpoint_holds() {
    let place = trained("a", &[]);
    let newest = "runs/a/checkpoints/step-00000016";
    let text = place.run(&["inspect", "a"]).ok().stdout;
    for said in [newest, "rank-0001.safetensors", "2 x 1 x 1", "\"codec\":\"int8\"", "recipe_hash", "step-00000008"] {
        assert!(text.contains(said), "{said}: {text}");
    }
    // Many tensors are shown in groups, or one by one where that is asked for.
    let layer = "model.layers.1.mlp.up_proj.weight.m";
    assert!(text.contains("model.layers.{0..1}.mlp.up_proj.weight.m ") && !text.contains(layer));
    assert!(place.run(&["inspect", newest, "--all"]).ok().stdout.contains(layer));

    let checkpoint = Checkpoint::open(&place.path(newest)).expect("whole");
    let said = object(&place.run(&["inspect", newest, "--json", "--checksums"]).ok().stdout);
    assert_eq!((&said["step"], &said["state"]), (&json!(16), checkpoint.state()));
    let manifest = checkpoint.manifest();
    let mesh = &said["state"]["mesh"];
    assert_eq!([&mesh["data"], &mesh["pipeline"], &mesh["tensor"]], [&json!(2), &json!(1), &json!(1)], "{mesh}");
    for (said, (name, file)) in said["files"].as_array().expect("files").iter().zip(&manifest.files) {
        assert_eq!(*said, json!({ "name": name, "bytes": file.bytes, "blake3": file.blake3 }));
    }
    let tensors = said["tensors"].as_array().expect("tensors");
    assert_eq!(tensors.len(), manifest.tensors.len());
    for (said, (name, entry)) in tensors.iter().zip(&manifest.tensors) {
        let mut values = vec![0.0f32; entry.elements()];
        checkpoint.tensor(name, &entry.shape, &mut values).expect("whole");
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!((&said["name"], &said["shape"]), (&json!(name), &json!(entry.shape)));
        assert_eq!((&said["dtype"], &said["elements"]), (&json!("F32"), &json!(values.len())));
        assert_eq!(said["crc32"], json!(crc32(&bytes)), "{name}");
    }
    place
        .run(&["inspect", "nothing"])
        .failed(2, &["nothing: expected a checkpoint, or the folder or the name of a run"]);
    place.run(&["inspect", "."]).failed(2, &["it has neither manifest.json nor checkpoints/"]);
}

#[test]
fn verify_names_what_is_damaged_and_tells_by_its_exit_code() {
    let place = trained("a", &[]);
    let (old, new) = ("runs/a/checkpoints/step-00000008", "runs/a/checkpoints/step-00000016");
    fs::create_dir(place.path("runs/a/checkpoints/step-00000024.partial")).expect("writable");
    let said = place.run(&["verify", "a"]).ok().stdout;
    assert_eq!(said.matches(": whole, 4 files").count(), 2, "{said}");
    assert!(said.contains("step-00000024.partial: no checkpoint"), "{said}");

    let file = place.path(&format!("{old}/rank-0001.safetensors"));
    let mut bytes = fs::read(&file).expect("readable");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&file, &bytes).expect("writable");
    fs::write(place.path(&format!("{old}/recipe.toml")), "").expect("writable");
    let ran = place.run(&["verify", "a"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    for said in
        ["step-00000008: DAMAGED", "rank-0001.safetensors: ", "recipe.toml: ", "parts of", "step-00000016: whole"]
    {
        assert!(ran.stdout.contains(said), "{said}: {}", ran.stdout);
    }
    let ran = place.run(&["verify", old, "--json"]);
    let said = object(&ran.stdout);
    assert_eq!((ran.code, &said["whole"], &said["step"]), (Some(1), &json!(false), &json!(8)));
    let files: Vec<&Value> = said["damage"].as_array().expect("damage").iter().map(|one| &one["file"]).collect();
    assert_eq!(files, ["rank-0001.safetensors", "recipe.toml"]);
    // The other one is as it was.
    assert_eq!(object(&place.run(&["verify", new, "--json"]).ok().stdout)["damage"], json!([]));
    place.run(&["verify", "b"]).failed(2, &["there is no such folder"]);
    place.run(&["verify"]).failed(2, &["CHECKPOINT|RUN"]);
}

/// Changes the manifest of a checkpoint, and gives it the hash that belongs to the changed text.
fn forge(checkpoint: &Path, change: impl Fn(&mut Value)) {
    let file = checkpoint.join("manifest.json");
    let mut body = object(&fs::read_to_string(&file).expect("readable"))["body"].clone();
    change(&mut body);
    let text = |hash: &str| format!("{{\n  \"blake3\": \"{hash}\",\n  \"body\": {body}\n}}\n");
    let hash = blake3::hash(text(&"0".repeat(64)).as_bytes()).to_hex();
    fs::write(file, text(&hash)).expect("writable");
}

#[test]
fn every_kind_of_damage_is_an_error_with_a_name_and_nothing_is_loaded() {
    let place = Place::new();
    place.train("a", &["--set", "train.stop_at_step=16"]).ok();
    let (newest, hash) = (place.path("runs/a/checkpoints/step-00000016"), &place.summary("a")["parameter_hash"]);
    let keep = place.path("kept");
    copy(&newest, &keep);
    let shard = "rank-0000.safetensors";
    let first = |body: &Value| body["tensors"].as_object().expect("tensors").keys().next().expect("a tensor").clone();
    let check = |damage: &dyn Fn(&Path), said: &str| {
        damage(&newest);
        let ran = place.run(&["verify", "runs/a/checkpoints/step-00000016"]);
        assert!(ran.code == Some(1) && ran.stdout.contains("DAMAGED") && ran.stdout.contains(said), "{said}: {ran:?}");
        let resumed = place.train("a", &["--resume"]);
        match said.contains("this build reads version") {
            // It is not damaged: another build reads it.
            true => resumed.failed(1, &[said]),
            false => resumed.failed(2, &["its newest checkpoint is damaged", said]),
        };
        place.run(&["export", "a", "--out", "out"]).failed(1, &[said]);
        assert_eq!(&place.summary("a")["parameter_hash"], hash, "the run is as it was");
        fs::remove_dir_all(&newest).expect("ours");
        copy(&keep, &newest);
    };
    let cut = |at: &Path| {
        let bytes = fs::read(at.join(shard)).expect("readable");
        fs::write(at.join(shard), &bytes[..bytes.len() - 4]).expect("writable");
    };
    check(&cut, "rank-0000.safetensors: expected ");
    check(&|at| fs::remove_file(at.join(shard)).expect("ours"), "rank-0000.safetensors: the manifest names this file");
    check(&|at| fs::remove_file(at.join("manifest.json")).expect("ours"), "could not read the manifest");
    check(&|at| fs::write(at.join("manifest.json"), "{}").expect("writable"), "the manifest is damaged");
    check(&|at| forge(at, |body| body["format"] = json!("torch")), "expected a manifest of format");
    check(&|at| forge(at, |body| body["version"] = json!(3)), "the manifest has version 3, this build reads version 2");
    check(&|at| forge(at, |body| body["version"] = json!(2)), "version 2 does not go with its files");
    check(&|at| forge(at, |body| body["step"] = json!(15)), "named for step 16, its manifest says step 15");
    let climbs = |at: &Path| {
        forge(at, |body| {
            body["files"]["../../run.json"] = body["files"][shard].clone();
        });
    };
    check(&climbs, "the file name \"../../run.json\" cannot be used");
    let overflows = |at: &Path| {
        forge(at, |body| {
            let name = first(body);
            body["tensors"][name]["shape"] = json!([usize::MAX, 3]);
        });
    };
    check(&overflows, "more elements than can be addressed");
    let lies = |at: &Path| {
        forge(at, |body| {
            let name = first(body);
            body["tensors"][name]["pieces"][0]["key"] = json!("nothing");
        });
    };
    check(&lies, "there is no tensor \"nothing\"");
    // A foreign folder is none of ours, and no checkpoint at all.
    fs::create_dir(place.path("foreign")).expect("writable");
    fs::write(place.path("foreign/model.safetensors"), "").expect("writable");
    place.run(&["verify", "foreign"]).failed(2, &["it has neither manifest.json nor checkpoints/"]);
    // The control: what was put back is good.
    place.run(&["verify", "a"]).ok();
    place.train("a", &["--resume", "--set", "train.stop_at_step=17"]).ok();
    assert!(!place.path("out").exists(), "nothing half-made");
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).expect("writable");
    for entry in fs::read_dir(from).expect("a folder").flatten() {
        fs::copy(entry.path(), to.join(entry.file_name())).expect("copied");
    }
}

#[test]
fn diff_names_the_first_difference_and_tells_by_its_exit_code() {
    let place = trained("a", &[]);
    let (old, new) = ("runs/a/checkpoints/step-00000008", "runs/a/checkpoints/step-00000016");
    let set = ["--set", "parallel.data=2", "--set", "compression.codec=int8", "--set", "train.stop_at_step=16"];
    place.train("b", &set).ok();
    // The same run again has the same bits, except for the name of the commit.
    let said = place.run(&["checkpoint", "diff", "a", "b"]).ok().stdout;
    assert!(said.contains("are equal"), "{said}");
    let ran = place.run(&["checkpoint", "diff", old, new]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stdout.contains("first difference: lm_head.weight: ") || ran.stdout.contains("first difference: model.")
    );
    assert!(ran.stdout.contains("state step: 8 and 16"), "{}", ran.stdout);

    let ran = place.run(&["checkpoint", "diff", old, new, "--json"]);
    let said = object(&ran.stdout);
    let [a, b] = [old, new].map(|path| Checkpoint::open(&place.path(path)).expect("whole"));
    let first = &said["tensors"][0];
    let (name, shape) =
        (first["name"].as_str().expect("a name"), &a.manifest().tensors[first["name"].as_str().expect("a name")].shape);
    let read = |checkpoint: &Checkpoint| {
        let mut values = vec![0.0f32; shape.iter().product()];
        checkpoint.tensor(name, shape, &mut values).expect("whole");
        values
    };
    let (in_a, in_b) = (read(&a), read(&b));
    let differ: Vec<usize> = (0..in_a.len()).filter(|&i| in_a[i].to_bits() != in_b[i].to_bits()).collect();
    assert_eq!(
        (first["first"].as_u64(), first["different_elements"].as_u64()),
        (Some(differ[0] as u64), Some(differ.len() as u64))
    );
    assert_eq!(first["a"], json!(in_a[differ[0]].to_string()));
    let largest = differ.iter().map(|&i| (f64::from(in_a[i]) - f64::from(in_b[i])).abs()).fold(0.0, f64::max);
    assert_eq!(first["largest_difference"].as_f64(), Some(largest));
    let names: Vec<&Value> = said["tensors"].as_array().expect("tensors").iter().map(|one| &one["name"]).collect();
    assert!(names.windows(2).all(|pair| pair[0].as_str() < pair[1].as_str()), "in name order");

    // One rank has other losses, and another recipe.
    place.train("one", &["--set", "train.stop_at_step=16"]).ok();
    let said = place.run(&["checkpoint", "diff", "one", "a"]);
    assert!(
        said.code == Some(1)
            && said.stdout.contains("state compression: null and")
            && said.stdout.contains("file recipe.toml"),
        "{said:?}"
    );
    place.run(&["checkpoint", "diff", "a", "nothing"]).failed(2, &["there is no such folder"]);
}

#[test]
fn a_manifest_that_is_forged_whole_is_a_manifest() {
    // The control of `forge`: unchanged, it gives what the reader believes.
    let place = Place::new();
    place.train("a", &["--set", "train.stop_at_step=1"]).ok();
    let at = place.path("runs/a/checkpoints/step-00000001");
    let before = Checkpoint::open(&at).expect("whole").manifest().clone();
    forge(&at, |_| {});
    let text = fs::read(at.join("manifest.json")).expect("readable");
    assert_eq!(Manifest::parse(&text, &at).expect("believed"), before);
}
