//! The hash of a file as a tree, so that a part of the file can be checked without the rest.
//!
//! BLAKE3 is a tree: blocks of a power of two bytes are hashed apart and their values merged to the hash of the whole
//! (<https://github.com/BLAKE3-team/BLAKE3-specs/blob/master/blake3.pdf>, section 2.1). Whoever has the values of all blocks
//! and the hash of the whole can prove the values by merging them, and then each block by its value alone.

use blake3::hazmat::{ChainingValue, HasherExt as _, Mode, merge_subtrees_non_root, merge_subtrees_root};
use blake3::{Hash, Hasher};
use serde::{Deserialize, Serialize};

/// Bytes of the smallest block that has a value of its own.
pub const BLOCK: u64 = 1 << 20;

/// Values of a file in its manifest at the most. A file of more blocks has larger ones.
pub const VALUES_MAX: usize = 1024;

const HEX: usize = 2 * blake3::OUT_LEN;

/// The values of a file's blocks, as a manifest holds them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subtrees {
    /// Bytes of a block, a power of two and at least 1 MiB; the last block has what is left.
    pub bytes: u64,
    /// The chaining value of each in lower-case hex, one after the other.
    pub values: String,
}

/// What a file's blocks hash to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// Bytes of a block; the last one has what is left.
    pub block: u64,
    /// The value of each, two at least.
    pub values: Vec<ChainingValue>,
}

impl Tree {
    /// The hash of the file.
    pub fn root(&self) -> Hash {
        let (left, right) = halves(&self.values);
        merge_subtrees_root(&merge(left), &merge(right), Mode::Hash)
    }

    /// The same file with blocks of twice the bytes.
    fn coarser(&self) -> Self {
        Self { block: 2 * self.block, values: self.values.chunks(2).map(merge).collect() }
    }

    /// What the manifest says of the file.
    pub fn subtrees(self) -> Subtrees {
        let mut tree = self;
        while tree.values.len() > VALUES_MAX {
            tree = tree.coarser();
        }
        let values = tree.values.iter().map(|value| Hash::from_bytes(*value).to_hex());
        Subtrees { bytes: tree.block, values: values.fold(String::new(), |text, value| text + value.as_str()) }
    }
}

impl Subtrees {
    /// The values, if they are those of a file of `bytes` bytes that hashes to `root`; else what does not fit.
    pub fn tree(&self, bytes: u64, root: &str) -> Result<Tree, String> {
        if !self.bytes.is_power_of_two() || self.bytes < BLOCK {
            return Err(format!("its subtrees are of {} bytes, which is no power of two from {BLOCK} on", self.bytes));
        }
        let count = bytes.div_ceil(self.bytes);
        if !(2..=VALUES_MAX as u64).contains(&count) || self.values.len() as u64 != count * HEX as u64 {
            return Err(format!(
                "expected the values of 2 to {VALUES_MAX} subtrees, {HEX} digits each, found {} digits for {count}",
                self.values.len()
            ));
        }
        let value = |digits: &[u8]| {
            let lower = !digits.iter().any(u8::is_ascii_uppercase);
            Hash::from_hex(digits).ok().filter(|_| lower).map(|value| *value.as_bytes())
        };
        let values: Option<Vec<ChainingValue>> = self.values.as_bytes().chunks(HEX).map(value).collect();
        let values = values.ok_or("the values of its subtrees are no lower-case hex digits")?;
        let tree = Tree { block: self.bytes, values };
        let found = tree.root().to_hex();
        if found.as_str() != root {
            return Err(format!("its subtrees make BLAKE3 {found}, and not {root}"));
        }
        Ok(tree)
    }
}

/// The value of neighbouring blocks together.
fn merge(values: &[ChainingValue]) -> ChainingValue {
    if let [only] = values {
        return *only;
    }
    let (left, right) = halves(values);
    merge_subtrees_non_root(&merge(left), &merge(right), Mode::Hash)
}

/// The left subtree is the largest that is complete and leaves something to the right.
fn halves(values: &[ChainingValue]) -> (&[ChainingValue], &[ChainingValue]) {
    values.split_at(values.len().next_power_of_two() / 2)
}

/// Hashes a file from its first byte to its last, on one thread, and keeps the values of its blocks: 32 bytes of memory for
/// each [`BLOCK`].
#[derive(Debug, Default)]
pub struct TreeHasher {
    /// Of the block that is being hashed.
    hasher: Hasher,
    values: Vec<ChainingValue>,
    bytes: u64,
}

