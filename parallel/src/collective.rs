//! Elementary collective operations on sub-groups of the ranks, blocking, for the training thread.
//!
//! Tensor and pipeline parallelism call them inside forward and backward closures, while the gradient engine streams
//! over the same transport. [`Mailbox::sink`] divides what comes in between the two.
//!
//! - `call`: what all members must agree on; [`message`]: how it travels, drawn in the file.
//! - `element`: the types of elements, and how they are reduced.
//! - `mailbox`: where messages wait; who is at another call is found there. `turn`: one call under way.
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
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use self::call::{Call, Dtype, Operation, Reduction};
pub use self::element::Element;
pub use self::error::CollectiveError;
pub use self::mailbox::{KEPT_BYTES_MAX, Mailbox, Place};
use self::message::{Leg, SITE_BYTES_MAX};
use self::turn::Turn;
use crate::transport::Transport;

pub mod call;
mod element;
mod error;
mod mailbox;
pub mod message;
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

/// Some of the ranks, this one among them, that work together. Its operations block until this member's part is done.
///
/// Blocks of elements are in rank order. `site` says where in the program a call is, as in
/// "model.layers.3.self_attn.o_proj/forward", the same on all members, at most [`SITE_BYTES_MAX`] bytes.
///
/// Every operation fails with [`CollectiveError`]: `Call` before anything is sent; all others are final, and what the
/// output then holds has no meaning.
#[derive(Clone)]
pub struct SubGroup {
    shared: Arc<Shared>,
    members: Arc<[usize]>,
    index: usize,
    id: u64,
    turns: Arc<Mutex<Turns>>,
}

impl fmt::Debug for SubGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SubGroup").field("members", &self.members).field("index", &self.index).finish_non_exhaustive()
    }
}

/// What a call says of itself.
struct Asks<'a> {
    operation: Operation,
    reduction: Option<Reduction>,
    site: &'a str,
    elements: usize,
    root: usize,
}

impl SubGroup {
    /// The ranks, in order.
    #[must_use]
    pub fn members(&self) -> &[usize] {
        &self.members
    }

    /// Which of the members this rank is.
    #[must_use]
    pub const fn index(&self) -> usize {
        self.index
    }

    /// All members get rank `root`'s elements, as many as they have room for here. The root waits until all members have
    /// come, so that it is not ahead of them.
    ///
    /// # Errors
    /// See [`SubGroup`].
    pub fn broadcast<E: Element>(&self, site: &str, root: usize, values: &mut [E]) -> Result<(), CollectiveError> {
        let from = self.member(root)?;
        let asks = Asks { operation: Operation::Broadcast, reduction: None, site, elements: values.len(), root };
        self.call::<E>(&asks, values.len(), |turn| {
            if from != self.index {
                turn.give::<E>(from, Leg::In, &[]);
                return turn.take(from, Leg::Out, values);
            }
            turn.give_all(Leg::Out, values);
            turn.others().try_for_each(|member| turn.take::<E>(member, Leg::In, &mut []))
        })
    }

    /// All members get the reduction of all members' elements, the same bits on each: reduced in rank order, bf16 in f32
    /// and rounded once. Of a sub-group of one nothing changes.
    ///
    /// Each member reduces its part of the elements and sends it to all, N being the members: 2 (N - 1) / N of the
    /// elements leave each. Up to 16 KiB every member sends all to all, and all of them reduce everything.
    ///
    /// # Errors
    /// See [`SubGroup`].
    pub fn all_reduce<E: Element>(
        &self,
        site: &str,
        reduction: Reduction,
        values: &mut [E],
    ) -> Result<(), CollectiveError> {
        let (elements, members) = (values.len(), self.members.len());
        let reduces = Some(reduction);
        let asks = Asks { operation: Operation::AllReduce, reduction: reduces, site, elements, root: 0 };
        if size_of_val(values) <= self.cuts().direct_bytes_max {
            return self.call::<E>(&asks, elements, |turn| {
                turn.give_all(Leg::In, values);
                turn.reduce(reduction, values, |_, _| {})
            });
        }
        let share = |member: usize| elements * member / members..elements * (member + 1) / members;
        self.call::<E>(&asks, elements.div_ceil(members), |turn| {
            turn.others().for_each(|member| turn.give(member, Leg::In, &values[share(member)]));
            let own = &mut values[share(self.index)];
            turn.reduce(reduction, own, |offset, piece| turn.give_piece(Leg::Out, offset, piece))?;
            turn.others().try_for_each(|member| turn.take(member, Leg::Out, &mut values[share(member)]))
        })
    }

