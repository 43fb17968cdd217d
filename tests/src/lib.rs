//! What crosses crates.
//!
//! - `end_to_end/`: real runs of the real command line, in folders of their own.
//! - `peers/`: scripts that compare us with others; see `docs/testing.md`.
//! - `src/bin/`: the command line as tests run it, and `logits`, which prints a model's numbers for the peers.
//! - [`counting`]: the allocator of that command line, which says how much memory a process had.

pub mod counting;
