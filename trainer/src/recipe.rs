//! A recipe: one TOML file that says everything about a run.
//!
//! - [`keys`]: the table of every key: its type, bounds, default, tag and meaning.
//! - [`fault`]: what is wrong with a recipe, where, and how to mend it.
//! - [`raw`]: the recipe as written, every value checked on its own against the table.
//! - [`checks`]: faults between keys.
//! - [`batch`]: what a resume with other ranks must keep.
//! - [`resolved`]: the recipe as validated: typed, complete, and consistent with itself.
//!
//! Everything that is wrong is reported at once, before any device, file or network is touched.

pub mod batch;
pub mod checks;
pub mod fault;
pub mod keys;
pub mod raw;
pub mod resolved;

pub use fault::{Fault, Faults};
pub use keys::Tag;
pub use raw::Raw;
pub use resolved::Recipe;

/// Reads a recipe from its text and the `--set` overrides.
///
/// # Errors
/// All faults together.
pub fn read(path: &str, text: &str, sets: &[String]) -> Result<(Raw, Recipe), Faults> {
    let (raw, mut faults) = raw::read(text, sets);
    let recipe = resolved::resolve(&raw, &mut faults);
    match recipe {
        Some(recipe) if faults.is_empty() => Ok((raw, recipe)),
        _ => Err(Faults::new(path, faults)),
    }
}
