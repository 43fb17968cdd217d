//! The whole model at a run's end, where several ranks hold it together, one parameter at a time: every rank learns the hash of
//! all parameters, and the one that exports them writes each before the next one comes. None ever has the whole model.

use std::borrow::Cow;
use std::path::Path;

use parallel::progress::Stage;

use super::Run;
use crate::error::Result;
use crate::export::Export;
use crate::state::{Hasher, hash_of, sharding};

impl Run {
    /// Whether what is exported is with several ranks: parts of the model, or masters that are no replicas.
    pub(super) fn exports_together(&self) -> bool {
        let has_master = |part: &parallel::data::Part| self.state.sharding.has_master(&part.whole);
        self.stepper.replica().is_some() || self.stepper.plan().parts().iter().any(has_master)
    }

    /// Makes the hash of all parameters known. Where ranks hold parts of them, all ranks do it at the same place.
    ///
    /// # Errors
    /// A rank is lost.
    pub(super) fn merge(&mut self) -> Result<()> {
        self.go_through(|run, index, hasher| {
            hasher.add(&run.whole(index)?);
            Ok(())
        })
    }

    /// The same, and an export of them on the rank that has one to `write`, at the path beside it. Every rank of a run that
    /// [exports together](Self::exports_together) calls it at the same place.
    ///
    /// # Errors
    /// A rank is lost, or the export cannot be written.
    pub(super) fn merge_into(&mut self, write: Option<(&Export<'_>, &Path)>) -> Result<()> {
        let Some((export, path)) = write else {
            return self.go_through(|run, index, hasher| {
                hasher.add(&run.whole(index)?);
                run.master(index).map(|_| ())
            });
        };
        self.stepper.progress().enter(Stage::Ending);
        // The file has its tensors in the order of their names, and so has the hash.
        let mut hasher = Hasher::default();
        export.write(path, |index| {
            let whole = self.whole(index)?;
            hasher.add(&whole);
            Ok(self.master(index)?.map_or(whole, Cow::Owned))
        })?;
        self.merged = Some(hasher.finish());
        Ok(())
    }

    fn go_through(&mut self, add: impl Fn(&Self, usize, &mut Hasher) -> Result<()>) -> Result<()> {
        self.stepper.progress().enter(Stage::Ending);
        self.merged = Some(hash_of(&self.config, |index, hasher| add(self, index, hasher))?);
        Ok(())
    }

    /// A parameter of the model as ranks compute with it, all of it. Memory: what this rank does not hold of it, and a part more.
    fn whole(&self, index: usize) -> Result<Cow<'_, [f32]>> {
        assert!(self.stepper.is_settled(), "the parameters are of the step before");
        let (name, place) = self.held(index);
        let own = place.map_or(&[][..], |place| &self.state.weights[place]);
        match self.stepper.replica() {
            Some(replica) => replica.whole(&name, own).map(Cow::Owned),
            None => Ok(Cow::Borrowed(own)),
        }
    }

    /// The same as its owners have it, on the ranks of the first replica, where that is something else.
    fn master(&self, index: usize) -> Result<Option<Vec<f32>>> {
        let parameter = &self.config.parameters()[index];
        let Some(group) = self.group.as_ref().filter(|_| self.state.sharding.has_master(parameter)) else {
            return Ok(None);
        };
        let (name, place) = self.held(index);
        let gather =
            |place: usize| sharding::gather(&group.sums, &self.stepper.plan().parts()[place], place, &self.state);
        let own = place.map(gather).transpose()?.flatten();
        match self.stepper.replica() {
            // What a rank of the first replica does not hold, others of it do.
            Some(replica) if group.share.data == 0 => replica.whole(&name, &own.unwrap_or_default()).map(Some),
            _ => Ok(own),
        }
    }

    /// The name of a parameter of the model, and its place among those of which this rank holds something.
    fn held(&self, index: usize) -> (String, Option<usize>) {
        let name = self.config.parameters().swap_remove(index).name;
        let place = self.stepper.plan().parameters().iter().position(|own| own.name == name);
        (name, place)
    }

    /// BLAKE3 of all parameters; `None` where ranks hold parts of them, and have not put them together.
    pub(super) fn parameter_hash(&self) -> Option<String> {
        let hash = match (&self.merged, self.stepper.replica()) {
            (Some(merged), _) => *merged,
            (None, Some(_)) => return None,
            (None, None) => self.state.parameter_hash(&self.config),
        };
        Some(hash.to_hex().to_string())
    }
}
