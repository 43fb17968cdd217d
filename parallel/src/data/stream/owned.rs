//! What owners send of parameters, where these travel in place of sums.

use compression::Codec;

use super::GradientStream;

impl GradientStream {
    /// What a parameter travels in from its owners; `None` where its sum does.
    #[must_use]
    pub fn parameter_codec(&self, index: usize) -> Option<Codec> {
        self.engine.as_ref().and_then(|engine| engine.exchange().parameter_codec(index))
    }

    /// Gives `with` the place of this rank's shard of parameter `index`: first it holds the shard's sum, then what is to be
    /// [published](Self::publish). To be called where parameters travel, after the [vote](Self::vote).
    ///
    /// # Panics
    /// With one rank.
    pub fn with_own<R>(&self, index: usize, with: impl FnOnce(&mut [f32]) -> R) -> R {
        let engine = self.engine.as_ref().expect("with one rank there are no shards");
        with(engine.exchange().own_mut(index))
    }

    /// Sends this rank's shard of parameter `index` to all. A step whose verdict was to commit sends every parameter once.
    pub fn publish(&self, index: usize) {
        if let Some(engine) = &self.engine {
            engine.publish(index);
        }
    }
}