impl TreeHasher {
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.bytes > 0 && self.bytes.is_multiple_of(BLOCK) {
                // There is something behind this block, so that it is not the root.
                self.values.push(self.hasher.finalize_non_root());
                self.hasher = Hasher::new();
                self.hasher.set_input_offset(self.bytes);
            }
            let (first, rest) = bytes.split_at(bytes.len().min((BLOCK - self.bytes % BLOCK) as usize));
            self.hasher.update(first);
            self.bytes += first.len() as u64;
            bytes = rest;
        }
    }

    /// Bytes so far.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The hash, and the values where there are several blocks.
    pub fn finish(mut self) -> (Hash, Option<Tree>) {
        if self.values.is_empty() {
            return (self.hasher.finalize(), None);
        }
        self.values.push(self.hasher.finalize_non_root());
        let tree = Tree { block: BLOCK, values: self.values };
        (tree.root(), Some(tree))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|index| (index.wrapping_mul(2_654_435_761) >> 7) as u8).collect()
    }

    #[test]
    fn the_hash_is_that_of_the_whole_at_every_border_and_in_any_pieces() {
        let block = BLOCK as usize;
        let near = |size: usize| [size - 1, size, size + 1];
        let sizes = [0, 1, 1024, 1025].into_iter().chain([1, 2, 3, 4, 5, 7, 8].map(|n| near(n * block)).concat());
        let longest = content(8 * block + 1);
        for size in sizes {
            let bytes = &longest[..size];
            for piece in [1 << 16, block - 3, block, 3 * block + 5] {
                let mut hasher = TreeHasher::default();
                bytes.chunks(piece).for_each(|piece| hasher.update(piece));
                assert_eq!(hasher.bytes(), size as u64);
                let (hash, tree) = hasher.finish();
                assert_eq!(hash, blake3::hash(bytes), "{size} bytes in pieces of {piece}");
                assert_eq!(tree.is_some(), size > block);
                let Some(tree) = tree else { continue };
                let root = hash.to_hex();
                assert_eq!(tree.coarser().values.len(), size.div_ceil(2 * block));
                assert_eq!(tree.clone().subtrees().tree(size as u64, &root), Ok(tree.clone()));
                if tree.values.len() > 2 {
                    assert_eq!(tree.coarser().root(), hash, "{size} bytes with larger blocks");
                }
            }
        }
    }

    #[test]
    fn many_blocks_are_told_as_fewer_and_larger_ones() {
        let tree = Tree { block: BLOCK, values: (0..VALUES_MAX as u32 * 2 + 1).map(|n| [n as u8; 32]).collect() };
        let (root, bytes) = (tree.root().to_hex(), BLOCK * VALUES_MAX as u64 * 2 + 1);
        let subtrees = tree.subtrees();
        assert_eq!((subtrees.bytes, subtrees.values.len()), (4 * BLOCK, HEX * (VALUES_MAX / 2 + 1)));
        assert_eq!(subtrees.tree(bytes, &root).unwrap().root().to_hex(), root);
    }

    #[test]
    fn values_that_do_not_make_the_hash_are_refused() {
        let bytes = content(3 * BLOCK as usize);
        let mut hasher = TreeHasher::default();
        hasher.update(&bytes);
        let (hash, tree) = hasher.finish();
        let (root, good) = (hash.to_hex(), tree.unwrap().subtrees());
        let check = |subtrees: &Subtrees, bytes: u64, words: &str| {
            let why = subtrees.tree(bytes, &root).unwrap_err();
            assert!(why.contains(words), "{why}");
        };
        let size = bytes.len() as u64;
        for bytes in [0, 1, BLOCK / 2, BLOCK + 1, u64::MAX] {
            check(&Subtrees { bytes, ..good.clone() }, size, "no power of two");
        }
        check(&Subtrees { bytes: 1 << 63, ..good.clone() }, size, "192 digits for 1");
        check(&good, size + 1, "192 digits for 4");
        check(&good, u64::MAX, "192 digits");
        check(&Subtrees { values: String::new(), bytes: good.bytes }, size, "found 0 digits");
        let with = |change: fn(&str) -> String| Subtrees { values: change(&good.values), ..good.clone() };
        check(&with(|values| values.to_uppercase()), size, "no lower-case hex");
        check(&with(|values| values.replacen(&values[..1], "x", 1)), size, "no lower-case hex");
        check(&with(|values| "é".repeat(96) + &values[..0]), size, "no lower-case hex");
        check(&with(|values| format!("{}{}", &values[64..], &values[..64])), size, "its subtrees make BLAKE3");
        // The control.
        good.tree(size, &root).unwrap();
    }
}
