//! The tokens of a corpus: one memory-mapped file, little-endian, 2 bytes a token where the vocabulary allows it.
//!
//! Every document is preceded by the end-of-text token, so that the first token of a document is predicted from it.

use std::fs::File;

use memmap2::Mmap;

use super::cache::Cache;
use super::corpus::{self, Document};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::log::say;

/// Tokens in the order of the documents.
#[derive(Debug)]
pub struct Tokens {
    map: Mmap,
    width: usize,
    text_bytes: u64,
}

/// Bytes before the first token: the bytes of text that the tokens stand for, and the width of a token.
const HEADER: usize = 16;

impl Tokens {
    /// Finds the tokens of these documents in the cache, or makes them.
    ///
    /// # Errors
    /// The tokenizer refuses a text, or the cache cannot be written or mapped.
    pub fn find_or_make(cache: &Cache, tokenizer: &Tokenizer, documents: &[Document]) -> Result<Self> {
        let key = format!("tokens 1 {} {}", blake3::hash(&tokenizer.json()).to_hex(), corpus::hash(documents).to_hex());
        let make = |_: &str| {
            let bytes: usize = documents.iter().map(|document| document.text.len()).sum();
            say(&format!("tokenising {:.1} MB of text, once", bytes as f64 / 1e6));
            encode(tokenizer, documents)
        };
        let path = cache.find_or_make("tokens", &key, make)?.path;
        let file = File::open(&path).map_err(Error::io("open", &path))?;
        // SAFETY: entries of the cache are replaced by renaming, never written in place, so the mapped file does not
        // change under us unless somebody edits the cache by hand while it runs.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", &path))?;
        let header = |at: usize| map.get(at..at + 8).and_then(|x| x.try_into().ok()).map(u64::from_le_bytes);
        match (header(0), header(8)) {
            (Some(text_bytes), Some(width @ (2 | 4))) => Ok(Self { width: width as usize, text_bytes, map }),
            _ => Err(Error::Text { path: path.display().to_string(), what: "not a file of tokens; remove it".into() }),
        }
    }

    /// How many tokens there are.
    #[must_use]
    pub fn len(&self) -> usize {
        (self.map.len() - HEADER) / self.width
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of text that the tokens stand for.
    #[must_use]
    pub const fn text_bytes(&self) -> u64 {
        self.text_bytes
    }

    /// Whole windows of `seq_len` predicted tokens.
    #[must_use]
    pub fn windows(&self, seq_len: usize) -> u64 {
        (self.len().saturating_sub(1) / seq_len) as u64
    }

    /// `count` tokens from `start` on, appended to `out`.
    ///
    /// # Panics
    /// When they are not all there.
    pub fn read(&self, start: usize, count: usize, out: &mut Vec<i32>) {
        let bytes = &self.map[HEADER + start * self.width..HEADER + (start + count) * self.width];
        match self.width {
            2 => out.extend(bytes.chunks_exact(2).map(|b| i32::from(u16::from_le_bytes([b[0], b[1]])))),
            _ => out.extend(bytes.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        }
    }
}

fn encode(tokenizer: &Tokenizer, documents: &[Document]) -> Result<Vec<u8>> {
    let text_bytes: usize = documents.iter().map(|document| document.text.len()).sum();
    let width: usize = if tokenizer.vocab_size() <= 1 << 16 { 2 } else { 4 };
    let mut out = Vec::with_capacity(HEADER + text_bytes);
    out.extend((text_bytes as u64).to_le_bytes());
    out.extend((width as u64).to_le_bytes());
    for some in documents.chunks(256) {
        let texts = some.iter().map(|document| document.text.as_str()).collect();
        for ids in tokenizer.encode_all(texts)? {
            for id in std::iter::once(tokenizer.end_of_text()).chain(ids) {
                out.extend(&id.to_le_bytes()[..width]);
            }
        }
    }
    Ok(out)
}
