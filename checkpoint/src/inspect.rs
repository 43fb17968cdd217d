//! What is in a checkpoint, short enough to be read by a person, and a checksum of each tensor that other programs can
//! compute too.

use std::collections::BTreeMap;

use crate::error::CheckpointError;
use crate::manifest::TensorEntry;
use crate::reader::{Checkpoint, chunks};

/// Tensors of one shape whose names differ in numbers alone, as those of all layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Their name, with the range of a number that differs: `layers.{0..11}.up.weight`, both ends included.
    pub pattern: String,
    /// The shape of each.
    pub shape: Vec<usize>,
    /// How many they are.
    pub tensors: usize,
    /// Elements of all of them.
    pub elements: usize,
    /// Elements of them that no piece here holds.
    pub absent: usize,
    /// Pieces of all of them.
    pub pieces: usize,
}

type Named<'a> = (&'a str, &'a TensorEntry);

/// Puts tensors into groups, in the order in which the first of each comes.
#[must_use]
pub fn groups(tensors: &BTreeMap<String, TensorEntry>) -> Vec<Group> {
    let mut groups: BTreeMap<_, (usize, Vec<Named<'_>>)> = BTreeMap::new();
    for (index, (name, entry)) in tensors.iter().enumerate() {
        let parts: Vec<Option<&str>> = parts(name).map(|part| (!is_number(part)).then_some(part)).collect();
        groups.entry((parts, &entry.shape)).or_insert_with(|| (index, Vec::new())).1.push((name, entry));
    }
    let mut groups: Vec<_> = groups.into_values().collect();
    groups.sort_unstable_by_key(|(first, _)| *first);
    groups.into_iter().map(|(_, members)| group(&members)).collect()
}

fn group(members: &[Named<'_>]) -> Group {
    let names: Vec<Vec<&str>> = members.iter().map(|(name, _)| parts(name).collect()).collect();
    let part = |place: usize| {
        let mut values: Vec<&str> = names.iter().map(|parts| parts[place]).collect();
        // Numbers by their value: they may be longer than any integer of ours.
        values.sort_unstable_by_key(|value| {
            let digits = value.trim_start_matches('0');
            (digits.len(), digits)
        });
        match (values[0], values[values.len() - 1]) {
            (first, last) if first == last => first.to_owned(),
            (first, last) => format!("{{{first}..{last}}}"),
        }
    };
    let of =
        |count: fn(&TensorEntry) -> usize| members.iter().map(|(_, entry)| count(entry)).fold(0, usize::saturating_add);
    Group {
        pattern: (0..names[0].len()).map(part).collect::<Vec<_>>().join("."),
        shape: members[0].1.shape.clone(),
        tensors: members.len(),
        elements: of(TensorEntry::elements),
        absent: of(TensorEntry::absent_count),
        pieces: of(|entry| entry.pieces.len()),
    }
}

fn parts(name: &str) -> std::str::Split<'_, char> {
    name.split('.')
}

fn is_number(part: &str) -> bool {
    !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit())
}

/// The CRC-32 (that of zlib) of a tensor's elements as little-endian f32 in row-major order, however it is cut into
/// pieces. Elements that no piece here holds are left out. Every file that holds some of it is hashed before.
///
/// # Errors
/// No such tensor, or a file that is not as the manifest says.
pub fn crc32(checkpoint: &Checkpoint, tensor: &str) -> Result<u32, CheckpointError> {
    let (mut crc, mut values) = (crc32fast::Hasher::new(), Vec::new());
    let tensors = &checkpoint.manifest().tensors;
    let missing = || {
        let (path, tensor) = (checkpoint.path().to_path_buf(), tensor.to_owned());
        CheckpointError::NoTensor { path, tensor, count: tensors.len() }
    };
    let entry = tensors.get(tensor).ok_or_else(missing)?;
    for chunk in chunks(&checkpoint.held(tensor, entry)?) {
        checkpoint.ranges(tensor, &entry.shape, &chunk, &mut values)?;
        crc.update(bytemuck::cast_slice(&values));
    }
    Ok(crc.finalize())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::single_range_in_vec_init, reason = "lists of ranges, some of one")]

    use std::ops::Range;

    use super::*;
    use crate::manifest::{DTYPE, Piece};
    use compression::Region;

    fn entry(shape: &[usize], ranges: &[Range<usize>]) -> TensorEntry {
        let piece = |range: &Range<usize>| {
            let whole = Region::whole(shape).unwrap();
            let region = Region { flat_start: range.start, flat_end: range.end, ..whole };
            Piece { file: "f".into(), key: "k".into(), region }
        };
        TensorEntry { dtype: DTYPE.into(), shape: shape.to_vec(), pieces: ranges.iter().map(piece).collect() }
    }

    fn of(tensors: &[(&str, &[usize])]) -> Vec<(String, usize)> {
        let entry = |&(name, shape): &(&str, &[usize])| (name.to_owned(), entry(shape, &[]));
        let groups = groups(&tensors.iter().map(entry).collect());
        groups.into_iter().map(|group| (group.pattern, group.tensors)).collect()
    }

    #[test]
    fn numbers_alone_make_a_group() {
        let names: Vec<String> = (0..12).map(|layer| format!("layers.{layer}.up")).collect();
        let mut tensors: Vec<(&str, &[usize])> = names.iter().map(|name| (name.as_str(), &[2, 3][..])).collect();
        tensors.extend([("embed", &[4][..]), ("layers.3.down", &[2, 3]), ("layers.4.down", &[3, 2]), ("norm", &[3])]);
        let expected =
            [("embed", 1), ("layers.{0..11}.up", 12), ("layers.3.down", 1), ("layers.4.down", 1), ("norm", 1)];
        assert_eq!(of(&tensors), expected.map(|(pattern, count)| (pattern.to_owned(), count)));
    }

    #[test]
    fn several_numbers_and_leading_zeros_stay_as_they_are_written() {
        let found = of(&[("l.2.x.sender.0000", &[1]), ("l.10.x.sender.0003", &[1]), ("a..b", &[1]), ("7a", &[1])]);
        let expected = [("7a", 1), ("a..b", 1), ("l.{2..10}.x.sender.{0000..0003}", 2)];
        assert_eq!(found, expected.map(|(pattern, count)| (pattern.to_owned(), count)));
    }

    #[test]
    fn a_group_adds_up() {
        let tensors =
            BTreeMap::from([("a.0".into(), entry(&[6], &[0..2, 4..6])), ("a.1".into(), entry(&[6], &[0..6]))]);
        let expected =
            Group { pattern: "a.{0..1}".into(), shape: vec![6], tensors: 2, elements: 12, absent: 2, pieces: 3 };
        assert_eq!(groups(&tensors), [expected]);
    }
}
