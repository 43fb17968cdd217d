//! Threads for codecs, apart from those that compute the model.

use std::sync::Arc;

use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

use crate::codec::{par_reduce, reduce};
use crate::{Codec, Found, Level, Owned, Part, Payload};

/// The threads that encode, decode and add: the caller's own, or some of a pool. The bits are the same with all.
#[derive(Clone, Debug, Default)]
pub struct Workers(Option<Arc<ThreadPool>>);

impl Workers {
    /// The caller's thread.
    #[must_use]
    pub const fn none() -> Self {
        Self(None)
    }

    /// So many threads, named `codec-0` and on; the caller's own where one is enough.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn new(threads: usize) -> Result<Self, ThreadPoolBuildError> {
        if threads <= 1 {
            return Ok(Self::none());
        }
        let pool =
            ThreadPoolBuilder::new().num_threads(threads).thread_name(|index| format!("codec-{index}")).build()?;
        Ok(Self(Some(Arc::new(pool))))
    }

    /// As [`Codec::encode`].
    ///
    /// # Panics
    /// As [`Codec::encode`].
    pub fn encode(&self, codec: Codec, values: &mut [f32], residual: &[f32], payload: &mut [u8]) -> Found {
        match &self.0 {
            None => codec.encode(values, residual, payload),
            Some(pool) => pool.install(|| codec.par_encode(values, residual, payload)),
        }
    }

    /// As [`Payload::decode`].
    ///
    /// # Panics
    /// As [`Payload::decode`].
    pub fn decode<B: AsRef<[u8]> + Sync>(&self, payload: &Payload<B>, out: &mut [f32]) {
        match &self.0 {
            None => payload.decode(out),
            Some(pool) => pool.install(|| payload.par_decode(out)),
        }
    }

    /// As [`reduce`] of `parts` into the sum, [`Codec::encode`] of that into the payload, which makes the sum the new residual, and
    /// [`Payload::decode`] of what was written: the same bits, but a piece after the other, so that what one leaves is in the
    /// first cache when the next needs it. Where something is not finite payload and decoded hold whatever they hold.
    ///
    /// # Panics
    /// When something has not the elements of the sum, or the payload has not [`Codec::payload_bytes`].
    pub fn pass_on<B: AsRef<[u8]> + Sync>(&self, parts: &[Part<'_, B>], to: Owned<'_>) -> Found {
        let (level, to) = (Level::best(), to.checked(parts));
        match &self.0 {
            None => level.pass_on(parts, 0, to),
            Some(pool) => pool.install(|| level.par_pass_on(parts, 0, to)),
        }
    }

    /// As [`reduce`].
    ///
    /// # Panics
    /// As [`reduce`].
    pub fn reduce<B: AsRef<[u8]> + Sync>(&self, parts: &[Part<'_, B>], sum: &mut [f32]) {
        match &self.0 {
            None => reduce(parts, sum),
            Some(pool) => pool.install(|| par_reduce(parts, sum)),
        }
    }
}
