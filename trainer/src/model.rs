//! A Llama-style decoder as plain burn modules: RMSNorm (Zhang and Sennrich 2019), rotary embedding (Su et al. 2021),
//! grouped-query attention (Ainslie et al. 2023), SwiGLU (Shazeer 2020), with Hugging Face's parameter names.
//!
//! No file here knows of ranks, networks or optimisers. A layer offers one hook slot, empty outside training, and may be
//! built of a part of its weights.
//!
//! - [`config`]: the shape of a model, as Hugging Face's `config.json` has it, and the list of its parameters.
//! - [`layers`]: linear, embedding, norm, and the hook slot.
//! - [`attention`]: attention with rotary embedding and a cache for generation.
//! - [`llama`]: the decoder, its loss, and how it is built from weights.
//! - [`init`]: initial weights, a pure function of seed, name and element.

pub mod attention;
pub mod config;
pub mod init;
pub mod layers;
pub mod llama;

pub use config::Config;
pub use layers::{After, Hook};
pub use llama::{Leaf, Llama, Piece, Values};
