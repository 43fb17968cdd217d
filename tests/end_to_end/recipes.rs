//! Every recipe in `recipes/` is a test: it parses, its text is there, and it trains two steps.

use std::path::Path;

use crate::support::command;

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

#[test]
fn every_recipe_trains_two_steps() {
    let mut recipes: Vec<_> = std::fs::read_dir(root().join("recipes")).expect("a folder").flatten().collect();
    recipes.sort_by_key(std::fs::DirEntry::path);
    assert!(!recipes.is_empty());
    let runs = tempfile::tempdir().expect("a folder");
    for recipe in recipes {
        let path = recipe.path().display().to_string();
        let runs_dir = format!("metrics.runs_dir={}", runs.path().display());
        let cache_dir = format!("data.cache_dir={}", runs.path().join("cache").display());
        let sets = ["--set", "train.stop_at_step=2", "--set", &runs_dir, "--set", &cache_dir];
        let output = command(root(), &[&["train", &path], &sets[..]].concat()).output().expect("it starts");
        assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
        let name = recipe.path().file_stem().expect("a name").to_string_lossy().into_owned();
        let metrics = std::fs::read_to_string(runs.path().join(name).join("metrics.jsonl")).expect("two lines");
        assert_eq!(metrics.lines().count(), 2, "{path}");
    }
}

#[test]
fn every_crate_of_a_corpus_is_pinned_by_the_lock_file() {
    let lock = std::fs::read_to_string(root().join("Cargo.lock")).expect("committed");
    for recipe in std::fs::read_dir(root().join("recipes")).expect("a folder").flatten() {
        let text = std::fs::read_to_string(recipe.path()).expect("readable");
        let (raw, recipe) = trainer::recipe::read("", &text, &[]).expect("a good recipe");
        if recipe.data.source != trainer::recipe::resolved::Source::Crates {
            continue;
        }
        assert!(raw.get("data.blake3").is_some());
        for item in recipe.data.train.iter().chain(&recipe.data.held_out) {
            let (name, version) = item.split_once('@').expect("name@version");
            assert!(lock.contains(&format!("name = \"{name}\"\nversion = \"{version}\"")), "{item}");
        }
    }
}
