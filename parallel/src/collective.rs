//! Elementary collective operations on sub-groups of the ranks, blocking, for the training thread.
//!
//! Tensor and pipeline parallelism call them inside forward and backward closures, while the gradient engine streams
//! over the same transport. [`Mailbox::sink`] divides what comes in between the two.
//!
//! - [`call`]: what all members must agree on; [`message`]: how it travels, drawn in the file.
//! - `element`: the types of elements, and how they are reduced.
//! - `sub_group`: the operations; `turn`: one call under way.
//! - `mailbox`: where messages wait; who is at another call is found there.
//! - `error`: why an operation cannot be completed.
//!
//! Messages go directly from member to member, and nothing is encoded on the way. A rank is ahead of another by one
//! operation of a sub-group at the most: to leave an operation, a member that reduces, gathers or gives needs a message
//! of every member, and a member that only takes one of the root. So what waits in a mailbox is bounded by two calls, but
//! for sends, which leave at once: more than [`KEPT_BYTES_MAX`] from one rank is an error.
//!
//! All members call the same operations of a sub-group in the same order, from one thread at a time. No operation has
//! a clock. Whoever waits says for what in its [`Progress`](crate::progress::Progress), and the coordinator decides who is
//! dead; a loss, an abort, and a member at another call end every wait.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use self::call::{Call, Dtype, Operation, Reduction};
pub use self::element::Element;
pub use self::error::CollectiveError;
pub use self::mailbox::{KEPT_BYTES_MAX, Mailbox, Place};
pub use self::sub_group::SubGroup;
use crate::transport::Transport;

pub mod call;
mod element;
mod error;
mod mailbox;
pub mod message;
mod sub_group;
mod turn;

/// How elements are cut on their way. The same on all ranks.
#[derive(Clone, Copy, Debug)]
struct Cuts {
    /// A piece: small enough that reducing begins early, large enough that its header and its wake-up cost nothing.
    piece_bytes: usize,
    /// Up to here an all-reduce is one exchange between all and not two: the second would cost more than it saves.
    direct_bytes_max: usize,
}

const CUTS: Cuts = Cuts { piece_bytes: 1 << 20, direct_bytes_max: 16 << 10 };

/// One rank's collective operations.
#[derive(Clone)]
pub struct Collectives(Arc<Shared>);

struct Shared {
    mailbox: Mailbox,
    transport: Arc<dyn Transport>,
    cuts: Cuts,
    /// Whether the other ranks were told of a fault that this one saw.
    has_refused: AtomicBool,
    /// By members: two handles of the same sub-group count together.
    turns: Mutex<HashMap<Vec<usize>, Arc<Mutex<Turns>>>>,
}

/// How many operations of a sub-group there have been; sends by the other member.
#[derive(Debug)]
struct Turns {
    next: u64,
    sent: Vec<u64>,
    received: Vec<u64>,
}

impl fmt::Debug for Collectives {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collectives").field("place", &self.0.mailbox.place()).finish_non_exhaustive()
    }
}

impl Collectives {
    /// The operations of the rank whose messages go into this mailbox.
    #[must_use]
    pub fn new(mailbox: Mailbox, transport: Arc<dyn Transport>) -> Self {
        Self::cut(mailbox, transport, CUTS)
    }

    fn cut(mailbox: Mailbox, transport: Arc<dyn Transport>, cuts: Cuts) -> Self {
        Self(Arc::new(Shared {
            mailbox,
            transport,
            cuts,
            has_refused: AtomicBool::new(false),
            turns: Mutex::default(),
        }))
    }

    /// The sub-group of these ranks, in whatever order they are given. This rank is one of them.
    ///
    /// # Errors
    /// This rank is not among them, one is there twice, or there is no such rank.
    pub fn sub_group(&self, ranks: &[usize]) -> Result<SubGroup, CollectiveError> {
        let mut members = ranks.to_vec();
        members.sort_unstable();
        let Place { rank, ranks, .. } = self.0.mailbox.place();
        let is_set = members.windows(2).all(|pair| pair[0] < pair[1]) && members.iter().all(|&member| member < ranks);
        let Some(index) = members.iter().position(|&member| member == rank).filter(|_| is_set) else {
            return Err(CollectiveError::Call {
                what: format!(
                    "a sub-group {members:?}: expected different ranks below {ranks}, rank {rank} among them"
                ),
            });
        };
        let bytes: Vec<u8> = members.iter().flat_map(|&member| (member as u32).to_le_bytes()).collect();
        let [a, b, c, d, e, f, g, h, ..] = *blake3::hash(&bytes).as_bytes();
        let counts = vec![0; members.len()];
        let turns = Turns { next: 0, sent: counts.clone(), received: counts };
        let turns = lock(&self.0.turns).entry(members.clone()).or_insert_with(|| Arc::new(Mutex::new(turns))).clone();
        let id = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        Ok(SubGroup { shared: self.0.clone(), members: members.into(), index, id, turns })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
