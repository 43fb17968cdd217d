//! Ends what a rank waits for once nothing has moved for long: there is no coordinator here that would.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parallel::data::engine::Aborter;
use parallel::progress::Progress;

/// Nothing moves for so long; twice what a plain copy may take that stands still, for which another rank may wait.
const STILL: Duration = Duration::from_secs(2 * 60);
const LOOK: Duration = Duration::from_secs(1);

/// A thread that looks on until it is dropped.
#[derive(Debug)]
pub(super) struct Watch {
    paused: Arc<AtomicBool>,
    over: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Begins to look at what an engine does that writes down its progress there.
    pub(super) fn begin(progress: Arc<Progress>, aborter: Aborter) -> std::io::Result<Self> {
        let paused = Arc::<AtomicBool>::default();
        let (over, quit) = channel();
        let theirs = paused.clone();
        let work = move || {
            let (start, mut stillness) = (Instant::now(), Stillness::default());
            while let Err(RecvTimeoutError::Timeout) = quit.recv_timeout(LOOK) {
                let mark = progress.mark();
                if stillness.look(start.elapsed(), mark.count, theirs.load(Ordering::SeqCst)) > STILL {
                    let seconds = STILL.as_secs();
                    let why =
                        format!("nothing has come from the other ranks for {seconds} s (this one: {})", mark.text);
                    return aborter.abort(&why);
                }
            }
        };
        let thread = std::thread::Builder::new().name("watch".into()).spawn(work)?;
        Ok(Self { paused, over: Some(over), thread: Some(thread) })
    }

    /// Does something that has a limit of its own, and nothing for the engine.
    pub(super) fn pausing<T>(&self, act: impl FnOnce() -> T) -> T {
        self.paused.store(true, Ordering::SeqCst);
        let done = act();
        self.paused.store(false, Ordering::SeqCst);
        done
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over = None;
        self.thread.take().map(JoinHandle::join);
    }
}

/// Since when nothing has moved.
#[derive(Debug, Default)]
struct Stillness {
    count: u64,
    since: Duration,
}

impl Stillness {
    /// How long nothing has moved, at a time that is counted from the start.
    const fn look(&mut self, now: Duration, count: u64, paused: bool) -> Duration {
        if count != self.count || paused {
            *self = Self { count, since: now };
        }
        now.saturating_sub(self.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_and_what_is_paused_is_not_still() {
        let mut stillness = Stillness::default();
        let mut look = |second, count, paused| stillness.look(Duration::from_secs(second), count, paused).as_secs();
        assert_eq!([look(3, 0, false), look(5, 1, false), look(6, 1, false), look(9, 1, false)], [3, 0, 1, 4]);
        assert_eq!([look(10, 1, true), look(90, 1, true), look(91, 1, false), look(92, 2, false)], [0, 0, 1, 0]);
    }
}
