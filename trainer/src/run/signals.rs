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

/// How signals are taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Manner {
    /// Seconds after the first signal in which the process ends, whatever it is doing.
    pub grace_s: f64,
    /// Whether a second signal ends it at once. Not where a launcher passes on a signal that may have come here too.
    pub second_ends: bool,
}

impl Stop {
    /// Whether it was asked.
    #[must_use]
    pub fn asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Asks.
    pub fn ask(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Starts to listen. Before the process is ended by a second signal or after its grace, it does what `before` says.
    ///
    /// # Errors
    /// The system refuses a handler or a thread.
    pub fn listen(&self, manner: Manner, before: impl Fn() + Clone + Send + 'static) -> std::io::Result<()> {
        let Manner { grace_s, second_ends } = manner;
        let stop = self.clone();
        let mut signals =
            signal_hook::iterator::Signals::new([signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM])?;
        let listen = move || {
            let mut first = true;
            for signal in signals.forever() {
                if !std::mem::take(&mut first) {
                    if second_ends {
                        say("a second signal: stopping at once, without a checkpoint");
                        before();
                        std::process::exit(i32::from(TRY_AGAIN));
                    }
                    continue;
                }
                stop.ask();
                let late = before.clone();
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_secs_f64(grace_s));
                    say(&format!("not done after {grace_s} s (checkpoint.grace_s): stopping as it is"));
                    late();
                    std::process::exit(i32::from(TRY_AGAIN));
                });
                let name = if signal == signal_hook::consts::SIGINT { "SIGINT" } else { "SIGTERM" };
                say(&format!("{name}: stopping after this step and writing a checkpoint, at most {grace_s} s"));
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(listen)?;
        Ok(())
    }
}
