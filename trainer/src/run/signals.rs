//! SIGINT and SIGTERM: the first asks the run to stop after its step and to write a checkpoint within the grace, the
//! second ends the process at once. Nothing is half-written either way: a checkpoint exists from its rename on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::log::say;

/// The exit code of a run that was asked to stop, or that lost a peer: try again.
pub const TRY_AGAIN: u8 = 75;

/// Whether somebody asked the run to stop.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Whether it was asked.
    #[must_use]
    pub fn asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Starts to listen. `grace_s` after the first signal the process ends, whatever it is doing.
    ///
    /// # Errors
    /// The system refuses a handler or a thread.
    pub fn on_signals(grace_s: f64) -> std::io::Result<Self> {
        let stop = Self::default();
        let asked = stop.0.clone();
        let mut signals =
            signal_hook::iterator::Signals::new([signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM])?;
        let listen = move || {
            for signal in signals.forever() {
                if asked.swap(true, Ordering::Relaxed) {
                    say("a second signal: stopping at once, without a checkpoint");
                    std::process::exit(i32::from(TRY_AGAIN));
                }
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_secs_f64(grace_s));
                    say(&format!("not done after {grace_s} s (checkpoint.grace_s): stopping as it is"));
                    std::process::exit(i32::from(TRY_AGAIN));
                });
                let name = if signal == signal_hook::consts::SIGINT { "SIGINT" } else { "SIGTERM" };
                say(&format!("{name}: stopping after this step and writing a checkpoint, at most {grace_s} s"));
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(listen)?;
        Ok(stop)
    }
}
