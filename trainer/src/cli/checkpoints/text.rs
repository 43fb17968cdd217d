//! Checkpoints, what is damaged in them and how they differ, as text for people.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use checkpoint::compare::{Comparison, How, Values};
use checkpoint::inspect::{Group, groups};
use checkpoint::layout;
use checkpoint::manifest::FileEntry;
use checkpoint::reader::{Audit, Checkpoint};
use indicatif::DecimalBytes;
use serde_json::Value;

use crate::error::{Error, Result};

/// More tensors than this are shown in groups.
const ROWS_MAX: usize = 40;

/// So many differing tensors are shown after the first.
const DIFFERENCES_MAX: usize = 10;

/// So many of a list are named before "and ... more".
const NAMED_MAX: usize = 5;

pub(super) fn contents(checkpoint: &Checkpoint, others: &[PathBuf], all: bool, checksums: Option<&[String]>) -> String {
    let manifest = checkpoint.manifest();
    let mut text = format!("{}\n", checkpoint.path().display());
    let bytes: u64 = manifest.files.values().map(|file| file.bytes).fold(0, u64::saturating_add);
    let elements = manifest.tensors.values().map(|entry| entry.elements()).fold(0, usize::saturating_add);
    let plain = manifest.files.values().map(FileEntry::plain_bytes).fold(0, u64::saturating_add);
    let mut facts = vec![
        ("step".to_owned(), manifest.step.to_string()),
        ("format".to_owned(), format!("{}, version {}", manifest.format, manifest.version)),
        ("size".to_owned(), format!("{} ({bytes} bytes) in {} files", DecimalBytes(bytes), manifest.files.len())),
        ("tensors".to_owned(), format!("{} of {elements} elements", manifest.tensors.len())),
    ];
    if plain != bytes {
        let ratio = bytes as f64 / plain as f64;
        facts.push(("packed".to_owned(), format!("{ratio:.3} of {} ({plain} bytes), with zstd", DecimalBytes(plain))));
    }
    if let Some(mesh) = super::mesh_of(checkpoint) {
        facts.push(("mesh".to_owned(), format!("{mesh} (data x pipeline x tensor)")));
    }
    if !manifest.id.is_empty() {
        facts.push(("id".to_owned(), manifest.id.clone()));
    }
    state_facts(&mut facts, &manifest.state);
    text += &table(&facts.iter().map(|(name, value)| vec![format!("  {name}"), value.clone()]).collect::<Vec<_>>());

    text += "\nfiles\n";
    let row = |(name, file): (&String, &FileEntry)| {
        vec![format!("  {name}"), DecimalBytes(file.bytes).to_string(), format!("blake3 {}", file.blake3)]
    };
    text += &table(&manifest.files.iter().map(row).collect::<Vec<_>>());

    text += "\ntensors\n";
    if all || checksums.is_some() || manifest.tensors.len() <= ROWS_MAX {
        text += &table(&tensor_rows(checkpoint, checksums));
    } else {
        text += &table(&groups(&manifest.tensors).iter().map(group_row).collect::<Vec<_>>());
        let _ = writeln!(text, "  (rows are of tensors that differ in a number alone; --all has one for each)");
    }
    if !others.is_empty() {
        text += "\nolder checkpoints of the run\n";
        others.iter().for_each(|path| text += &format!("  {}\n", path.display()));
    }
    text
}

/// What the trainer stored, whatever it is: one row a value, and one for each thing that is put together of values.
fn state_facts(facts: &mut Vec<(String, String)>, state: &Value) {
    let Value::Object(state) = state else { return };
    for (name, value) in state {
        let value = match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        if name != "step" {
            facts.push((name.clone(), value));
        }
    }
}

/// A manifest may say any number.
fn bytes_of(elements: usize) -> u64 {
    (elements as u64).saturating_mul(size_of::<f32>() as u64)
}

fn tensor_rows(checkpoint: &Checkpoint, checksums: Option<&[String]>) -> Vec<Vec<String>> {
    let row = |(index, (name, entry)): (usize, (&String, &checkpoint::manifest::TensorEntry))| {
        let files: Vec<&str> = entry.pieces.iter().map(|piece| piece.file.as_str()).collect();
        let mut row = vec![format!("  {name}"), entry.dtype.clone(), format!("{:?}", entry.shape)];
        row.push(DecimalBytes(bytes_of(entry.elements())).to_string());
        row.push(several(&files));
        if entry.absent_count() > 0 {
            row.push(format!("{} elements are not here", entry.absent_count()));
        }
        if let Some(checksums) = checksums {
            row.insert(4, format!("crc32 {}", checksums[index]));
        }
        row
    };
    checkpoint.manifest().tensors.iter().enumerate().map(row).collect()
}

