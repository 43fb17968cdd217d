//! The whole model at a run's end, where several ranks hold it together: every rank learns the hash of all parameters, and the
//! rank that exports them has them all.

use parallel::progress::Stage;

use super::Run;
use crate::error::Result;
use crate::state::hash_of;

/// All parameters, as one rank would have them.
#[derive(Debug)]
pub struct Merged {
    hash: blake3::Hash,
    /// Empty where nobody needs them.
    weights: Vec<Vec<f32>>,
}

impl Run {
    /// Puts the parameters together, one after the other, if ranks hold parts of them. All ranks do it at the same place.
    /// `keeps` says whether this one needs more than the hash.
    ///
    /// # Errors
    /// A rank is lost.
    pub(super) fn merge(&mut self, keeps: bool) -> Result<()> {
        let Some(replica) = self.stepper.replica() else { return Ok(()) };
        assert!(self.stepper.is_settled(), "the parameters are of the step before");
        self.stepper.progress().enter(Stage::Ending);
        let parameters = self.config.parameters();
        let mut weights = vec![Vec::new(); parameters.len()];
        let own = |name: &str| -> &[f32] {
            let place = self.stepper.plan().parameters().iter().position(|own| own.name == name);
            place.map_or(&[], |place| &self.state.weights[place])
        };
        let hash = hash_of(&self.config, |index, hasher| {
            let name = &parameters[index].name;
            let whole = replica.whole(name, own(name))?;
            hasher.add(&whole);
            if keeps {
                weights[index] = whole;
            }
            Ok(())
        })?;
        self.merged = Some(Merged { hash, weights: if keeps { weights } else { Vec::new() } });
        Ok(())
    }

    /// BLAKE3 of all parameters; `None` where ranks hold parts of them, and have not put them together.
    pub(super) fn parameter_hash(&self) -> Option<String> {
        let hash = match (&self.merged, self.stepper.replica()) {
            (Some(merged), _) => merged.hash,
            (None, Some(_)) => return None,
            (None, None) => self.state.parameter_hash(&self.config),
        };
        Some(hash.to_hex().to_string())
    }

    /// All parameters, on the rank that keeps them.
    pub(super) fn whole_weights(&self) -> &[Vec<f32>] {
        self.merged.as_ref().map_or(&self.state.weights, |merged| &merged.weights)
    }
}
