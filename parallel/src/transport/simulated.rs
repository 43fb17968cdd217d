//! Ranks in one process on a network whose time passes only when somebody says so: the transport of tests of faults.
//!
//! Messages of one rank to another come in order, after the time that they take on the sender's link and a random delay;
//! those of different ranks overtake each other. A run with the same seed and the same calls is the same run.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use super::{Counted, Incoming, Sink, Transport};
use crate::frame::is_frame;

/// What a network is like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quality {
    /// The longest delay of a message; the shortest is none.
    pub delay_max: Duration,
    /// What a rank can send in a second, to all others together.
    pub bytes_per_s: f64,
}

/// A network in simulated time.
#[derive(Clone)]
pub struct Network(Arc<Mutex<Net>>);

struct Net {
    quality: Quality,
    random: Random,
    now: Duration,
    /// When each rank's link is free again.
    free: Vec<Duration>,
    links: BTreeMap<(usize, usize), Link>,
    /// What is under way, by the time of its arrival; what arrives at the same time does so in random order.
    under_way: BTreeMap<(Duration, u64), Arrival>,
    sinks: Vec<Option<Sink>>,
    counted: Vec<Counted>,
}

/// One direction between two ranks.
#[derive(Default)]
struct Link {
    /// When what was sent last arrives: nothing overtakes it.
    last: Duration,
    state: LinkState,
    damages: bool,
    /// The sender has closed in good order: its end is no loss.
    said_goodbye: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum LinkState {
    #[default]
    Up,
    /// Takes everything, and nothing arrives.
    Silent,
    /// Nothing arrives, and the receiver knows.
    Down,
}

struct Arrival {
    to: usize,
    what: Incoming,
}

/// One rank's end of a [`Network`].
pub struct SimulatedTransport {
    rank: usize,
    network: Network,
}

impl fmt::Debug for SimulatedTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimulatedTransport").field("rank", &self.rank).finish_non_exhaustive()
    }
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network").field("now", &self.lock().now).finish_non_exhaustive()
    }
}

