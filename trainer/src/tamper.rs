//! Faults that tests put into a run, to see that it notices. The binary `tributary` has none; the one that tests run
//! reads them from its environment.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use burn::Tensor;
use parallel::data::Part;
use parallel::frame::HEADER_BYTES;
use parallel::transport::Transport;

use crate::error::{Error, Result};
use crate::replica::Replica;
use crate::state::State;
use crate::step::Stepper;

/// What is to go wrong.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tamper {
    /// The loss of (rank, step) is multiplied with NaN.
    nan: Vec<(usize, u64)>,
    /// The loss of (rank, step) is multiplied with 100.
    pulse: Vec<(usize, u64)>,
    /// One parameter of (rank, after step) changes by 1e-3.
    drift: Vec<(usize, u64)>,
    /// This (rank, step) dies by its own hand, in the middle of its step.
    die: Vec<(usize, u64)>,
    /// This (rank, step)'s process stops itself before its first backward pass.
    halt: Vec<(usize, u64)>,
    /// This (rank, step) dies before its pass of this number, from 0, in the order of its stage's schedule.
    die_at: Vec<(usize, u64, usize)>,
    /// This (rank, step) makes a call with the others of its replica that they do not make.
    stray: Vec<(usize, u64)>,
    /// This (rank, step) ends with an error.
    fail: Vec<(usize, u64)>,
    /// This (rank, step) sends noise to all others.
    garbage: Vec<(usize, u64)>,
    /// This (rank, step) sends all others a frame of a version that there never was.
    old: Vec<(usize, u64)>,
    /// This (rank, step) sends all others a frame of which one bit of the first bytes is another: no frame any more, but a message of
    /// a collective operation.
    flip: Vec<(usize, u64)>,
    /// Error feedback forgets what was left out.
    pub no_feedback: bool,
    /// No gradient leaves before the end of the backward pass.
    late: bool,
    /// The loss of this rank is multiplied with this number in every step, as a backend does that rounds differently.
    scale: Vec<(usize, f64)>,
    /// What this rank says its backend is.
    backend: Vec<(usize, String)>,
    /// A resume forgets what owners left out.
    pub forget_owner: bool,
    /// A resume on other ranks counts twice what the first of them left out.
    pub fold_twice: bool,
    /// What every rank believes to be the rate of its link.
    pub link_bytes_per_s: Option<f64>,
    /// What every rank believes that its steps take.
    pub step_s: Option<f64>,
    /// Gradients and sums of every step are written below this folder.
    record: Option<PathBuf>,
    /// The hash of the parameters after every step is written below this folder.
    hashes: Option<PathBuf>,
}

impl Tamper {
    /// Reads a list such as `nan:1:5,pulse:0:3,drift:1:5,die:1:4,halt:1:4,die-at:1:4:0,stray:1:4,fail:1:4,garbage:1:4,old:1:4,flip:1:4,
    /// no-feedback,late,scale:1:1.0000001,backend:1:NAME,forget-owner,fold-twice,link:1e6,step:0.5,record:DIR,hashes:DIR`. What it does not know it refuses.
    ///
    /// # Errors
    /// The first item that is none.
    pub fn parse(list: &str) -> std::result::Result<Self, String> {
        let mut tamper = Self::default();
        for item in list.split(',').filter(|item| !item.is_empty()) {
            let (kind, rest) = item.split_once(':').unwrap_or((item, ""));
            let place = || {
                let (rank, step) = rest.split_once(':')?;
                Some((rank.parse().ok()?, step.parse().ok()?))
            };
            let number = || rest.parse().map_err(|_| format!("expected a number: {item}"));
            match (kind, place()) {
                ("nan", Some(place)) => tamper.nan.push(place),
                ("pulse", Some(place)) => tamper.pulse.push(place),
                ("drift", Some(place)) => tamper.drift.push(place),
                ("die", Some(place)) => tamper.die.push(place),
                ("halt", Some(place)) => tamper.halt.push(place),
                ("die-at", _) => {
                    let wrong = || format!("expected RANK:STEP:PASS: {item}");
                    let numbers: Vec<usize> = rest.split(':').filter_map(|number| number.parse().ok()).collect();
                    let [rank, step, pass] = numbers.try_into().map_err(|_| wrong())?;
                    tamper.die_at.push((rank, step as u64, pass));
                }
                ("stray", Some(place)) => tamper.stray.push(place),
                ("fail", Some(place)) => tamper.fail.push(place),
                ("garbage", Some(place)) => tamper.garbage.push(place),
                ("old", Some(place)) => tamper.old.push(place),
                ("flip", Some(place)) => tamper.flip.push(place),
                ("scale", _) => {
                    let (rank, by) = rest.split_once(':').ok_or_else(|| format!("expected RANK:NUMBER: {item}"))?;
                    let wrong = || format!("expected RANK:NUMBER: {item}");
                    let pair = (rank.parse().map_err(|_| wrong())?, by.parse().map_err(|_| wrong())?);
                    tamper.scale.push(pair);
                }
                ("backend", _) => {
                    let (rank, name) = rest.split_once(':').ok_or_else(|| format!("expected RANK:NAME: {item}"))?;
                    tamper
                        .backend
                        .push((rank.parse().map_err(|_| format!("expected RANK:NAME: {item}"))?, name.into()));
                }
                ("no-feedback", None) => tamper.no_feedback = true,
                ("late", None) => tamper.late = true,
                ("forget-owner", None) => tamper.forget_owner = true,
                ("fold-twice", None) => tamper.fold_twice = true,
                ("link", None) => tamper.link_bytes_per_s = Some(number()?),
                ("step", None) => tamper.step_s = Some(number()?),
                ("record", None) => tamper.record = Some(rest.into()),
                ("hashes", None) => tamper.hashes = Some(rest.into()),
                _ => return Err(format!("no such fault: {item}")),
            }
        }
        Ok(tamper)
    }

