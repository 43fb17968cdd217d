//! The documentation speaks of what is there.

use std::path::Path;

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Words in backquotes that look like paths of this repository.
fn paths(text: &str) -> Vec<String> {
    let outside_fences: String = text.split("```").step_by(2).collect();
    let quoted = outside_fences.split('`').skip(1).step_by(2);
    let looks = |word: &&str| {
        let plain = word.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c));
        let ending = [".rs", ".md", ".toml", ".py", ".sh"].iter().any(|ending| word.ends_with(ending));
        plain && !word.starts_with("runs/") && (ending || word.ends_with('/')) && *word != "config.toml"
    };
    quoted.filter(looks).map(str::to_owned).collect()
}

#[test]
fn the_paths_that_the_architecture_names_exist() {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).expect("it is there");
    let found = paths(&text);
    assert!(found.len() >= 30, "it draws the house: {found:?}");
    let missing: Vec<_> = found.iter().filter(|path| !root().join(path).exists()).collect();
    assert!(missing.is_empty(), "{missing:?}");
    // The control: a path that is not there would be noticed.
    assert_eq!(paths("see `trainer/src/nothing.rs` and `x = 1`"), ["trainer/src/nothing.rs"]);
}

/// Every Rust file below a folder, tests left out.
fn modules(folder: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        let name = path.strip_prefix(root()).expect("below the root").display().to_string();
        if path.is_dir() {
            modules(&path, found);
        } else if name.ends_with(".rs") && !name.ends_with("tests.rs") && !name.contains("/tests/") {
            found.push(name);
        }
    }
}

#[test]
fn every_module_of_the_house_is_in_the_architecture() {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).expect("it is there");
    let mut found = Vec::new();
    for room in ["compression", "parallel", "checkpoint", "trainer"] {
        modules(&root().join(room).join("src"), &mut found);
    }
    assert!(found.len() > 40, "{found:?}");
    let missing: Vec<_> = found.iter().filter(|name| !text.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "not drawn: {missing:?}");
}