    /// All members get the elements of all: block `i` of `output` is member `i`'s `input`.
    ///
    /// # Errors
    /// See [`SubGroup`].
    pub fn all_gather<E: Element>(&self, site: &str, input: &[E], output: &mut [E]) -> Result<(), CollectiveError> {
        self.fits("output", output.len(), input.len())?;
        let asks = Asks { operation: Operation::AllGather, reduction: None, site, elements: input.len(), root: 0 };
        self.call::<E>(&asks, input.len(), |turn| {
            turn.give_all(Leg::Out, input);
            output[block(self.index, input.len())].copy_from_slice(input);
            turn.others().try_for_each(|from| turn.take(from, Leg::Out, &mut output[block(from, input.len())]))
        })
    }

    /// Member `i` gets the reduction of all members' blocks `i`, reduced as in [`all_reduce`](Self::all_reduce).
    ///
    /// # Errors
    /// See [`SubGroup`].
    pub fn reduce_scatter<E: Element>(
        &self,
        site: &str,
        reduction: Reduction,
        input: &[E],
        output: &mut [E],
    ) -> Result<(), CollectiveError> {
        let elements = output.len();
        self.fits("input", input.len(), elements)?;
        let reduces = Some(reduction);
        let asks = Asks { operation: Operation::ReduceScatter, reduction: reduces, site, elements, root: 0 };
        self.call::<E>(&asks, elements, |turn| {
            turn.others().for_each(|to| turn.give(to, Leg::In, &input[block(to, elements)]));
            output.copy_from_slice(&input[block(self.index, elements)]);
            turn.reduce(reduction, output, |_, _| {})
        })
    }

    /// Block `i` of `input` goes to member `i`, and block `i` of `output` comes from it.
    ///
    /// # Errors
    /// See [`SubGroup`].
    pub fn all_to_all<E: Element>(&self, site: &str, input: &[E], output: &mut [E]) -> Result<(), CollectiveError> {
        let elements = input.len() / self.members.len();
        self.fits("input", input.len(), elements)?;
        self.fits("output", output.len(), elements)?;
        let asks = Asks { operation: Operation::AllToAll, reduction: None, site, elements, root: 0 };
        self.call::<E>(&asks, elements, |turn| {
            turn.others().for_each(|to| turn.give(to, Leg::Out, &input[block(to, elements)]));
            output[block(self.index, elements)].copy_from_slice(&input[block(self.index, elements)]);
            turn.others().try_for_each(|from| turn.take(from, Leg::Out, &mut output[block(from, elements)]))
        })
    }

    /// Nobody leaves before all members have come.
    ///
    /// # Errors
    /// See [`SubGroup`].
    pub fn barrier(&self, site: &str) -> Result<(), CollectiveError> {
        let asks = Asks { operation: Operation::Barrier, reduction: None, site, elements: 0, root: 0 };
        self.call::<u8>(&asks, 0, |turn| {
            turn.give_all::<u8>(Leg::Out, &[]);
            turn.others().try_for_each(|from| turn.take::<u8>(from, Leg::Out, &mut []))
        })
    }

