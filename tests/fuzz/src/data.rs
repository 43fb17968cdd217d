//! What `note` needs of the module of this name in `parallel`.

#[path = "../../../parallel/src/data/norm.rs"]
pub mod norm;
