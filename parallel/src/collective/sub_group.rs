//! The operations of a sub-group.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use super::call::{Call, Operation, Reduction};
use super::element::Element;
use super::error::CollectiveError;
use super::mailbox::Mailbox;
use super::message::{Leg, SITE_BYTES_MAX};
use super::turn::Turn;
use super::{Cuts, Shared, Turns, lock};
use crate::transport::Transport;

/// Some of the ranks, this one among them, that work together. Its operations block until this member's part is done.
///
/// Blocks of elements are in rank order. `site` says where in the program a call is, as in
/// "model.layers.3.self_attn.o_proj/forward", the same on all members, at most [`SITE_BYTES_MAX`] bytes.
///
/// Every operation fails with [`CollectiveError`]: `Call` before anything is sent; all others are final, and what the
/// output then holds has no meaning.
#[derive(Clone)]
pub struct SubGroup {
    pub(super) shared: Arc<Shared>,
    pub(super) members: Arc<[usize]>,
    pub(super) index: usize,
    pub(super) id: u64,
    pub(super) turns: Arc<Mutex<Turns>>,
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
        self.mailbox().progress().collective(call.to_string());
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

    pub(super) fn mailbox(&self) -> &Mailbox {
        &self.shared.mailbox
    }

    pub(super) fn transport(&self) -> &dyn Transport {
        &*self.shared.transport
    }

    pub(super) fn cuts(&self) -> Cuts {
        self.shared.cuts
    }
}

pub(super) fn block(member: usize, elements: usize) -> Range<usize> {
    member * elements..(member + 1) * elements
}