    /// What a rank says of its backend.
    #[must_use]
    pub fn backend(&self, rank: usize, backend: &str) -> String {
        let told = self.backend.iter().find(|(of, _)| *of == rank);
        told.map_or(backend, |(_, name)| name).to_owned()
    }

    /// Makes a rank keep what is to be recorded, and be late, and die.
    pub fn prepare(&self, rank: usize, stepper: &Stepper) {
        if let Some((_, step, pass)) = self.die_at.iter().find(|(of, ..)| *of == rank) {
            stepper.die_at(*step, *pass);
        }
        if self.late {
            stepper.be_late();
        }
        if self.record.is_some() {
            stepper.keep_own_gradients();
        }
    }

    /// Whether it looks at sums or at the state after every step.
    #[must_use]
    pub const fn needs_whole_steps(&self) -> bool {
        !self.drift.is_empty() || self.record.is_some() || self.hashes.is_some()
    }

    /// Fails before a rank's step, if that is wanted.
    ///
    /// # Errors
    /// It is wanted.
    pub fn before(&self, rank: usize, step: u64) -> Result<()> {
        match self.fail.contains(&(rank, step)) {
            true => Err(Error::Device { step, what: "it was told to fail".into() }),
            false => Ok(()),
        }
    }

    /// Makes a call that the others do not make, if that is wanted.
    ///
    /// # Errors
    /// They are at another one.
    pub fn stray(&self, rank: usize, step: u64, replica: Option<&Replica>) -> Result<()> {
        match replica.filter(|_| self.stray.contains(&(rank, step))) {
            Some(replica) => replica.any("nowhere else", true).map(|_| ()),
            None => Ok(()),
        }
    }

    /// Sends all other ranks what no rank sends, if that is wanted.
    pub fn disturb(&self, rank: usize, step: u64, ranks: usize, transport: &dyn Transport) {
        let noise: Vec<u8> = (0..4096u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let old = [&b"TRIB"[..], &[0; HEADER_BYTES - 4]].concat();
        let flip = [&b"TRIC\x01\0"[..], &[0; HEADER_BYTES + 2]].concat();
        for (wanted, message) in [(&self.garbage, noise), (&self.old, old), (&self.flip, flip)] {
            if wanted.contains(&(rank, step)) {
                (0..ranks).filter(|&to| to != rank).for_each(|to| transport.send(to, message.clone().into()));
            }
        }
    }

    /// The loss of one rank's micro-batch, with what is to go wrong in it.
    #[must_use]
    pub fn loss(&self, rank: usize, step: u64, loss: Tensor<1>) -> Tensor<1> {
        if self.die.contains(&(rank, step)) {
            std::process::abort();
        }
        if self.halt.contains(&(rank, step)) {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP);
        }
        if self.nan.contains(&(rank, step)) {
            return loss.mul_scalar(f32::NAN);
        }
        if self.pulse.contains(&(rank, step)) {
            return loss.mul_scalar(100.0);
        }
        if let Some((_, by)) = self.scale.iter().find(|(of, _)| *of == rank) {
            return loss.mul_scalar(*by);
        }
        loss
    }

    /// Writes this rank's gradients and the sums of the step that just ended, if that is wanted: f32, little-endian,
    /// each parameter's gradient and then its sum, in logical order.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn record(&self, stepper: &Stepper, rank: usize, step: u64, skipped: bool) -> Result<()> {
        let Some(folder) = &self.record else { return Ok(()) };
        let path = folder.join(format!("rank-{rank}-step-{step}{}.bin", if skipped { "-skipped" } else { "" }));
        let mut bytes = Vec::new();
        for index in 0..stepper.plan().parameters().len() {
            let own = stepper.own_gradient(index).unwrap_or_default();
            for value in own.iter().chain(&stepper.stream().last_sum(index)) {
                bytes.extend(value.to_le_bytes());
            }
        }
        write(&path, &bytes).map_err(Error::io("write", path))
    }

    /// Changes a parameter after a step, and appends the hash of all of them to `rank-RANK` in the folder of hashes.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn after(&self, rank: usize, step: u64, state: &mut State, parts: &[Part]) -> Result<()> {
        if self.drift.contains(&(rank, step)) {
            state.weights[0][0] += 1e-3;
        }
        let Some(folder) = &self.hashes else { return Ok(()) };
        let path = folder.join(format!("rank-{rank}"));
        let line = format!("{step} {}\n", state.hash_of_parts(parts));
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&path);
        file.and_then(|mut file| file.write_all(line.as_bytes())).map_err(Error::io("write", path))
    }
}

fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    std::fs::File::create(path)?.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_and_what_is_no_fault_is_refused() {
        let tamper = Tamper::parse("nan:1:5,no-feedback,record:/tmp/x,link:2.5e7").expect("known faults");
        assert_eq!((&tamper.nan[..], tamper.link_bytes_per_s), (&[(1, 5)][..], Some(2.5e7)));
        assert!(tamper.no_feedback && !tamper.forget_owner && tamper.record.is_some());
        assert!(Tamper::parse("nan:1").is_err() && Tamper::parse("nna:1:5").is_err());
        assert!(Tamper::parse("link:fast").is_err() && Tamper::parse("link").is_err());
        assert_eq!(Tamper::parse(""), Ok(Tamper::default()));
    }
}
