//! A coordinator that is not heard any more.

use std::time::Duration;

use crate::coordinator::state::{SLEPT, interval, silence};

/// How long nothing has been heard of the coordinator. Times count from the beginning of the line.
#[derive(Debug)]
pub(crate) struct Silence {
    peer_timeout: Duration,
    heard: Duration,
    ticked: Duration,
}

impl Silence {
    /// The line begins.
    pub(crate) const fn new(peer_timeout: Duration) -> Self {
        Self { peer_timeout, heard: Duration::ZERO, ticked: Duration::ZERO }
    }

    /// Something came.
    pub(crate) const fn heard(&mut self, now: Duration) {
        self.heard = now;
    }

    /// To be asked with every heartbeat: what is to be said of a coordinator that has been silent for too long.
    pub(crate) fn tick(&mut self, now: Duration) -> Option<String> {
        if now.saturating_sub(self.ticked) > interval(self.peer_timeout) * SLEPT {
            // What the coordinator said meanwhile waits in the socket.
            self.heard = now;
        }
        self.ticked = now;
        let quiet = now.saturating_sub(self.heard);
        (quiet > silence(self.peer_timeout)).then(|| format!("has been silent for {:.1} s", quiet.as_secs_f64()))
    }
}
