//! Weights that exist already: a run, a checkpoint or an export of ours.

use std::path::{Path, PathBuf};

use checkpoint::export::Folder;
use checkpoint::reader::{self, Checkpoint, Want};

use parallel::data::{Parameter, Part};

use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::export::HfConfig;
use crate::model::Config;
use crate::state;

/// Opened weights: their shape, their tokenizer, and a way to read them.
#[derive(Debug)]
pub struct Weights {
    /// Where they are.
    pub path: PathBuf,
    /// The model's shape.
    pub config: Config,
    /// `tokenizer.json`.
    pub tokenizer_json: Vec<u8>,
    /// The token between documents.
    pub end_of_text: String,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Checkpoint(Box<Checkpoint>),
    Export(Box<Folder>),
}

impl Weights {
    /// Opens a run's folder (its newest checkpoint), the name of a run below `runs`, a checkpoint, or an export.
    ///
    /// # Errors
    /// Nothing of the kind is there, or it is damaged.
    pub fn open(what: &Path, runs: &Path) -> Result<Self> {
        let named = runs.join(what);
        let kind = |path: &Path| ["manifest.json", "config.json", "checkpoints"].iter().any(|x| path.join(x).exists());
        // A folder here that only shares its name with a run is not meant.
        let path = if kind(what) || !named.is_dir() { what } else { &named };
        if path.join("manifest.json").is_file() {
            return Self::checkpoint(Checkpoint::open(path)?);
        }
        if path.join("config.json").is_file() {
            return Self::export(path);
        }
        Self::checkpoint(newest(path)?)
    }

    /// Opens a checkpoint.
    ///
    /// # Errors
    /// It is damaged, or not of a training run.
    pub fn checkpoint(checkpoint: Checkpoint) -> Result<Self> {
        let meta = state::meta(&checkpoint)?;
        Ok(Self {
            path: checkpoint.path().to_owned(),
            config: meta.model,
            tokenizer_json: checkpoint.attachment("tokenizer.json")?,
            end_of_text: meta.end_of_text,
            source: Source::Checkpoint(Box::new(checkpoint)),
        })
    }

    fn export(path: &Path) -> Result<Self> {
        let folder = Folder::open(path)?;
        let config = HfConfig::parse(&folder.file("config.json")?, &path.join("config.json"))?;
        // Each layer has tensors: before this nothing may be as long as the model that the file names.
        let (layers, most) = (config.shape.num_hidden_layers, folder.names().len());
        if layers > most {
            return Err(Error::Text {
                path: path.join("config.json").display().to_string(),
                what: format!(
                    "expected num_hidden_layers of at most {most}, the tensors of model.safetensors, found {layers}"
                ),
            });
        }
        Ok(Self {
            path: path.to_owned(),
            tokenizer_json: folder.file("tokenizer.json")?,
            end_of_text: crate::export::end_of_text(&folder, path)?,
            config: config.shape,
            source: Source::Export(Box::new(folder)),
        })
    }

    /// The tokenizer that comes with the weights.
    ///
    /// # Errors
    /// It is damaged, or names tokens that the model does not have.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let tokenizer = Tokenizer::parse(self.tokenizer_json.clone(), &self.end_of_text)?;
        let (tokens, rows) = (tokenizer.vocab_size(), self.config.vocab_size);
        if tokens > rows {
            return Err(Error::Tokenizer(format!(
                "{} has a tokenizer of {tokens} tokens and a model of {rows}: one of its files is another model's",
                self.path.display()
            )));
        }
        Ok(tokenizer)
    }

    /// Compares the stored parameters with those of a model of shape `wanted`.
    ///
    /// # Errors
    /// Every parameter that is missing or has another shape, and a vocabulary that differs, together.
    pub fn check(&self, wanted: &Config) -> Result<()> {
        let have = match &self.source {
            Source::Checkpoint(_) => self.config.parameters(),
            Source::Export(folder) => {
                folder.names().into_iter().map(|(name, shape)| Parameter { name, shape }).collect()
            }
        };
        let want = wanted.parameters();
        let mut mismatches = Vec::new();
        if self.config.vocab_size != wanted.vocab_size {
            let (found, expected) = (self.config.vocab_size, wanted.vocab_size);
            mismatches
                .push(format!("vocabulary: the recipe's tokenizer has {expected} tokens, the weights have {found}"));
        }
        for parameter in &want {
            match have.iter().find(|other| other.name == parameter.name) {
                None => mismatches.push(format!("{}: expected {:?}, found nothing", parameter.name, parameter.shape)),
                Some(other) if other.shape != parameter.shape => {
                    mismatches
                        .push(format!("{}: expected {:?}, found {:?}", parameter.name, parameter.shape, other.shape));
                }
                Some(_) => {}
            }
        }
        let extra = have.iter().filter(|other| want.iter().all(|parameter| parameter.name != other.name));
        mismatches.extend(extra.map(|other| format!("{}: expected nothing, found {:?}", other.name, other.shape)));
        if mismatches.is_empty() { Ok(()) } else { Err(Error::Mismatch { path: self.path.clone(), mismatches }) }
    }

    /// Reads the parts that a rank holds of a model of shape `wanted`. Memory: of an export the largest parameter beside them.
    ///
    /// # Errors
    /// As [`check`](Self::check), or a damaged file.
    pub fn read_parts(&self, wanted: &Config, parts: &[Part]) -> Result<Vec<Vec<f32>>> {
        self.check(wanted)?;
        let checkpoint = match &self.source {
            Source::Checkpoint(checkpoint) => checkpoint,
            Source::Export(folder) => {
                return parts.iter().map(|part| Ok(part.take(&folder.tensor(&part.whole.name)?.1))).collect();
            }
        };
        let mut values: Vec<Vec<f32>> = parts.iter().map(|part| vec![0.0; part.region.len()]).collect();
        let mut wants: Vec<Want<'_>> = (parts.iter().zip(&mut values))
            .map(|(part, out)| {
                let Parameter { name, shape } = &part.whole;
                Want { tensor: name, shape, region: part.region.clone(), out }
            })
            .collect();
        checkpoint.load(&mut wants)?;
        Ok(values)
    }

    /// Reads every parameter of a model of shape `wanted`, in its order.
    ///
    /// # Errors
    /// As [`check`](Self::check), or a damaged file.
    pub fn read(&self, wanted: &Config) -> Result<Vec<Vec<f32>>> {
        let whole = |parameter| Part::whole(parameter).map_err(|error| Error::Usage(error.to_string()));
        self.read_parts(wanted, &wanted.parameters().into_iter().map(whole).collect::<Result<Vec<_>>>()?)
    }
}

/// The newest checkpoint of a run's folder.
fn newest(run: &Path) -> Result<Checkpoint> {
    if !run.is_dir() {
        return Err(Error::Usage(format!(
            "{}: expected the folder or the name of a run, a checkpoint, or an export; there is no such folder",
            run.display()
        )));
    }
    match reader::list(&run.join("checkpoints"))?.pop() {
        Some((_, path)) => Ok(Checkpoint::open(&path)?),
        None => Err(Error::Run {
            name: run.display().to_string(),
            what: "it has no checkpoint yet: wait for one, or train it to its end".into(),
        }),
    }
}
