//! One call under way: pieces go to members and come from them.

use std::ops::Range;

use bytes::Bytes;

use super::SubGroup;
use super::call::{Call, Reduction};
use super::element::Element;
use super::error::CollectiveError;
use super::mailbox::Wait;
use super::message::{Body, Leg, Message, REFUSAL_BYTES_MAX, write_piece};

/// One call under way. Members are counted in rank order.
pub(super) struct Turn<'a> {
    pub(super) group: &'a SubGroup,
    pub(super) call: Call,
}

impl Turn<'_> {
    /// All members but this one, the next one first: at every moment each member is sent to by one other.
    pub(super) fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (own, members) = (self.group.index(), self.group.members().len());
        (1..members).map(move |k| (own + k) % members)
    }

    /// Sends elements to one member.
    pub(super) fn give<E: Element>(&self, to: usize, leg: Leg, elements: &[E]) {
        for piece in self.pieces::<E>(elements.len()) {
            self.send(to, self.piece(leg, piece.start, &elements[piece]));
        }
    }

    /// Sends the same elements to all other members.
    pub(super) fn give_all<E: Element>(&self, leg: Leg, elements: &[E]) {
        for piece in self.pieces::<E>(elements.len()) {
            self.give_piece(leg, piece.start, &elements[piece]);
        }
    }

    /// Waits for what one member sends.
    pub(super) fn take<E: Element>(&self, from: usize, leg: Leg, into: &mut [E]) -> Result<(), CollectiveError> {
        for piece in self.pieces::<E>(into.len()) {
            let bytes = self.receive::<E>(from, leg, &piece)?;
            into[piece].iter_mut().zip(E::read(&bytes)).for_each(|(element, came)| *element = came);
        }
        Ok(())
    }

    /// Reduces `own` with what the other members send, in rank order whatever the order of arrival; calls `done` with
    /// where a piece begins and the piece, as soon as it is reduced.
    pub(super) fn reduce<E: Element>(
        &self,
        reduction: Reduction,
        own: &mut [E],
        mut done: impl FnMut(usize, &[E]),
    ) -> Result<(), CollectiveError> {
        let members = self.group.members().len();
        if members == 1 {
            return Ok(());
        }
        let mut wide: Vec<E::Wide> = Vec::new();
        for piece in self.pieces::<E>(own.len()) {
            wide.clear();
            for member in 0..members {
                if member == self.group.index() {
                    fold(&mut wide, reduction, own[piece.clone()].iter().copied());
                } else {
                    let bytes = self.receive::<E>(member, Leg::In, &piece)?;
                    fold(&mut wide, reduction, E::read(&bytes));
                }
            }
            own[piece.clone()].iter_mut().zip(&wide).for_each(|(element, wide)| *element = E::narrow(*wide));
            done(piece.start, &own[piece]);
        }
        Ok(())
    }

    /// Sends a piece to all other members.
    pub(super) fn give_piece<E: Element>(&self, leg: Leg, offset: usize, elements: &[E]) {
        let message = self.piece(leg, offset, elements);
        self.others().for_each(|to| self.send(to, message.clone()));
    }

    /// Tells every rank of the run why this one gives up, so that none waits for it.
    pub(super) fn refuse(&self, error: &CollectiveError) {
        let place = self.group.mailbox().place();
        let mut what = error.to_string();
        what.truncate(what.floor_char_boundary(REFUSAL_BYTES_MAX));
        let message = Message { call: self.call.clone(), body: Body::Refusal(what) }.write();
        let others = (1..place.ranks).map(|k| (place.rank + k) % place.ranks);
        others.for_each(|to| self.group.transport().send(to, message.clone()));
    }

    /// How elements are cut on their way. No elements are one piece: a message tells the call.
    fn pieces<E: Element>(&self, elements: usize) -> impl Iterator<Item = Range<usize>> + use<E> {
        let each = self.group.cuts().piece_bytes / E::DTYPE.bytes();
        let starts = (0..elements.max(1)).step_by(each);
        starts.map(move |start| start..(start + each).min(elements))
    }

    fn piece<E: Element>(&self, leg: Leg, offset: usize, elements: &[E]) -> Bytes {
        write_piece(&self.call, leg, offset as u64, size_of_val(elements), |out| E::write(elements, out))
    }

    fn send(&self, to: usize, message: Bytes) {
        self.group.transport().send(self.group.members()[to], message);
    }

    fn receive<E: Element>(&self, from: usize, leg: Leg, due: &Range<usize>) -> Result<Bytes, CollectiveError> {
        let (members, mailbox) = (self.group.members(), self.group.mailbox());
        let from = members[from];
        let piece = mailbox.wait(&Wait { call: &self.call, from, members })?;
        assert_eq!(piece.call, self.call, "the mailbox has compared them");
        let bytes = due.len() * E::DTYPE.bytes();
        if (piece.leg, piece.offset, piece.bytes.len()) != (leg, due.start as u64, bytes) {
            let at = |leg, offset, bytes| format!("{}, {bytes} bytes from element {offset} on, {leg:?}", self.call);
            let there = at(piece.leg, piece.offset, piece.bytes.len());
            let fault = mailbox.disagreement(at(leg, due.start as u64, bytes), from, there);
            mailbox.fail(fault.clone());
            return Err(fault);
        }
        Ok(piece.bytes)
    }
}

/// The first elements are taken as they are, so that nothing is added to them.
fn fold<E: Element>(wide: &mut Vec<E::Wide>, reduction: Reduction, elements: impl Iterator<Item = E>) {
    if wide.is_empty() {
        wide.extend(elements.map(E::widen));
    } else {
        let reduce = |(wide, element): (&mut E::Wide, E)| *wide = E::reduce(reduction, *wide, element.widen());
        wide.iter_mut().zip(elements).for_each(reduce);
    }
}
