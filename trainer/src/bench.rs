//! `tributary bench`: speed of this machine, as ratios that anyone can repeat.
//!
//! - [`mod@codec`]: the kernels of the codecs, against copies of the same elements.
//! - [`mod@step`]: one training step.

pub mod codec;
pub mod step;

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&x| x > 0).ok_or_else(|| "expected a whole number of at least 1".into())
}
