//! What ranks left out of gradients and sums, on its way into a checkpoint and back: onto the same ranks, or folded onto
//! others.
//!
//! Rank R stores `NAME.sender.R`, of the whole tensor, and its shard of `NAME.owner`. A rank alone owns everything and
//! sends nothing. On the same ranks each takes back its own. On others all of it is folded, element by element: what the
//! owner had left out, plus what the senders had, in the order of their ranks; each new owner has its shard of that,
//! and senders start from zero.
//!
//! A checkpoint may also keep the sum alone, `NAME.folded`, each rank its shard: then even the same ranks start from that.
//!
//! Where the ranks do not all see one folder, whoever has what another rank needs sends it, one side of one tensor at a
//! time. So no rank holds more than that beside its shards.

use std::ops::Range;

use checkpoint::reader::Checkpoint;
use compression::residual::recut;
use compression::{Region, Residual, Side};
use parallel::collective::SubGroup;
use parallel::collective::message::SITE_BYTES_MAX;
use parallel::data::rules::may_be_lossy;
use parallel::data::shard::shard;
use parallel::data::{Parameter, Plan};

use super::mesh::Mesh;
use crate::error::{Error, Result};

/// Elements of a message between ranks: well below what a call may bring.
pub(super) const PART: usize = 16 << 20;

/// The tensor in which a rank's part as a sender lies.
#[must_use]
pub fn sender_name(parameter: &str, rank: usize) -> String {
    format!("{parameter}.sender.{rank:04}")
}

/// The tensor in which owners' parts lie, shard after shard.
#[must_use]
pub fn owner_name(parameter: &str) -> String {
    format!("{parameter}.owner")
}

/// The tensor in which what all sides left out lies added up, shard after shard.
#[must_use]
pub fn folded_name(parameter: &str) -> String {
    format!("{parameter}.folded")
}

/// What a checkpoint keeps of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Nothing: everything travels as it is, and was sent.
    Nothing,
    /// Every side.
    Exact,
    /// The sum.
    Folded,
}

/// What one rank of so many stores: its side as a sender, where it sends to anybody, and as an owner.
pub fn sides(rank: usize, ranks: usize) -> impl Iterator<Item = Side> {
    let sender = (ranks > 1).then_some(Side::Sender { rank });
    sender.into_iter().chain([Side::Owner])
}

/// From a checkpoint onto the ranks of a run.
pub struct Way<'a> {
    /// The run, for messages.
    pub run: &'a str,
    /// What there is in this rank's folder.
    pub checkpoint: &'a Checkpoint,
    /// The ranks that wrote it.
    pub before: &'a Mesh,
    /// Whether it keeps the sum alone.
    pub folded: bool,
    /// The ranks that go on, and this one among them.
    pub after: &'a Mesh,
    /// This rank.
    pub rank: usize,
    /// All ranks, where they do not all see one folder.
    pub others: Option<&'a SubGroup>,
    /// Whether to go on without what nobody has any more.
    pub without_lost: bool,
    /// Counts twice what the first sender left out: the control of a test, and of no other use.
    pub twice: bool,
}

/// One rank's side of one tensor, as the checkpoint has it.
struct Piece<'a> {
    parameter: &'a Parameter,
    /// Who wrote it.
    writer: usize,
    side: Side,
    tensor: String,
    /// The elements of the whole tensor that it has.
    held: Range<usize>,
}

/// Which ranks have what which rank wrote.
struct Holdings {
    /// By rank, and by writer.
    has: Vec<Vec<bool>>,
}

impl Holdings {
    /// The writers of whom nobody has everything.
    fn lost(&self) -> Vec<usize> {
        let writers = self.has.first().map_or(0, Vec::len);
        (0..writers).filter(|&writer| self.has.iter().all(|row| !row[writer])).collect()
    }
}

