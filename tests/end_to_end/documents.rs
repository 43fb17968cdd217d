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

#[test]
fn every_module_of_the_house_is_in_the_architecture() {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).expect("it is there");
    for room in ["compression", "parallel", "checkpoint", "trainer"] {
        for entry in std::fs::read_dir(root().join(room).join("src")).expect("a room").flatten() {
            let name = format!("{room}/src/{}", entry.file_name().to_string_lossy());
            let drawn = text.contains(&format!("`{name}`")) || text.contains(&format!("`{name}/`"));
            let folder_of_a_module = entry.path().is_dir() && entry.path().with_extension("rs").exists();
            assert!(drawn || folder_of_a_module, "{name} is not drawn");
        }
    }
}
