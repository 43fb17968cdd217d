//! Which documents there are.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::recipe::resolved::{Data, Source};

/// One document: tokens of different documents are separated by the end-of-text token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Where it comes from, the same on every machine for sources of crates.
    pub name: String,
    /// Its text.
    pub text: String,
}

/// All documents of a run.
#[derive(Debug)]
pub struct Corpus {
    /// What to train on.
    pub train: Vec<Document>,
    /// What to hold out.
    pub held_out: Vec<Document>,
    /// BLAKE3 over both parts: for each document the length and the bytes of its text. Names are left out: a corpus
    /// that moves is the same corpus.
    pub hash: String,
}

impl Corpus {
    /// Reads everything and compares it with the recipe's hash, if it has one.
    ///
    /// # Errors
    /// A missing crate or file, a text that is not UTF-8, a line that is not the JSON it should be, another hash.
    pub fn read(data: &Data, registry: &Path) -> Result<Self> {
        let read = |key: &'static str, items: &[String]| match &data.source {
            Source::Crates => read_crates(items, registry),
            Source::Text => all_there(key, items).and_then(|()| read_texts(items)),
            Source::Jsonl { field } => all_there(key, items).and_then(|()| read_jsonl(items, field)),
        };
        let (train, held_out) = (read("data.train", &data.train)?, read("eval.files", &data.held_out)?);
        let mut hasher = blake3::Hasher::new();
        hasher.update(hash(&train).as_bytes()).update(hash(&held_out).as_bytes());
        let corpus = Self { train, held_out, hash: hasher.finalize().to_hex().to_string() };
        if corpus.train.iter().all(|document| document.text.is_empty()) {
            return Err(Error::Text {
                path: data.train.join(", "),
                what: "expected text to train on, found none".into(),
            });
        }
        match &data.blake3 {
            Some(expected) if !expected.eq_ignore_ascii_case(&corpus.hash) => {
                Err(Error::CorpusChanged { expected: expected.clone(), found: corpus.hash })
            }
            _ => Ok(corpus),
        }
    }

    /// BLAKE3 of the training part.
    #[must_use]
    pub fn train_hash(&self) -> String {
        hash(&self.train).to_hex().to_string()
    }
}

/// BLAKE3 of a list of documents.
pub(super) fn hash(documents: &[Document]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for document in documents {
        hasher.update(&(document.text.len() as u64).to_le_bytes()).update(document.text.as_bytes());
    }
    hasher.finalize()
}

