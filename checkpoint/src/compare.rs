//! How two checkpoints differ: which tensors, from which element on, how much.
//!
//! Elements are equal when their bits are: a NaN equals itself, and zero does not equal minus zero.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::error::CheckpointError;
use crate::manifest::{Manifest, TensorEntry, difference};
use crate::reader::Checkpoint;

/// Elements of each checkpoint that are in memory at a time: 16 MiB.
const CHUNK: usize = 1 << 22;

/// How two checkpoints, "a" and "b", differ.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Comparison {
    /// Tensors that are equal.
    pub equal: usize,
    /// The others, in name order.
    pub tensors: Vec<TensorDifference>,
    /// What is different in what the trainer stored beside tensors, the step among it, in the order of the paths.
    pub state: Vec<StateDifference>,
    /// Small files that are different, or only in one of the two, in name order.
    pub attachments: Vec<String>,
}

/// A tensor that is not the same in both.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorDifference {
    /// Its name.
    pub name: String,
    /// How it differs.
    pub how: How,
}

/// How a tensor differs.
#[derive(Clone, Debug, PartialEq)]
pub enum How {
    /// Only "a" names it.
    OnlyInA,
    /// Only "b" names it.
    OnlyInB,
    /// It has another shape.
    Shape {
        /// In "a".
        a: Vec<usize>,
        /// In "b".
        b: Vec<usize>,
    },
    /// Some of its elements are in one of the two alone: another machine stored them.
    Held {
        /// Elements that only "a" holds.
        only_in_a: usize,
        /// Elements that only "b" holds.
        only_in_b: usize,
    },
    /// Some of its elements are different.
    Values(Values),
}

/// Which elements are different.
#[derive(Clone, Debug, PartialEq)]
pub struct Values {
    /// The first of them, counted row-major.
    pub first: usize,
    /// The same, by dimension.
    pub index: Vec<usize>,
    /// Its value in "a".
    pub a: f32,
    /// Its value in "b".
    pub b: f32,
    /// How many are different.
    pub count: usize,
    /// Of how many.
    pub of: usize,
    /// The largest distance between two values; infinite where only one of them is finite, or one is not a number.
    pub largest: f64,
    /// The first element with that distance, counted row-major.
    pub largest_at: usize,
}

/// A value of the state that is not the same in both.
#[derive(Clone, Debug, PartialEq)]
pub struct StateDifference {
    /// The way to it, as `model.hidden_size`.
    pub path: String,
    /// What "a" has, if it has it.
    pub a: Option<Value>,
    /// What "b" has, if it has it.
    pub b: Option<Value>,
}

impl Comparison {
    /// Whether nothing is different.
    #[must_use]
    pub const fn is_equal(&self) -> bool {
        self.tensors.is_empty() && self.state.is_empty() && self.attachments.is_empty()
    }
}

/// Compares two checkpoints, however each of them is cut into pieces. Files are hashed before their first byte counts.
///
/// # Errors
/// A file that is not as its manifest says.
pub fn compare(a: &Checkpoint, b: &Checkpoint) -> Result<Comparison, CheckpointError> {
    let mut comparison = Comparison::default();
    let names: BTreeSet<&String> = a.manifest().tensors.keys().chain(b.manifest().tensors.keys()).collect();
    for name in names {
        match tensor(a, b, name)? {
            None => comparison.equal += 1,
            Some(how) => comparison.tensors.push(TensorDifference { name: name.clone(), how }),
        }
    }
    states(&mut comparison.state, "", Some(a.state()), Some(b.state()));
    // The trainer's state has it too.
    if comparison.state.iter().all(|other| other.path != "step") {
        states(&mut comparison.state, "step", Some(&a.step().into()), Some(&b.step().into()));
    }
    let (in_a, in_b) = (a.manifest().attachments(), b.manifest().attachments());
    let all: BTreeSet<&String> = in_a.keys().chain(in_b.keys()).copied().collect();
    let differs = |name: &&&String| in_a.get(**name) != in_b.get(**name);
    comparison.attachments = all.iter().filter(differs).map(|name| (*name).clone()).collect();
    Ok(comparison)
}

fn tensor(a: &Checkpoint, b: &Checkpoint, name: &str) -> Result<Option<How>, CheckpointError> {
    let entry = |manifest: &Manifest| manifest.tensors.get(name).cloned();
    let (in_a, in_b) = match (entry(a.manifest()), entry(b.manifest())) {
        (Some(in_a), Some(in_b)) => (in_a, in_b),
        (Some(_), None) => return Ok(Some(How::OnlyInA)),
        (None, Some(_)) => return Ok(Some(How::OnlyInB)),
        (None, None) => return Ok(None),
    };
    if in_a.shape != in_b.shape {
        return Ok(Some(How::Shape { a: in_a.shape, b: in_b.shape }));
    }
    let elements = in_a.elements();
    let held = in_a.held();
    if held != in_b.held() {
        return Ok(Some(How::Held { only_in_a: lacks(&in_b, &in_a), only_in_b: lacks(&in_a, &in_b) }));
    }
    let mut found: Option<Values> = None;
    let (mut values_a, mut values_b) = (Vec::new(), Vec::new());
    for held in held {
        for start in held.clone().step_by(CHUNK) {
            let range = start..held.end.min(start + CHUNK);
            for (checkpoint, values) in [(a, &mut values_a), (b, &mut values_b)] {
                values.resize(range.len(), 0.0);
                checkpoint.region(name, &in_a.shape, range.clone(), values)?;
            }
            values_in(&mut found, start, &values_a, &values_b);
        }
    }
    Ok(found.map(|values| How::Values(Values { index: index(values.first, &in_a.shape), of: elements, ..values })))
}

/// How many elements of `held` lie in no piece of `entry`.
fn lacks(entry: &TensorEntry, held: &TensorEntry) -> usize {
    difference(&held.held(), &entry.held()).iter().map(ExactSizeIterator::len).sum()
}

/// Adds what is different among these elements, the first of which is `start` of the tensor.
fn values_in(found: &mut Option<Values>, start: usize, a: &[f32], b: &[f32]) {
    for (offset, (&a, &b)) in a.iter().zip(b).enumerate() {
        if a.to_bits() == b.to_bits() {
            continue;
        }
        let at = start + offset;
        let distance = (f64::from(a) - f64::from(b)).abs();
        // Not a number, or an infinity less itself, which cannot be: their bits would be the same.
        let distance = if distance.is_nan() { f64::INFINITY } else { distance };
        let none = || Values { first: at, index: vec![], a, b, count: 0, of: 0, largest: distance, largest_at: at };
        let values = found.get_or_insert_with(none);
        values.count += 1;
        if distance > values.largest {
            (values.largest, values.largest_at) = (distance, at);
        }
    }
}

/// The place of an element by dimension.
fn index(mut element: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (place, &size) in index.iter_mut().zip(shape).rev() {
        (*place, element) = (element % size, element / size);
    }
    index
}

fn states(found: &mut Vec<StateDifference>, path: &str, a: Option<&Value>, b: Option<&Value>) {
    match (a, b) {
        (Some(Value::Object(in_a)), Some(Value::Object(in_b))) => {
            let keys: BTreeSet<&String> = in_a.keys().chain(in_b.keys()).collect();
            for key in keys {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                states(found, &path, in_a.get(key), in_b.get(key));
            }
        }
        _ if a == b => {}
        _ => found.push(StateDifference { path: path.to_owned(), a: a.cloned(), b: b.cloned() }),
    }
}

#[cfg(test)]
mod tests;