impl Network {
    /// A network of so many ranks; each is [opened](Self::open) before the first message goes to it.
    #[must_use]
    pub fn new(ranks: usize, quality: Quality, seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Net {
            quality,
            random: Random::new(seed),
            now: Duration::ZERO,
            free: vec![Duration::ZERO; ranks],
            links: BTreeMap::new(),
            under_way: BTreeMap::new(),
            sinks: vec![None; ranks],
            counted: vec![Counted::default(); ranks],
        })))
    }

    /// One rank's end.
    #[must_use]
    pub fn end(&self, rank: usize) -> SimulatedTransport {
        SimulatedTransport { rank, network: self.clone() }
    }

    /// Says where a rank's messages go.
    pub fn open(&self, rank: usize, sink: Sink) {
        self.lock().sinks[rank] = Some(sink);
    }

    /// When the next message arrives.
    #[must_use]
    pub fn next(&self) -> Option<Duration> {
        self.lock().under_way.keys().next().map(|&(at, _)| at)
    }

    /// It is so late now: whatever has arrived until then is delivered.
    pub fn advance(&self, now: Duration) {
        self.lock().now = now;
        loop {
            // A sink may send, so nothing is held meanwhile.
            let mut net = self.lock();
            let Some(entry) = net.under_way.first_entry().filter(|entry| entry.key().0 <= now) else { return };
            let Arrival { to, what } = entry.remove();
            if let Incoming::Message { bytes, .. } = &what {
                net.counted[to].received += bytes.len() as u64;
            }
            let sink = net.sinks[to].clone();
            drop(net);
            if let Some(sink) = sink {
                sink(what);
            }
        }
    }

    /// The connections between two ranks break. Part of what is under way still arrives, then both hear of it.
    pub fn cut(&self, a: usize, b: usize, why: &str) {
        let mut net = self.lock();
        net.lose(a, b, why);
        net.lose(b, a, why);
    }

    /// What two ranks send to each other from now on is lost, and neither hears of it.
    pub fn silence(&self, a: usize, b: usize) {
        let mut net = self.lock();
        net.link(a, b).state = LinkState::Silent;
        net.link(b, a).state = LinkState::Silent;
    }

    /// A rank is no more: part of what it sent still arrives, then all others hear of it, unless it has said goodbye.
    pub fn kill(&self, rank: usize, why: &str) {
        let mut net = self.lock();
        net.sinks[rank] = None;
        for other in (0..net.sinks.len()).filter(|&other| other != rank) {
            net.lose(rank, other, why);
            net.link(other, rank).state = LinkState::Down;
        }
    }

    /// The next message from one rank to another arrives with one bit changed.
    pub fn damage(&self, from: usize, to: usize) {
        self.lock().link(from, to).damages = true;
    }

    fn lock(&self) -> MutexGuard<'_, Net> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Net {
    fn link(&mut self, from: usize, to: usize) -> &mut Link {
        self.links.entry((from, to)).or_default()
    }

    fn send(&mut self, from: usize, to: usize, mut bytes: Bytes) {
        let took = Duration::from_secs_f64(bytes.len() as f64 / self.quality.bytes_per_s);
        let left = self.free[from].max(self.now) + took;
        self.free[from] = left;
        if is_frame(&bytes) {
            self.arrive(left, from, Incoming::Left { to });
        }
        self.counted[from].sent += bytes.len() as u64;
        let at = left + self.random.duration(self.quality.delay_max);
        let bit = self.random.below(8 * bytes.len() as u64) as usize;
        let link = self.link(from, to);
        if link.state != LinkState::Up {
            return;
        }
        if std::mem::take(&mut link.damages) {
            let mut damaged = bytes.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            bytes = damaged.into();
        }
        let at = at.max(link.last + Duration::from_nanos(1));
        link.last = at;
        self.arrive(at, to, Incoming::Message { from, bytes });
    }

    /// One direction breaks at a random moment until the last of what is under way arrives.
    fn lose(&mut self, from: usize, to: usize, why: &str) {
        let now = self.now;
        let link = self.link(from, to);
        if std::mem::replace(&mut link.state, LinkState::Down) == LinkState::Down {
            return;
        }
        let (last, said_goodbye) = (link.last.max(now), link.said_goodbye);
        let at = now + self.random.duration(last - now);
        if said_goodbye {
            return;
        }
        self.under_way.retain(|&(arrives, _), arrival| {
            arrives < at
                || arrival.to != to
                || !matches!(arrival.what, Incoming::Message { from: sender, .. } if sender == from)
        });
        let delay = self.random.duration(self.quality.delay_max);
        self.arrive(at + delay, to, Incoming::Lost { rank: from, why: why.to_owned() });
    }

    fn arrive(&mut self, at: Duration, to: usize, what: Incoming) {
        let tie = self.random.next();
        self.under_way.insert((at, tie), Arrival { to, what });
    }
}

impl Transport for SimulatedTransport {
    fn send(&self, to: usize, message: Bytes) {
        self.network.lock().send(self.rank, to, message);
    }

    fn counted(&self) -> Counted {
        self.network.lock().counted[self.rank]
    }

    fn close(&self, _within: Duration) {
        let mut net = self.network.lock();
        for other in 0..net.sinks.len() {
            net.link(self.rank, other).said_goodbye = true;
        }
    }
}

/// Numbers that look random: SplitMix64 (Steele, Lea and Flood 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The same seed, the same numbers.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// A number below a bound; 0 below 0.
    pub const fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.next() % bound }
    }

    /// A time up to a longest.
    pub fn duration(&mut self, longest: Duration) -> Duration {
        Duration::from_nanos(self.below(longest.as_nanos() as u64 + 1))
    }
}