/// Rust sources of `name@version` in cargo's registry, in the order of the list, files sorted by path.
fn read_crates(items: &[String], registry: &Path) -> Result<Vec<Document>> {
    // Every registry index (crates.io, a mirror) has its own folder below `registry/src`.
    let indices: Vec<PathBuf> = std::fs::read_dir(registry)
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    let mut documents = Vec::new();
    let mut missing = Vec::new();
    for item in items {
        let folder = item.replacen('@', "-", 1);
        let Some(root) = indices.iter().map(|index| index.join(&folder)).find(|root| root.is_dir()) else {
            missing.push(item.as_str());
            continue;
        };
        let mut files = Vec::new();
        rust_files(&root, &mut files)?;
        files.sort();
        for file in files {
            let name = file.strip_prefix(&root).unwrap_or(&file).to_string_lossy().replace('\\', "/");
            documents.push(Document { name: format!("{item}/{name}"), text: read_text(&file)? });
        }
    }
    if missing.is_empty() {
        Ok(documents)
    } else {
        Err(Error::MissingCrate { missing: missing.join(", "), registry: registry.to_owned() })
    }
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let path = entry.map_err(Error::io("list", folder))?.path();
        if path.is_dir() {
            rust_files(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

fn all_there(key: &'static str, items: &[String]) -> Result<()> {
    let missing: Vec<&str> = items.iter().map(String::as_str).filter(|item| !Path::new(item).exists()).collect();
    if missing.is_empty() { Ok(()) } else { Err(Error::MissingText { key, missing: missing.join(", ") }) }
}

fn read_texts(items: &[String]) -> Result<Vec<Document>> {
    items.iter().map(|item| Ok(Document { name: item.clone(), text: read_text(Path::new(item))? })).collect()
}

fn read_jsonl(items: &[String], field: &str) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    for item in items {
        for (number, line) in read_text(Path::new(item))?.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            let name = format!("{item}:{}", number + 1);
            let value: serde_json::Value = serde_json::from_str(line).map_err(|error| Error::Text {
                path: name.clone(),
                what: format!("expected a line of JSON: {error}"),
            })?;
            let Some(text) = value.get(field).and_then(serde_json::Value::as_str) else {
                let what = format!("expected an object with a string \"{field}\" (data.jsonl_field)");
                return Err(Error::Text { path: name, what });
            };
            documents.push(Document { name, text: text.to_owned() });
        }
    }
    Ok(documents)
}

fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    String::from_utf8(bytes).map_err(|error| Error::Text {
        path: path.display().to_string(),
        what: format!("expected UTF-8, found another byte at offset {}", error.utf8_error().valid_up_to()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(source: Source, train: &[&str]) -> Data {
        Data {
            source,
            train: train.iter().map(|&x| x.to_owned()).collect(),
            held_out: Vec::new(),
            blake3: None,
            cache_dir: PathBuf::new(),
        }
    }

    #[test]
    fn crates_are_found_in_any_index_and_all_missing_ones_are_named() {
        let registry = tempfile::tempdir().expect("a folder");
        let root = registry.path().join("index-1/a-1.0.0");
        std::fs::create_dir_all(root.join("src")).expect("a folder");
        std::fs::write(root.join("src/b.rs"), "two").expect("a file");
        std::fs::write(root.join("build.rs"), "one").expect("a file");
        std::fs::write(root.join("README.md"), "no").expect("a file");
        let corpus = Corpus::read(&data(Source::Crates, &["a@1.0.0"]), registry.path()).expect("it is there");
        let names: Vec<_> = corpus.train.iter().map(|d| (d.name.as_str(), d.text.as_str())).collect();
        assert_eq!(names, [("a@1.0.0/build.rs", "one"), ("a@1.0.0/src/b.rs", "two")]);

        let error = Corpus::read(&data(Source::Crates, &["b@1.0.0", "a@1.0.0", "c@2.0.0"]), registry.path());
        let message = error.expect_err("two are missing").to_string();
        assert!(message.contains("b@1.0.0, c@2.0.0") && message.contains("cargo fetch"), "{message}");
    }

    #[test]
    fn another_text_than_the_one_pinned_is_refused_with_both_hashes() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "text").expect("a file");
        let path = file.path().to_str().expect("UTF-8");
        let found = Corpus::read(&data(Source::Text, &[path]), Path::new("")).expect("no hash").hash;
        let pinned = Data { blake3: Some(found.clone()), ..data(Source::Text, &[path]) };
        assert!(Corpus::read(&pinned, Path::new("")).is_ok());
        std::fs::write(file.path(), "test").expect("a file");
        let message = Corpus::read(&pinned, Path::new("")).expect_err("one byte differs").to_string();
        assert!(message.contains(&found), "{message}");
    }

    #[test]
    fn a_line_without_the_field_and_a_byte_that_is_no_text_are_placed() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let path = file.path().to_str().expect("UTF-8");
        let jsonl = || Source::Jsonl { field: "text".into() };
        std::fs::write(file.path(), "{\"text\": \"a\"}\n\n{\"txt\": \"b\"}\n").expect("a file");
        let message = Corpus::read(&data(jsonl(), &[path]), Path::new("")).expect_err("line 3").to_string();
        assert!(message.contains(":3: expected an object with a string \"text\""), "{message}");
        std::fs::write(file.path(), b"ab\xff").expect("a file");
        let message = Corpus::read(&data(Source::Text, &[path]), Path::new("")).expect_err("byte 2").to_string();
        assert!(message.contains("offset 2"), "{message}");
    }
}