    /// Sends elements to rank `to` and does not wait. They lie there until they are [received](Self::receive).
    ///
    /// # Errors
    /// See [`SubGroup`].
    pub fn send<E: Element>(&self, site: &str, to: usize, values: &[E]) -> Result<(), CollectiveError> {
        let to = self.other_member(to)?;
        let asks = Asks { operation: Operation::Send, reduction: None, site, elements: values.len(), root: 0 };
        let mut turns = lock(&self.turns);
        self.run::<E>(&asks, values.len(), &mut turns.sent[to], |turn| {
            turn.give(to, Leg::Out, values);
            Ok(())
        })
    }

    /// Waits for what rank `from` [sends](Self::send), at the same site.
    ///
    /// # Errors
    /// See [`SubGroup`].
    pub fn receive<E: Element>(&self, site: &str, from: usize, values: &mut [E]) -> Result<(), CollectiveError> {
        let from = self.other_member(from)?;
        let asks = Asks { operation: Operation::Send, reduction: None, site, elements: values.len(), root: 0 };
        let mut turns = lock(&self.turns);
        self.run::<E>(&asks, values.len(), &mut turns.received[from], |turn| turn.take(from, Leg::Out, values))
    }

    /// A call of all members. `part` is how many elements of one member it brings on a leg at the most.
    fn call<E: Element>(
        &self,
        asks: &Asks<'_>,
        part: usize,
        does: impl FnOnce(&Turn<'_>) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        self.run::<E>(asks, part, &mut lock(&self.turns).next, does)
    }

    fn run<E: Element>(
        &self,
        asks: &Asks<'_>,
        part: usize,
        sequence: &mut u64,
        does: impl FnOnce(&Turn<'_>) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        let Asks { operation, reduction, site, elements, root } = *asks;
        let (bytes, max, site_bytes) = (part * E::DTYPE.bytes(), self.mailbox().part_bytes_max(), site.len());
        if bytes > max || site_bytes > SITE_BYTES_MAX {
            let (name, bound) =
                (operation.name(), format!("at most {max} bytes of a rank and {SITE_BYTES_MAX} of a site"));
            let what =
                format!("{name} of {site}: {bytes} bytes of a rank and {site_bytes} of a site, expected {bound}");
            return Err(CollectiveError::Call { what });
        }
        let call = Call {
            operation,
            dtype: E::DTYPE,
            reduction,
            epoch: self.mailbox().place().epoch,
            group: self.id,
            sequence: *sequence,
            elements: elements as u64,
            root: root as u32,
            site: site.to_owned(),
        };
        *sequence += 1;
        let turn = Turn { group: self, call };
        self.mailbox().check().and_then(|()| does(&turn)).inspect_err(|error| {
            if error.is_news() && !self.shared.has_refused.swap(true, Ordering::Relaxed) {
                turn.refuse(error);
            }
        })
    }

    fn member(&self, rank: usize) -> Result<usize, CollectiveError> {
        let what = || format!("rank {rank} is no member of the sub-group {:?}", self.members);
        self.members.iter().position(|&member| member == rank).ok_or_else(|| CollectiveError::Call { what: what() })
    }

    fn other_member(&self, rank: usize) -> Result<usize, CollectiveError> {
        let itself = || CollectiveError::Call { what: format!("rank {rank} sends nothing to itself") };
        self.member(rank).and_then(|member| if member == self.index { Err(itself()) } else { Ok(member) })
    }

    fn fits(&self, which: &str, found: usize, each: usize) -> Result<(), CollectiveError> {
        let members = self.members.len();
        if found == each * members {
            return Ok(());
        }
        let what = format!("an {which} of {found} elements, expected {each} of each of {members} members");
        Err(CollectiveError::Call { what })
    }

    fn mailbox(&self) -> &Mailbox {
        &self.shared.mailbox
    }

    fn transport(&self) -> &dyn Transport {
        &*self.shared.transport
    }

    fn cuts(&self) -> Cuts {
        self.shared.cuts
    }
}

fn block(member: usize, elements: usize) -> std::ops::Range<usize> {
    member * elements..(member + 1) * elements
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