fn group_row(group: &Group) -> Vec<String> {
    let mut row = vec![format!("  {}", group.pattern), checkpoint::manifest::DTYPE.to_owned()];
    row.push(format!("{:?}", group.shape));
    row.push(if group.tensors > 1 { format!("x {}", group.tensors) } else { String::new() });
    row.push(DecimalBytes(bytes_of(group.elements)).to_string());
    row.push(format!("{} pieces", group.pieces));
    if group.absent > 0 {
        row.push(format!("{} elements are not here", group.absent));
    }
    row
}

pub(super) fn audited(path: &Path, audit: &Audit) -> String {
    let Audit { files, bytes_good, absent, damage, .. } = audit;
    let path = path.display();
    if damage.is_empty() {
        let elsewhere = if *absent > 0 { format!("; {absent} elements are not here") } else { String::new() };
        return format!("{path}: whole, {files} files, {}{elsewhere}\n", DecimalBytes(*bytes_good));
    }
    let mut text = format!("{path}: DAMAGED\n");
    for damage in damage {
        let _ = writeln!(text, "  {}: {}", damage.file, damage.error);
        if !damage.tensors.is_empty() {
            let names: Vec<&str> = damage.tensors.iter().map(String::as_str).collect();
            let _ = writeln!(text, "    it holds parts of {} tensors: {}", names.len(), several(&names));
        }
    }
    text
}

/// Names the folders beside the checkpoints that are none.
pub(super) fn left_over(folder: &Path) -> Result<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let name = entry.map_err(Error::io("list", folder))?.file_name().to_string_lossy().into_owned();
        if layout::is_left_over(&name) {
            names.push(name);
        }
    }
    names.sort_unstable();
    let row = |name: String| format!("{}: no checkpoint: being written or removed\n", folder.join(name).display());
    Ok(names.into_iter().map(row).collect())
}

pub(super) fn compared(a: &Checkpoint, b: &Checkpoint, comparison: &Comparison) -> String {
    let (path_a, path_b) = (a.path().display(), b.path().display());
    if comparison.is_equal() {
        let tensors = comparison.equal;
        return format!("{path_a} and {path_b} are equal: {tensors} tensors, the state, and all other files\n");
    }
    let mut text = format!("a is {path_a}\nb is {path_b}\n");
    if let Some(first) = comparison.tensors.first() {
        let _ = writeln!(text, "first difference: {}: {}", first.name, how(&first.how));
    }
    let (different, equal) = (comparison.tensors.len(), comparison.equal);
    let _ = writeln!(text, "{different} tensors are different, {equal} are equal");
    for other in comparison.tensors.iter().skip(1).take(DIFFERENCES_MAX) {
        let _ = writeln!(text, "  {}: {}", other.name, how(&other.how));
    }
    if different > DIFFERENCES_MAX + 1 {
        let _ = writeln!(text, "  and {} more; --json has all", different - DIFFERENCES_MAX - 1);
    }
    let value = |value: &Option<Value>| value.as_ref().map_or("nothing".to_owned(), Value::to_string);
    for other in &comparison.state {
        let _ = writeln!(text, "state {}: {} and {}", other.path, value(&other.a), value(&other.b));
    }
    for name in &comparison.attachments {
        let _ = writeln!(text, "file {name}: it is different, or in one of them alone");
    }
    text
}

fn how(how: &How) -> String {
    match how {
        How::OnlyInA => "only in a".into(),
        How::OnlyInB => "only in b".into(),
        How::Shape { a, b } => format!("shape {a:?} and {b:?}"),
        How::Held { only_in_a, only_in_b } => {
            format!("{only_in_a} of its elements are only in a, {only_in_b} only in b")
        }
        How::Values(Values { index, a, b, count, of, largest, largest_at, .. }) => format!(
            "{a:e} and {b:e} at {index:?}; {count} of {of} elements are different, by {largest:e} at the most (element \
             {largest_at})"
        ),
    }
}

/// The first few of a list.
fn several(names: &[&str]) -> String {
    let more = names.len().saturating_sub(NAMED_MAX);
    let named = names[..names.len() - more].join(", ");
    if more > 0 { format!("{named} and {more} more") } else { named }
}

/// Rows whose columns stand below each other.
/// Text that a checkpoint brings, without what a terminal would obey.
fn printable(text: &str) -> String {
    let plain = |char: char| if char.is_control() { char.escape_default().to_string() } else { char.to_string() };
    text.chars().map(plain).collect()
}

fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let cell = |row: &Vec<String>, column: usize| row.get(column).map(|text| printable(text)).unwrap_or_default();
    let width = |column| rows.iter().map(|row| cell(row, column).chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = (0..columns).map(|column| format!("{:<1$}", cell(row, column), widths[column]));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}
