//! For tests: a simulated disk with a closure before every sync, every rename and every new folder.

use std::fmt::{self, Debug};
use std::sync::Arc;

use super::SimulatedDisk;
pub use super::watched::{Call, Fate};
use super::watched::{Watch, Watched};

/// The closure. It may block or panic.
pub struct Hook<F>(F);

impl<F> Debug for Hook<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hook").finish_non_exhaustive()
    }
}

impl<F: Fn(Call) -> Fate + Send + Sync> Watch for Hook<F> {
    fn before(&self, call: Call) -> Fate {
        (self.0)(call)
    }
}

/// `inner`, with `hook` asked first.
pub fn hooked<F: Fn(Call) -> Fate + Send + Sync>(inner: &SimulatedDisk, hook: F) -> Arc<Watched<Hook<F>>> {
    Arc::new(Watched::new(Arc::new(inner.clone()), Hook(hook)))
}
