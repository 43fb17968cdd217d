//! Text to tokens and back: Hugging Face's `tokenizers`, a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019)
//! when we train one. With all 256 bytes in its alphabet no text is unknown to it.

use std::sync::Arc;

use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerBuilder,
};

use super::corpus::Document;
use crate::error::{Error, Result};

/// A tokenizer, and the file that it was read from, which travels with checkpoints and exports unchanged.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    json: Arc<[u8]>,
    end_of_text: u32,
    end_of_text_name: String,
}

/// Trains a byte-level BPE of `vocab_size` tokens and returns its `tokenizer.json`.
///
/// # Errors
/// The text is too small for so many tokens, or the trainer fails.
pub fn train(vocab_size: usize, end_of_text: &str, documents: &[Document]) -> Result<Vec<u8>> {
    let failed = |error: tokenizers::Error| Error::Tokenizer(format!("training failed: {error}"));
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(vocab_size)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from(end_of_text, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut tokenizer =
        TokenizerBuilder::<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>::new()
            .with_model(BPE::default())
            .with_pre_tokenizer(Some(PreTokenizerWrapper::ByteLevel(ByteLevel::default().add_prefix_space(false))))
            .with_decoder(Some(DecoderWrapper::ByteLevel(ByteLevel::default())))
            .build()
            .map_err(failed)?;
    tokenizer.train(&mut trainer, documents.iter().map(|document| document.text.as_str())).map_err(failed)?;
    let found = tokenizer.get_vocab_size(true);
    if found != vocab_size {
        return Err(Error::Tokenizer(format!(
            "tokenizer.vocab_size: expected a text that yields {vocab_size} tokens, it yields {found}; \
             write {found} or less"
        )));
    }
    Ok(tokenizer.to_string(true).map_err(failed)?.into_bytes())
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// It is not one, or it does not have the end-of-text token.
    pub fn parse(json: Vec<u8>, end_of_text: &str) -> Result<Self> {
        let mut inner = tokenizers::Tokenizer::from_bytes(&json).map_err(|error| {
            Error::Tokenizer(format!("expected a tokenizer.json of Hugging Face's tokenizers: {error}"))
        })?;
        // Text that spells a special token is text; only we put special tokens between texts.
        inner.set_encode_special_tokens(true);
        let Some(id) = inner.token_to_id(end_of_text) else {
            return Err(Error::Tokenizer(format!(
                "tokenizer.end_of_text: the tokenizer has no token \"{end_of_text}\"; name the one that it ends texts with"
            )));
        };
        Ok(Self {
            inner: Arc::new(inner),
            json: json.into(),
            end_of_text: id,
            end_of_text_name: end_of_text.to_owned(),
        })
    }

    /// The file.
    #[must_use]
    pub fn json(&self) -> Arc<[u8]> {
        self.json.clone()
    }

    /// Tokens that there are: one more than the largest id.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1)
    }

    /// The token between documents.
    #[must_use]
    pub const fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    /// The spelling of the token between documents.
    #[must_use]
    pub fn end_of_text_name(&self) -> &str {
        &self.end_of_text_name
    }

    /// The tokens of many texts, in parallel.
    ///
    /// # Errors
    /// The tokenizer refuses a text.
    pub fn encode_all(&self, texts: Vec<&str>) -> Result<Vec<Vec<u32>>> {
        let encodings = self.inner.encode_batch_fast(texts, false).map_err(|e| Error::Tokenizer(e.to_string()))?;
        Ok(encodings.into_iter().map(|encoding| encoding.get_ids().to_vec()).collect())
    }

    /// The tokens of a prompt, all of which they must be able to say. `from` names where the prompt was written.
    ///
    /// # Errors
    /// The first character that gets lost.
    pub fn encode_prompt(&self, from: &str, prompt: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(prompt, false).map_err(|e| Error::Tokenizer(e.to_string()))?;
        let ids = encoding.get_ids().to_vec();
        let back = self.decode(&ids)?;
        if back == prompt {
            return Ok(ids);
        }
        let lost = prompt.chars().zip(back.chars().map(Some).chain(std::iter::repeat(None)));
        let at = lost.enumerate().find(|(_, (a, b))| Some(*a) != *b).map_or(0, |(at, _)| at);
        let shown = prompt.chars().nth(at).unwrap_or('\u{fffd}');
        Err(Error::Usage(format!(
            "{from}: this tokenizer has no token for {shown:?} (character {}): leave it out, or use a model with a \
             byte-level tokenizer",
            at + 1
        )))
    }

    /// The text of tokens, special tokens left out.
    ///
    /// # Errors
    /// The tokenizer fails to decode.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|error| Error::Tokenizer(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents() -> Vec<Document> {
        let text = (0..200).map(|i| format!("fn f{i}(x: u32) -> u32 {{ x + {i} }}\n")).collect();
        vec![Document { name: "a".into(), text }]
    }

    #[test]
    fn training_twice_gives_the_same_file_and_every_text_comes_back() {
        let json = train(300, "<|end|>", &documents()).expect("enough text");
        assert_eq!(json, train(300, "<|end|>", &documents()).expect("enough text"));
        let tokenizer = Tokenizer::parse(json, "<|end|>").expect("ours");
        assert_eq!(tokenizer.vocab_size(), 300);
        for text in ["fn main() {}", "żółć 漢字 🦀", " \t\r\n", "", "a<|end|>b"] {
            let ids = tokenizer.encode_prompt("--prompt", text).expect("byte-level");
            assert_eq!(tokenizer.decode(&ids).expect("ours"), text);
        }
    }

    #[test]
    fn a_vocabulary_that_the_text_cannot_fill_is_refused_with_the_size_it_can() {
        let message = train(100_000, "<|end|>", &documents()).expect_err("too many").to_string();
        assert!(message.contains("expected a text that yields 100000 tokens, it yields "), "{message}");
    }

    #[test]
    fn a_prompt_that_a_foreign_tokenizer_cannot_say_is_refused_by_character() {
        let json = br#"{"version":"1.0","added_tokens":[{"id":0,"content":"<e>","single_word":false,"lstrip":false,
            "rstrip":false,"normalized":false,"special":true}],"model":{"type":"BPE","vocab":{"<e>":0,"a":1,"b":2},"merges":[]}}"#;
        let tokenizer = Tokenizer::parse(json.to_vec(), "<e>").expect("a small one");
        assert_eq!(tokenizer.encode_prompt("--prompt", "a").expect("known"), [1]);
        let message = tokenizer.encode_prompt("--prompt", "ac").expect_err("no c").to_string();
        assert!(message.contains("'c' (character 2)"), "{message}");
        assert!(Tokenizer::parse(json.to_vec(), "<x>").is_err());
        assert!(Tokenizer::parse(b"{}".to_vec(), "<e>").is_err());
    }
}
