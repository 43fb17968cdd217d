//! From text to batches of tokens.
//!
//! - [`corpus`]: which documents there are, and the hash that names them.
//! - [`tokenizer`]: a byte-level BPE, trained once or read from a file.
//! - [`cache`]: files that are made once and found again by the hash of what they were made from.
//! - [`tokens`]: the memory-mapped tokens of a corpus, and windows of them.
//! - [`order`]: a seeded permutation of the windows, computed in O(1), so that a resume seeks at once.

pub mod cache;
pub mod corpus;
pub mod order;
pub mod tokenizer;
pub mod tokens;

use std::path::Path;
use std::time::Instant;

use corpus::Corpus;
use tokenizer::Tokenizer;
use tokens::Tokens;

use crate::error::{Error, Result};
use crate::log::say;
use crate::recipe::Recipe;
use crate::recipe::resolved::TokenizerSource;

/// Everything that a run reads.
#[derive(Debug)]
pub struct Data {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// BLAKE3 of the text, training and held-out.
    pub corpus_hash: String,
    /// What to train on.
    pub train: Tokens,
    /// What to hold out; `None` when the recipe names nothing.
    pub held_out: Option<Tokens>,
    held_out_documents: Vec<corpus::Document>,
    cache: cache::Cache,
}

/// Reads the corpus, checks it, and finds or makes tokenizer and tokens. `given` are the tokenizer and its
/// end-of-text token that come with `model.from`; `registry` is cargo's folder of unpacked sources.
///
/// # Errors
/// Missing or changed text, a tokenizer that cannot be read or trained, a cache that cannot be written.
pub fn prepare(recipe: &Recipe, given: Option<(&[u8], &str)>, registry: &Path) -> Result<Data> {
    let start = Instant::now();
    let corpus = Corpus::read(&recipe.data, registry)?;
    let cache = cache::Cache::open(&recipe.data.cache_dir)?;
    let end_of_text = recipe.tokenizer.end_of_text.as_deref().or(given.map(|(_, end)| end)).unwrap_or("<|endoftext|>");
    let json = match (&recipe.tokenizer.source, given) {
        (TokenizerSource::Train { vocab_size }, _) => {
            let key = format!("bpe 1 {vocab_size} {end_of_text} {}", corpus.train_hash());
            let train = |_: &str| {
                say(&format!("training a tokenizer of {vocab_size} tokens, once"));
                tokenizer::train(*vocab_size, end_of_text, &corpus.train)
            };
            cache.find_or_make("tokenizer", &key, train)?.bytes
        }
        (TokenizerSource::File(path), _) => std::fs::read(path).map_err(Error::io("read", path))?,
        (TokenizerSource::From, Some((json, _))) => json.to_vec(),
        (TokenizerSource::From, None) => return Err(Error::Tokenizer("there is none beside model.from".into())),
    };
    let tokenizer = Tokenizer::parse(json, end_of_text)?;
    let train = Tokens::find_or_make(&cache, &tokenizer, &corpus.train)?;
    let held_out = match corpus.held_out.as_slice() {
        [] => None,
        documents => Some(Tokens::find_or_make(&cache, &tokenizer, documents)?),
    };
    if train.windows(recipe.train.seq_len) == 0 {
        return Err(Error::Usage(format!(
            "train.seq_len: expected at most {} (the training text has {} tokens), found {}",
            train.len().saturating_sub(1),
            train.len(),
            recipe.train.seq_len
        )));
    }
    if let Some(tokens) = &held_out
        && tokens.windows(recipe.train.seq_len) == 0
    {
        return Err(Error::Usage(format!(
            "eval.files: expected more than train.seq_len = {} tokens of held-out text, found {}",
            recipe.train.seq_len,
            tokens.len()
        )));
    }
    tracing::info!(tokens = train.len(), seconds = start.elapsed().as_secs_f64(), "data is ready");
    let Corpus { held_out: held_out_documents, hash: corpus_hash, .. } = corpus;
    Ok(Data { tokenizer, corpus_hash, train, held_out, held_out_documents, cache })
}

/// Held-out text that zstd is tried on, at the most: level 19 takes half a second a megabyte.
const ZSTD_BYTES_MAX: usize = 64 << 20;

impl Data {
    /// What `zstd -19` makes of the held-out documents, one after the other, in bits per byte; remembered in the cache.
    /// `None` when there are none, or more than it is worth.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub fn held_out_zstd(&self) -> Result<Option<f64>> {
        let text: Vec<u8> = self.held_out_documents.iter().flat_map(|document| document.text.bytes()).collect();
        if text.is_empty() || text.len() > ZSTD_BYTES_MAX {
            return Ok(None);
        }
        let key = format!("zstd 19 {}", blake3::hash(&text).to_hex());
        let found = self.cache.find_or_make("zstd", &key, |_| {
            let packed = zstd::bulk::compress(&text, 19).map_err(Error::io("compress", "the held-out text"))?;
            Ok((packed.len() as u64).to_le_bytes().to_vec())
        })?;
        let packed = <[u8; 8]>::try_from(found.bytes.as_slice()).map_or(0, u64::from_le_bytes);
        Ok(Some(8.0 * packed as f64 / text.len() as f64))
    }
}