impl Way<'_> {
    /// Takes back what was left out: hands to `take`, for every tensor that may travel in a lossy codec, its index, this
    /// rank's side as a sender over the whole tensor, and its side as the owner of its shard. Returns the ranks of the
    /// checkpoint without whose part the run goes on, because it is in no folder.
    ///
    /// # Errors
    /// Some of it is in no folder of these ranks, and nobody said that it may be lost; it is damaged; a rank is lost.
    pub fn restore(&self, plan: &Plan, mut take: impl FnMut(usize, Vec<f32>, Vec<f32>)) -> Result<Vec<usize>> {
        let lossy = || plan.parameters().iter().enumerate().filter(|(_, parameter)| may_be_lossy(parameter));
        let holdings = self.holdings(lossy().map(|(_, parameter)| parameter))?;
        let (same, lost) = (self.before.cuts_like(self.after) && !self.folded, holdings.lost());
        for (index, parameter) in lossy() {
            let all = parameter.elements();
            let own = shard(all, self.rank, self.after.data);
            let (mut sender, mut owner) = (vec![0.0; all], vec![0.0; own.len()]);
            let mut kept: Vec<Residual> = Vec::new();
            for piece in self.pieces(parameter).into_iter().filter(|piece| !lost.contains(&piece.writer)) {
                let wanted = |rank| self.wanted(&piece, rank, same);
                let Some(values) = self.bring(&piece, &holdings, wanted)? else { continue };
                let range = wanted(self.rank);
                match (same, piece.side) {
                    (true, Side::Sender { .. }) => sender = values,
                    (true, Side::Owner) => owner = values,
                    (false, side) => kept.push(inside(&own, side, &range, values)),
                }
            }
            if !same {
                owner = self.fold(own.len(), kept);
            }
            take(index, sender, owner);
        }
        Ok(lost)
    }

    /// What all sides left out of this rank's shard, added up.
    fn fold(&self, elements: usize, mut kept: Vec<Residual>) -> Vec<f32> {
        if let Some(first) = kept.iter().find(|kept| self.twice && kept.side == Side::Sender { rank: 0 }).cloned() {
            kept.push(Residual { side: Side::Sender { rank: usize::MAX }, ..first });
        }
        added_up(elements, &kept)
    }

    /// Everything that the checkpoint's ranks stored of one tensor: owners first, as the fold has them.
    fn pieces<'p>(&self, parameter: &'p Parameter) -> Vec<Piece<'p>> {
        let ranks = self.before.data;
        let of = |writer: usize| self.sides(writer).map(move |side| self.piece(parameter, writer, side));
        let mut pieces: Vec<Piece<'p>> = (0..ranks).flat_map(of).collect();
        pieces.sort_by_key(|piece| piece.side);
        pieces
    }

    /// What a rank wrote.
    fn sides(&self, writer: usize) -> impl Iterator<Item = Side> + use<> {
        let folded = self.folded;
        sides(writer, self.before.data).filter(move |side| !folded || *side == Side::Owner)
    }

    fn piece<'p>(&self, parameter: &'p Parameter, writer: usize, side: Side) -> Piece<'p> {
        let all = parameter.elements();
        let (tensor, held) = match side {
            Side::Sender { rank } => (sender_name(&parameter.name, rank), 0..all),
            Side::Owner => {
                let name = if self.folded { folded_name } else { owner_name };
                (name(&parameter.name), shard(all, writer, self.before.data))
            }
        };
        Piece { parameter, writer, side, tensor, held }
    }

    /// What a rank needs of a piece: on the same ranks its own, else what falls into its shard.
    fn wanted(&self, piece: &Piece<'_>, rank: usize, same: bool) -> Range<usize> {
        let held = &piece.held;
        if same {
            return if piece.writer == rank { held.clone() } else { held.start..held.start };
        }
        let own = shard(piece.parameter.elements(), rank, self.after.data);
        let (start, end) = (held.start.max(own.start), held.end.min(own.end));
        start..end.max(start)
    }

    /// Who has what, and that somebody has everything that is needed.
    fn holdings<'p>(&self, lossy: impl Iterator<Item = &'p Parameter>) -> Result<Holdings> {
        let lossy: Vec<&Parameter> = lossy.collect();
        let writers = self.before.data;
        let missing = |writer: usize| {
            let pieces = lossy
                .iter()
                .flat_map(|parameter| self.sides(writer).map(move |side| self.piece(parameter, writer, side)));
            pieces.filter_map(|piece| Some((self.absent(&piece)?, piece.tensor))).collect::<Vec<_>>()
        };
        let here: Vec<u8> = (0..writers).map(|writer| u8::from(missing(writer).is_empty())).collect();
        let mut all = vec![0; writers * self.others.map_or(1, |others| others.members().len())];
        match self.others {
            Some(others) => others.all_gather("resume/who has what", &here, &mut all)?,
            None => all.copy_from_slice(&here),
        }
        let has: Vec<Vec<bool>> = all.chunks(writers).map(|row| row.iter().map(|&has| has == 1).collect()).collect();
        let holdings = Holdings { has };
        match holdings.lost().first() {
            Some(&writer) if !self.without_lost => Err(self.gone(writer, &missing(writer))),
            _ => Ok(holdings),
        }
    }

    /// The first elements of a piece that are not in this folder.
    fn absent(&self, piece: &Piece<'_>) -> Option<Range<usize>> {
        match self.checkpoint.manifest().tensors.get(&piece.tensor) {
            Some(entry) => entry.absent(&piece.held).into_iter().next(),
            None => (!piece.held.is_empty()).then(|| piece.held.clone()),
        }
    }

    fn gone(&self, writer: usize, missing: &[(Range<usize>, String)]) -> Error {
        let (step, host) = (self.checkpoint.step(), self.before.host_of(writer));
        let what = match missing {
            // Somebody else lacks it; here all is well, which cannot be, or the order of the ranks differs.
            [] => "what it left out".to_owned(),
            [(range, tensor)] => format!("elements {range:?} of {tensor}"),
            [(range, tensor), rest @ ..] => {
                format!("elements {range:?} of {tensor}, and of {} more tensors", rest.len())
            }
        };
        Error::Run {
            name: self.run.into(),
            what: format!(
                "its checkpoint of step {step} is of {}, and what rank {writer} wrote on host {host} is in no run folder of \
                 the ranks that are here: {what}\nstart a worker on that machine too, or copy its folder of that checkpoint \
                 to a machine that takes part; if it is gone for ever, --resume-without-residuals goes on without it",
                self.before
            ),
        }
    }

    /// Sends what other ranks lack of a piece, and gets what this rank needs of it; `None` for nothing.
    fn bring(
        &self,
        piece: &Piece<'_>,
        holdings: &Holdings,
        wanted: impl Fn(usize) -> Range<usize>,
    ) -> Result<Option<Vec<f32>>> {
        let lacks = |rank: usize| !holdings.has[rank][piece.writer] && !wanted(rank).is_empty();
        let own = wanted(self.rank);
        let Some(others) = self.others.filter(|others| others.members().iter().any(|&rank| lacks(rank))) else {
            return if own.is_empty() { Ok(None) } else { self.read(piece, own).map(Some) };
        };
        let holder = (0..holdings.has.len()).find(|&rank| holdings.has[rank][piece.writer]).expect("somebody has it");
        let site = site("resume", &piece.tensor);
        if holder == self.rank {
            for &to in others.members().iter().filter(|&&to| lacks(to)) {
                for part in parts(&wanted(to)) {
                    others.send(&site, to, &self.read(piece, part)?)?;
                }
            }
        }
        let values = match (own.is_empty(), lacks(self.rank)) {
            (true, _) => None,
            (false, false) => Some(self.read(piece, own)?),
            (false, true) => {
                let mut values = vec![0.0; own.len()];
                for part in parts(&own) {
                    others.receive(&site, holder, &mut values[part.start - own.start..part.end - own.start])?;
                }
                Some(values)
            }
        };
        // Who sends does not wait: without this it would be ahead by the whole checkpoint.
        others.barrier(&site)?;
        Ok(values)
    }

    fn read(&self, piece: &Piece<'_>, range: Range<usize>) -> Result<Vec<f32>> {
        let mut values = vec![0.0; range.len()];
        self.checkpoint.region(&piece.tensor, &piece.parameter.shape, range, &mut values)?;
        Ok(values)
    }
}

/// What all sides left out of so many elements: the owner's, and the senders' in the order of their ranks.
pub(super) fn added_up(elements: usize, kept: &[Residual]) -> Vec<f32> {
    let whole = Region::whole(&[elements]).expect("one dimension does not overflow");
    let sum = recut(&[elements], kept, &[whole], |_| {});
    sum.expect("every side has an element once").pop().expect("one owner")
}

/// A residual of some elements, as a part of a shard that stands for itself.
pub(super) fn inside(shard: &Range<usize>, side: Side, range: &Range<usize>, values: Vec<f32>) -> Residual {
    let (flat_start, flat_end) = (range.start - shard.start, range.end - shard.start);
    Residual { side, region: Region { start: vec![0], end: vec![shard.len()], flat_start, flat_end }, values }
}

pub(super) fn parts(range: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = range.end;
    range.clone().step_by(PART).map(move |start| start..(start + PART).min(end))
}

/// Where in the program the ranks are: the tensor's name, or what fits of it.
pub(super) fn site(what: &str, tensor: &str) -> String {
    let mut site = format!("{what}/{tensor}");
    while site.len() > SITE_BYTES_MAX {
        site.pop();
    }
    site
}
