//! `tributary bench`: speed of this machine, as ratios that anyone can repeat.
//!
//! - [`mod@aggregate`]: the sum of gradients over ranks, against a plain TCP copy and the rate of the line.
//! - [`mod@checkpoint`]: what a checkpoint costs training, and how fast it is written and read.
//! - [`mod@codec`]: the kernels of the codecs, against copies of the same elements.
//! - [`mod@step`]: one training step.

pub mod aggregate;
pub mod checkpoint;
pub mod codec;
pub mod step;

use compression::Codec;

use crate::error::{Error, Result};

/// The codecs of these names; all where there are none.
fn codecs(names: &[String]) -> Result<Vec<Codec>> {
    let known = |name: &String| {
        let names = Codec::ALL.map(Codec::name).join(", ");
        Codec::from_name(name).ok_or_else(|| Error::Usage(format!("--codec: expected one of {names}, found {name:?}")))
    };
    if names.is_empty() { Ok(Codec::ALL.to_vec()) } else { names.iter().map(known).collect() }
}

/// Elements of a gradient: at most 4 GiB of f32 in each buffer.
fn elements(text: &str) -> std::result::Result<usize, String> {
    let elements = text.parse().ok().filter(|elements| (1..=1 << 30).contains(elements));
    elements.ok_or_else(|| "expected a whole number from 1 to 1073741824".into())
}

fn at_least_one(text: &str) -> std::result::Result<usize, String> {
    text.parse().ok().filter(|&x| x > 0).ok_or_else(|| "expected a whole number of at least 1".into())
}
