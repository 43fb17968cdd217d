//! Export in Hugging Face's format: a folder that `transformers` loads as `LlamaForCausalLM`.

use std::borrow::Cow;
use std::path::Path;

use checkpoint::export::{Content, Dtype, Folder, Tensor, write_folder};
use parallel::data::Parameter;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::model::Config;

/// `config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HfConfig {
    /// Always `["LlamaForCausalLM"]`.
    pub architectures: Vec<String>,
    /// Always `llama`.
    pub model_type: String,
    /// The fields that we share with `LlamaConfig`.
    #[serde(flatten)]
    pub shape: Config,
    /// Always `silu`.
    pub hidden_act: String,
    /// Always false.
    pub attention_bias: bool,
    /// Always false.
    pub mlp_bias: bool,
    /// Elements a head.
    pub head_dim: usize,
    /// There is no token that starts a text but the one that ended the text before.
    pub bos_token_id: u32,
    /// The token between documents.
    pub eos_token_id: u32,
    /// Type of the stored weights, in torch's spelling.
    pub dtype: String,
    /// Never written; a file that has one is of a model that we do not compute.
    #[serde(default, skip_serializing)]
    pub rope_scaling: Option<Value>,
}

impl HfConfig {
    /// Reads a `config.json` of ours.
    ///
    /// # Errors
    /// It is not one, or another architecture.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let fault = |what: String| Error::Text { path: path.display().to_string(), what };
        let config: Self = serde_json::from_slice(bytes)
            .map_err(|error| fault(format!("expected the config.json of an export of Tributary: {error}")))?;
        if config.model_type != "llama" || config.hidden_act != "silu" || config.attention_bias || config.mlp_bias {
            return Err(fault("expected a llama with silu and without biases".into()));
        }
        config.shape.check().map_err(fault)?;
        if config.rope_scaling.is_some() || config.head_dim != config.shape.head_dim() {
            return Err(fault(
                "expected heads of hidden_size / num_attention_heads elements, without rope_scaling".into(),
            ));
        }
        Ok(config)
    }
}

/// What an export is made of, but for its parameters.
#[derive(Debug)]
pub struct Export<'a> {
    /// The model's shape.
    pub config: &'a Config,
    /// `tokenizer.json`.
    pub tokenizer: &'a [u8],
    /// The token between documents.
    pub end_of_text: &'a str,
    /// Its id.
    pub end_of_text_id: u32,
    /// Type of the stored weights.
    pub dtype: Dtype,
}

impl Export<'_> {
    /// Writes the folder, which must not exist; it appears whole or not at all. `give` has all of a parameter by its index in
    /// the model's order, and is asked for each once, in the order of their names. Returns the folder's bytes.
    ///
    /// # Errors
    /// The folder exists or cannot be written; those of `give`.
    pub fn write<'v>(&self, out: &Path, give: impl FnMut(usize) -> Result<Cow<'v, [f32]>>) -> Result<u64> {
        let dtype = match self.dtype {
            Dtype::F32 => "float32",
            Dtype::Bf16 => "bfloat16",
            Dtype::F16 => "float16",
        };
        let config = HfConfig {
            architectures: vec!["LlamaForCausalLM".into()],
            model_type: "llama".into(),
            shape: self.config.clone(),
            hidden_act: "silu".into(),
            attention_bias: false,
            mlp_bias: false,
            head_dim: self.config.head_dim(),
            bos_token_id: self.end_of_text_id,
            eos_token_id: self.end_of_text_id,
            dtype: dtype.into(),
            rope_scaling: None,
        };
        let tokenizer_config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.end_of_text,
            "eos_token": self.end_of_text,
            "clean_up_tokenization_spaces": false,
            "model_max_length": self.config.max_position_embeddings,
        });
        let generation_config = json!({
            "bos_token_id": self.end_of_text_id,
            "eos_token_id": self.end_of_text_id,
            "do_sample": false,
        });
        let files = [
            ("config.json", pretty(&config)?),
            ("generation_config.json", pretty(&generation_config)?),
            ("tokenizer_config.json", pretty(&tokenizer_config)?),
            ("tokenizer.json", self.tokenizer.to_vec()),
        ];
        let tensor = |Parameter { name, shape }| Tensor { name, shape };
        let tensors: Vec<Tensor> = self.config.parameters().into_iter().map(tensor).collect();
        write_folder(out, Content { files: &files, tensors: &tensors, dtype: self.dtype }, give)
    }
}

/// The token between documents, from an export's `tokenizer_config.json`.
///
/// # Errors
/// It does not say.
pub fn end_of_text(folder: &Folder, path: &Path) -> Result<String> {
    let value: Value = serde_json::from_slice(&folder.file("tokenizer_config.json")?).unwrap_or_default();
    value.get("eos_token").and_then(Value::as_str).map(str::to_owned).ok_or_else(|| Error::Text {
        path: path.join("tokenizer_config.json").display().to_string(),
        what: "expected a string \"eos_token\"".into(),
    })
}

fn pretty(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|error| Error::io("write", "an export")(error.into()))?;
    text.push(b'\n');
    Ok(text)
}
