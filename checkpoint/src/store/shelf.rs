//! The objects of one run in a store: their names, and the few requests that everything else is made of.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use object_store::path::Path as ObjectPath;
use object_store::{Error, ObjectStore, ObjectStoreExt as _};
use tokio_stream::StreamExt as _;

use super::error::failed;
use super::open::{Settings, check_folder, open};
use super::place::Place;
use crate::error::CheckpointError;
use crate::layout::{self, SMALL_BYTES_MAX};

/// Most objects that are looked at below a run's place.
const OBJECTS_MAX: usize = 1_000_000;

/// Whose folder of checkpoints a copy is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Seat {
    /// The only one: of one machine, or of several that share it.
    Shared,
    /// Of the machine whose lowest rank is this one; there are others.
    Machine(usize),
}

/// Which copy of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct At {
    /// Its step.
    pub step: u64,
    /// Of whose folder.
    pub seat: Seat,
}

/// The objects of each copy, by name, with their sizes.
pub(super) type Listing = BTreeMap<At, BTreeMap<String, u64>>;

/// Whether a copy with these objects counts: as soon as its manifest is there.
pub(super) fn is_complete(objects: &BTreeMap<String, u64>) -> bool {
    objects.contains_key(layout::MANIFEST)
}

/// All checkpoints of one run in a store.
#[derive(Clone, Debug)]
pub(super) struct Shelf {
    pub store: Arc<dyn ObjectStore>,
    pub place: Place,
}

/// One object: its name for the store, and for people.
#[derive(Clone, Debug)]
pub(super) struct Object {
    pub path: ObjectPath,
    pub url: String,
}

impl At {
    /// The place of this copy below that of its run.
    pub(super) fn below(self, run: &Place) -> Place {
        let seat = match self.seat {
            Seat::Shared => run.clone(),
            Seat::Machine(rank) => run.below(&layout::machine(rank)),
        };
        seat.below(&layout::committed(self.step))
    }

    /// The copy whose folder has this place, and the place of its run.
    #[must_use]
    pub fn of(place: &Place) -> Option<(Place, Self)> {
        let (above, name) = place.split()?;
        let step = layout::step_of(name)?;
        match above.split().and_then(|(run, name)| Some((run, layout::machine_of(name)?))) {
            Some((run, rank)) => Some((run, Self { step, seat: Seat::Machine(rank) })),
            None => Some((above, Self { step, seat: Seat::Shared })),
        }
    }
}

impl Shelf {
    pub fn open(place: &Place, settings: &Settings) -> Result<Self, CheckpointError> {
        Ok(Self { store: open(place, settings)?, place: place.clone() })
    }

    pub fn object(&self, at: At, name: &str) -> Result<Object, CheckpointError> {
        let place = at.below(&self.place);
        let url = format!("{place}/{name}");
        let path = ObjectPath::parse(format!("{}/{name}", place.prefix()));
        let path = path.map_err(|source| failed("name the object", &url)(Error::from(source)))?;
        Ok(Object { path, url })
    }

    /// Everything of ours below the run's place; other objects are not looked at.
    pub async fn list(&self) -> Result<Listing, CheckpointError> {
        self.list_below(&self.place).await
    }

    /// The objects of one copy, with their sizes.
    pub async fn objects(&self, at: At) -> Result<BTreeMap<String, u64>, CheckpointError> {
        Ok(self.list_below(&at.below(&self.place)).await?.remove(&at).unwrap_or_default())
    }

    /// What is ours below a place, which is the run's or below that.
    async fn list_below(&self, below: &Place) -> Result<Listing, CheckpointError> {
        let (url, prefix, run) = (below.to_string(), below.prefix(), self.place.prefix());
        let failed = || failed("list", &url);
        if let Some((above, _)) = self.place.split() {
            check_folder(&above).await?;
        }
        let path = ObjectPath::parse(&prefix).map_err(|source| failed()(Error::from(source)))?;
        let mut objects = self.store.list(Some(&path));
        let (mut listing, mut seen) = (Listing::new(), 0);
        while let Some(object) = objects.next().await {
            let object = object.map_err(failed())?;
            seen += 1;
            if seen > OBJECTS_MAX {
                let why =
                    format!("expected at most {OBJECTS_MAX} objects, found more: give runs a prefix of their own");
                return Err(CheckpointError::Store { operation: "list", url, why, again: false });
            }
            let below = object.location.as_ref().strip_prefix(&run).map(|rest| rest.trim_start_matches('/'));
            if let Some((at, name)) = below.and_then(address) {
                listing.entry(at).or_default().insert(name.to_owned(), object.size);
            }
        }
        Ok(listing)
    }

    /// An object, whole.
    pub async fn get(&self, at: At, name: &str) -> Result<Bytes, CheckpointError> {
        let object = self.object(at, name)?;
        let found = self.store.get(&object.path).await.map_err(failed("read", &object.url))?;
        if found.meta.size > SMALL_BYTES_MAX {
            let why = format!("expected at most {SMALL_BYTES_MAX} bytes, found {}", found.meta.size);
            return Err(CheckpointError::Store { operation: "read", url: object.url, why, again: false });
        }
        found.bytes().await.map_err(failed("read", &object.url))
    }

    pub async fn put(&self, at: At, name: &str, bytes: Bytes) -> Result<(), CheckpointError> {
        let object = self.object(at, name)?;
        self.store.put(&object.path, bytes.into()).await.map(|_| ()).map_err(failed("write", &object.url))
    }

    /// Deletes an object, content with one that is not there.
    pub async fn delete(&self, at: At, name: &str) -> Result<(), CheckpointError> {
        let object = self.object(at, name)?;
        match self.store.delete(&object.path).await {
            Err(Error::NotFound { .. }) => Ok(()),
            other => other.map_err(failed("delete", &object.url)),
        }
    }
}

/// Which copy an object belongs to, and its name in it.
fn address(below: &str) -> Option<(At, &str)> {
    let parts: Vec<&str> = below.split('/').collect();
    let (seat, step, name) = match parts[..] {
        [step, name] => (Seat::Shared, step, name),
        [machine, step, name] => (Seat::Machine(layout::machine_of(machine)?), step, name),
        _ => return None,
    };
    Some((At { step: layout::step_of(step)?, seat }, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_copies_and_back() {
        let run = Place::parse("s3://bucket/runs/a").unwrap();
        for seat in [Seat::Shared, Seat::Machine(0), Seat::Machine(12_345)] {
            let at = At { step: 7, seat };
            let place = at.below(&run);
            assert_eq!(At::of(&place), Some((run.clone(), at)));
            let below = place.to_string().replace("s3://bucket/runs/a/", "") + "/rank-0000.safetensors";
            assert_eq!(address(&below), Some((at, "rank-0000.safetensors")));
        }
        for other in [
            "",
            "notes.txt",
            "step-1/x",
            "step-00000001",
            "a/step-00000001/x",
            "step-00000001/x/y",
            "machine-1/step-00000001/x",
        ] {
            assert_eq!(address(other), None, "{other}");
        }
        assert_eq!(At::of(&run), None);
    }
}
