//! A disk that is written to no faster than so many bytes a second.

use std::fmt::Debug;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::watched::{Watch, Watched};
use super::{Disk, DiskFile};

/// Time as the pace needs it: the system's, or a test's.
pub trait Clock: Send + Sync + Debug {
    /// Time since some fixed moment.
    fn now(&self) -> Duration;

    /// Lets so much time pass.
    fn sleep(&self, time: Duration);
}

/// The system's clock.
#[derive(Debug)]
pub struct SystemClock(Instant);

impl Default for SystemClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// Sleeps are cut into pieces of this length, so that a limit that is lifted is noticed soon.
const SLEEP_MAX: Duration = Duration::from_millis(20);

/// Bytes that are written at once, so that a small limit is kept within a second too.
const PIECE: usize = 1 << 18;

/// A limit that may be changed, or lifted, while somebody writes, and what was written and read so far.
#[derive(Debug, Default)]
pub struct Limit {
    bytes_per_s_max: AtomicU64,
    moved_bytes: AtomicU64,
}

impl Limit {
    /// Sets it, from this moment on; 0 is no limit.
    pub fn set(&self, bytes_per_s_max: u64) {
        self.bytes_per_s_max.store(bytes_per_s_max, Ordering::SeqCst);
    }

    /// Bytes of all files so far, written and read.
    pub fn moved_bytes(&self) -> u64 {
        self.moved_bytes.load(Ordering::SeqCst)
    }

    /// When bytes that begin to be written at `now` have had their time.
    fn due(&self, now: Duration, bytes: usize) -> Duration {
        match self.bytes_per_s_max.load(Ordering::SeqCst) {
            0 => now,
            limit => now + Duration::from_secs_f64(bytes as f64 / limit as f64),
        }
    }
}

/// Holds files back so that they take no more bytes a second than the limit says. Time in which nothing is written is not
/// saved up.
#[derive(Debug)]
pub struct Pace {
    limit: Arc<Limit>,
    clock: Arc<dyn Clock>,
}

/// A disk that is held back.
pub fn paced(inner: Arc<dyn Disk>, limit: Arc<Limit>, clock: Arc<dyn Clock>) -> Watched<Pace> {
    Watched::new(inner, Pace { limit, clock })
}

impl Watch for Pace {
    fn write(&self, file: &mut dyn DiskFile, bytes: &[u8]) -> io::Result<()> {
        for piece in bytes.chunks(PIECE) {
            let begun = self.clock.now();
            file.write_all(piece)?;
            self.limit.moved_bytes.fetch_add(piece.len() as u64, Ordering::SeqCst);
            loop {
                // Asked each time: the limit may have been lifted meanwhile.
                let (now, due) = (self.clock.now(), self.limit.due(begun, piece.len()));
                if now >= due {
                    break;
                }
                self.clock.sleep((due - now).min(SLEEP_MAX));
            }
        }
        Ok(())
    }

    fn reading(&self, file: Box<dyn Read + Send>) -> Box<dyn Read + Send> {
        Box::new(Counted { file, limit: Arc::clone(&self.limit) })
    }
}

/// A file of which what is read counts.
struct Counted {
    file: Box<dyn Read + Send>,
    limit: Arc<Limit>,
}

impl Read for Counted {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(into)?;
        self.limit.moved_bytes.fetch_add(count as u64, Ordering::SeqCst);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Mutex;

    use super::*;
    use crate::SimulatedDisk;

    /// A clock that stands still but for sleeps, and lifts `limit` once it has come to `lift_at`.
    #[derive(Debug)]
    struct Forged {
        now: Mutex<Duration>,
        limit: Arc<Limit>,
        lift_at: Duration,
    }

    impl Clock for Forged {
        fn now(&self) -> Duration {
            *self.now.lock().unwrap()
        }

        fn sleep(&self, time: Duration) {
            assert!(time <= SLEEP_MAX);
            let mut now = self.now.lock().unwrap();
            *now += time;
            if *now >= self.lift_at {
                self.limit.set(0);
            }
        }
    }

    /// Seconds of the forged clock that two writes of `bytes` take, with an hour between them.
    fn seconds(bytes_per_s_max: u64, bytes: usize, lift_at_s: f64) -> f64 {
        let limit = Arc::new(Limit::default());
        limit.set(bytes_per_s_max);
        let (now, lift_at) = (Mutex::new(Duration::ZERO), Duration::from_secs_f64(lift_at_s));
        let clock = Arc::new(Forged { now, limit: Arc::clone(&limit), lift_at });
        let simulated = SimulatedDisk::new();
        let paced = paced(Arc::new(simulated.clone()), limit, Arc::clone(&clock) as Arc<dyn Clock>);
        let mut file = paced.create(Path::new("/file")).unwrap();
        file.write_all(&vec![1; bytes]).unwrap();
        let first = clock.now().as_secs_f64();
        *clock.now.lock().unwrap() += Duration::from_secs(3600);
        file.write_all(&vec![2; bytes]).unwrap();
        assert_eq!(simulated.size(Path::new("/file")).unwrap(), 2 * bytes as u64);
        first + (clock.now().as_secs_f64() - first - 3600.0)
    }

    #[test]
    fn writes_take_the_time_of_the_limit_and_idle_time_is_not_saved_up() {
        let never = 1e6;
        for (limit, bytes) in [(1_000_000, 3_000_000), (100, 7), (10_000_000, 1 << 20)] {
            let (expected, found) = (2.0 * bytes as f64 / limit as f64, seconds(limit, bytes, never));
            assert!((found - expected).abs() < 1e-6, "{bytes} bytes at {limit} a second: {found} s");
        }
        assert_eq!(seconds(0, 3_000_000, never), 0.0, "0 is no limit");
    }

    #[test]
    fn what_is_written_and_read_counts_for_whoever_asks_whether_it_gets_on() {
        let (limit, path) = (Arc::new(Limit::default()), Path::new("/file"));
        let paced = paced(Arc::new(SimulatedDisk::new()), limit.clone(), Arc::new(SystemClock::default()));
        paced.create(path).unwrap().write_all(&[1; 1000]).unwrap();
        assert_eq!(limit.moved_bytes(), 1000);
        assert_eq!((paced.read(path).unwrap().len(), limit.moved_bytes()), (1000, 2000));
    }

    #[test]
    fn a_limit_that_is_lifted_ends_the_sleep_at_hand() {
        let found = seconds(10, 3_000_000, 2.0);
        assert!((2.0..2.1).contains(&found), "{found} s");
    }
}
