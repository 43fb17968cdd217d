//! The names inside the folder of checkpoints, and which of them count.
//!
//! `step-00000100` is a checkpoint. `step-00000100.replaced` is the one that was there before, set aside while a new one
//! of the same step takes its name; it counts while there is no other of that step, so that there is no instant without
//! one. A name that ends in `.partial` is being written or being removed and never counts. `step-00000100.damaged` was found
//! damaged by somebody who went on from an earlier one; nothing of ours counts it, or takes it away.

use std::collections::BTreeMap;
use std::path::{Component, Path};

/// The file that makes a folder a checkpoint.
pub const MANIFEST: &str = "manifest.json";

/// The most bytes that are read at once of a file beside the tensors, a manifest for one.
pub const SMALL_BYTES_MAX: u64 = 256 << 20;

const REPLACED: &str = ".replaced";
const DAMAGED: &str = ".damaged";
const RANK: &str = ".rank-";
const MACHINE: &str = "machine-";
const PARTIAL: &str = ".partial";

/// The folder of a step's checkpoint.
#[must_use]
pub fn committed(step: u64) -> String {
    format!("step-{step:08}")
}

/// Where a step's earlier checkpoint waits while a new one takes its name.
#[must_use]
pub fn replaced(step: u64) -> String {
    committed(step) + REPLACED
}

/// Where a damaged checkpoint is kept. Of one step there may be several, counted from 1.
#[must_use]
pub fn damaged(step: u64, number: u32) -> String {
    let again = if number > 1 { format!("-{number}") } else { String::new() };
    format!("{}{DAMAGED}{again}", committed(step))
}

/// Where `name` is written before it exists, or removed after it has ceased to.
#[must_use]
pub fn partial(name: &str) -> String {
    format!("{name}{PARTIAL}")
}

/// Where `rank` takes a step that it gives up, to remove it there.
#[must_use]
pub fn given_up(step: u64, rank: usize) -> String {
    partial(&format!("{}{RANK}{rank:04}", committed(step)))
}

/// In a store, what belongs to the machine whose lowest rank is this one, where machines have folders of their own.
#[must_use]
pub fn machine(rank: usize) -> String {
    format!("{MACHINE}{rank:04}")
}

/// The rank of a machine's name.
#[must_use]
pub fn machine_of(name: &str) -> Option<usize> {
    let rank = name.strip_prefix(MACHINE)?.parse().ok()?;
    (machine(rank) == name).then_some(rank)
}

/// The file of one rank's tensors.
#[must_use]
pub fn shard(rank: usize) -> String {
    format!("rank-{rank:04}.safetensors")
}

/// The file of one rank's tensors where it is packed: zstd frames and nothing else, as the ending tells other tools.
#[must_use]
pub fn packed_shard(rank: usize) -> String {
    shard(rank) + ".zst"
}

/// The step of a committed folder's name.
#[must_use]
pub fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (committed(step) == name).then_some(step)
}

/// The step of a replaced folder's name.
#[must_use]
pub fn replaced_step_of(name: &str) -> Option<u64> {
    step_of(name.strip_suffix(REPLACED)?)
}

/// Whether this is the name of a folder that we were writing or removing.
#[must_use]
pub fn is_left_over(name: &str) -> bool {
    let given_up_by_a_rank = |whole: &str| {
        let (step, rank) = whole.split_once(RANK)?;
        Some(given_up(step_of(step)?, rank.parse().ok()?) == name)
    };
    name.strip_suffix(PARTIAL).is_some_and(|whole| {
        step_of(whole).is_some() || replaced_step_of(whole).is_some() || given_up_by_a_rank(whole) == Some(true)
    })
}

/// The checkpoints among these names, with the folder to read for each step.
#[must_use]
pub fn checkpoints(names: &[String]) -> BTreeMap<u64, String> {
    let set_aside = names.iter().filter_map(|name| Some((replaced_step_of(name)?, name.clone())));
    let proper = names.iter().filter_map(|name| Some((step_of(name)?, name.clone())));
    // The later entry of a map wins, and that is the proper one.
    set_aside.chain(proper).collect()
}

/// Why `name` is not a plain file name, or nothing if it is: a manifest must not lead a reader out of its folder.
#[must_use]
pub fn fault_of_file_name(name: &str) -> Option<&'static str> {
    let mut components = Path::new(name).components();
    let plain = matches!((components.next(), components.next()), (Some(Component::Normal(only)), None) if only == name);
    if !plain || name.contains(['/', '\\', '\0']) {
        return Some("expected a plain name inside the folder, without separators and not absolute");
    }
    (name == MANIFEST).then_some("it is the manifest's own name")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_steps_and_back() {
        for step in [0, 7, 100, 99_999_999, 100_000_000, u64::MAX] {
            assert_eq!(step_of(&committed(step)), Some(step));
            assert_eq!(replaced_step_of(&replaced(step)), Some(step));
            assert!(is_left_over(&partial(&committed(step))) && is_left_over(&partial(&replaced(step))));
            assert!(!is_left_over(&committed(step)) && !is_left_over(&replaced(step)));
            for kept in [damaged(step, 1), damaged(step, 2)] {
                assert!(!is_left_over(&kept) && checkpoints(&[kept]).is_empty());
            }
            assert!(is_left_over(&given_up(step, 0)) && is_left_over(&given_up(step, 12_345)));
        }
        for other in
            ["step-1", "step-+0000001", "step-00000001.partial", "step-000000001", "step-", "best", "step-0000000a"]
        {
            assert_eq!(step_of(other), None, "{other}");
        }
        for other in [
            "notes.partial",
            "step-1.partial",
            ".partial",
            "step-00000001.partial.bak",
            "step-00000001.rank-1.partial",
            "step-00000001.rank-0001",
            "notes.rank-0001.partial",
        ] {
            assert!(!is_left_over(other), "{other} is not ours");
        }
    }

    #[test]
    fn what_was_set_aside_counts_until_its_successor_is_there() {
        let names = |names: &[&str]| checkpoints(&names.iter().map(ToString::to_string).collect::<Vec<_>>());
        let (both, alone) =
            (["step-00000001", "step-00000001.replaced"], ["step-00000001.replaced", "step-00000002.partial"]);
        assert_eq!(names(&both), BTreeMap::from([(1, both[0].to_owned())]));
        assert_eq!(names(&alone), BTreeMap::from([(1, alone[0].to_owned())]));
    }

    #[test]
    fn a_name_that_climbs_out_is_refused() {
        for name in ["", ".", "..", "/etc/passwd", "a/b", "../a", "a/", "./a", "a\\b", "manifest.json", "a\0b"] {
            assert!(fault_of_file_name(name).is_some(), "{name:?}");
        }
        for name in ["rank-0000.safetensors", "tokenizer.json", "..a", "a..b"] {
            assert_eq!(fault_of_file_name(name), None, "{name:?}");
        }
    }
}
