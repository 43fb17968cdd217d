//! The ranks that wrote a checkpoint, and those that go on from it.

use std::fmt;

use checkpoint::reader::Checkpoint;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Meta;
use crate::error::{Error, Result};
use crate::recipe::raw::{self, Reader};

/// As many as there may be.
const RANKS_MAX: usize = parallel::mesh::RANKS_MAX;

/// The ranks of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mesh {
    /// Data-parallel ranks.
    pub data: usize,
    /// Stages of a pipeline.
    #[serde(default = "one")]
    pub pipeline: usize,
    /// Ranks that share every layer.
    #[serde(default = "one")]
    pub tensor: usize,
    /// Ranks of a machine, which add their gradients before these are compressed.
    pub group: usize,
    /// The host of each rank, in rank order: who is to be asked when what a rank wrote is not here. Empty where an older
    /// version wrote the checkpoint.
    #[serde(default)]
    pub hosts: Vec<String>,
}

/// Where an older version wrote the checkpoint, every rank held a whole model.
const fn one() -> usize {
    1
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.replica() > 1 {
            let Self { data, pipeline, tensor, .. } = self;
            // What a damaged checkpoint says is shown too.
            let ranks = data.saturating_mul(self.replica());
            return write!(f, "{ranks} ranks, {data} x {pipeline} x {tensor} (data x pipeline x tensor)");
        }
        match (self.data, self.group) {
            (1, _) => write!(f, "1 rank"),
            (data, 1) => write!(f, "{data} ranks"),
            (data, group) => write!(f, "{data} ranks, {group} a machine"),
        }
    }
}

impl Mesh {
    /// The ranks that wrote a checkpoint. Older versions did not write it down, but for their recipe.
    ///
    /// # Errors
    /// It makes no sense, or the recipe in the checkpoint is damaged.
    pub fn of(checkpoint: &Checkpoint, meta: &Meta) -> Result<Self> {
        if let Some(mesh) = &meta.mesh {
            let count = |ranks: usize| (1..=RANKS_MAX).contains(&ranks);
            let sizes = [mesh.data, mesh.pipeline, mesh.tensor];
            let sound = sizes.into_iter().all(count) && (1..=mesh.data).contains(&mesh.group);
            // Each is at most a thousand: the product is no overflow.
            let sound = sound && count(mesh.data * mesh.replica());
            let what = || format!("expected 1 to {RANKS_MAX} ranks and a group of them, found {mesh}");
            let path = checkpoint.path().join("manifest.json").display().to_string();
            return if sound { Ok(mesh.clone()) } else { Err(Error::Text { path, what: what() }) };
        }
        let recipe = checkpoint.attachment("recipe.toml")?;
        let (raw, _) = raw::read(&String::from_utf8_lossy(&recipe), &[]);
        let count = |key: &str| Reader(&raw).count(key).unwrap_or(1);
        let [data, pipeline, tensor] = ["data", "pipeline", "tensor"].map(|axis| count(&format!("parallel.{axis}")));
        Ok(Self { data, pipeline, tensor, group: count("parallel.group"), hosts: Vec::new() })
    }

    /// How many ranks hold one model together.
    #[must_use]
    pub const fn replica(&self) -> usize {
        self.pipeline.saturating_mul(self.tensor)
    }

    /// Whether both leave the same out of the same places, so that nothing has to be cut anew. Which stage a layer is on
    /// changes nothing of that.
    #[must_use]
    pub fn cuts_like(&self, other: &Self) -> bool {
        (self.data, self.tensor, self.group) == (other.data, other.tensor, other.group)
    }

    /// How many they are.
    #[must_use]
    pub const fn ranks(&self) -> usize {
        self.data * self.replica()
    }

    /// The host of a rank, for people.
    #[must_use]
    pub fn host_of_rank(&self, rank: usize) -> &str {
        self.hosts.get(rank).map_or("a machine that the checkpoint does not name", String::as_str)
    }

    /// The host of a data-parallel rank, of the first of those that hold its model together, for people.
    #[must_use]
    pub fn host_of(&self, data: usize) -> &str {
        self.host_of_rank(data * self.replica())
    }
}

/// A start on other ranks than the checkpoint's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recut {
    /// The ranks that wrote it.
    pub before: Mesh,
    /// The ranks that go on.
    pub after: Mesh,
    /// Whether there was something that had been left out.
    pub folded: bool,
}

impl Recut {
    /// The fields of its event.
    #[must_use]
    pub fn fields(&self) -> Value {
        let of = |mesh: &Mesh| json!({ "data": mesh.data, "group": mesh.group, "pipeline": mesh.pipeline, "tensor": mesh.tensor });
        let residuals = if self.folded { "folded" } else { "none" };
        json!({ "before": of(&self.before), "after": of(&self.after), "residuals": residuals })
    }
}

impl fmt::Display for Recut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { before, after, folded } = self;
        let left = match (folded, after.data * after.replica()) {
            (false, _) => "nothing was left out of its gradients",
            (true, 1) => "what had been left out of gradients is added to the next one that counts",
            (true, _) => "what had been left out of gradients was added up, and each rank goes on with its share",
        };
        write!(f, "the checkpoint is of {before}, this is {after}: {left}")
    }
}
