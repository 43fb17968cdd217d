//! What a checkpoint is measured beside and against: a step of fixed work, a plain file, and medians.

use std::fs::File;
use std::hint::black_box;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::time::Instant;

use crate::error::{Error, Result};

/// Rows and columns of a matrix of 1 MiB, three of which do not fit into a core's second cache.
const SIZE: usize = 512;
/// Bytes that are written or read at a time.
const PIECE: usize = 1 << 20;

/// A step: matrix products on one thread, always as many.
pub(super) struct Work {
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    /// Rows of `c` that a step computes; they may go round several times.
    rows: usize,
}

impl Work {
    /// So much work that a step takes about `milliseconds` now.
    pub fn new(milliseconds: usize) -> Self {
        let matrix = |seed: usize| (0..SIZE * SIZE).map(|i| ((i * seed) % 251) as f32 / 251.0).collect();
        let mut work = Self { a: matrix(7), b: matrix(11), c: vec![0.0; SIZE * SIZE], rows: SIZE };
        work.step_s();
        let mut seconds = [(); 5].map(|()| work.step_s());
        let wanted = milliseconds as f64 / 1e3;
        work.rows = ((SIZE as f64 * wanted / median(&mut seconds)) as usize).max(1);
        work
    }

    /// Takes so many steps, and says how long each took.
    pub fn steps_s(&mut self, steps: usize) -> Vec<f64> {
        (0..steps).map(|_| self.step_s()).collect()
    }

    /// Takes a step, and says how long it took.
    pub fn step_s(&mut self) -> f64 {
        let start = Instant::now();
        for row in 0..self.rows {
            let row = row % SIZE;
            let to = &mut self.c[row * SIZE..][..SIZE];
            to.fill(0.0);
            for (k, &factor) in self.a[row * SIZE..][..SIZE].iter().enumerate() {
                let from = &self.b[k * SIZE..][..SIZE];
                to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
            }
        }
        black_box(&self.c);
        start.elapsed().as_secs_f64()
    }
}

/// Writes the same bytes one after the other into one file, syncs it, and removes it; says how long it took to be durable.
pub(super) fn plain_write_s(folder: &Path, tensors: &[Vec<f32>]) -> Result<f64> {
    let path = folder.join("plain");
    let io = |what| Error::io(what, path.clone());
    let start = Instant::now();
    let mut file = File::create(&path).map_err(io("make"))?;
    for tensor in tensors {
        let bytes: &[u8] = bytemuck::cast_slice(tensor);
        bytes.chunks(PIECE).try_for_each(|piece| file.write_all(piece)).map_err(io("write"))?;
    }
    file.sync_all().map_err(io("sync"))?;
    let seconds = start.elapsed().as_secs_f64();
    std::fs::remove_file(&path).map_err(io("remove"))?;
    Ok(seconds)
}

/// Reads the first rank's file of a checkpoint, packed or not, one piece after the other, into new memory.
pub(super) fn plain_read_s(checkpoint: &Path) -> Result<f64> {
    let [plain, packed] = ["", ".zst"].map(|ending| checkpoint.join(format!("rank-0000.safetensors{ending}")));
    let path = if packed.exists() { packed } else { plain };
    let io = |what| Error::io(what, path.clone());
    let start = Instant::now();
    let mut file = File::open(&path).map_err(io("open"))?;
    let mut bytes = vec![0; file.metadata().map_err(io("look at"))?.len() as usize];
    bytes.chunks_mut(PIECE).try_for_each(|piece| file.read_exact(piece)).map_err(io("read"))?;
    black_box(&bytes);
    Ok(start.elapsed().as_secs_f64())
}

/// The one in the middle; of none it is not a number.
pub(super) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The standard error of the median, whatever the values' distribution: half of what lies between those half a root of
/// their number below and above it (Woodruff, Confidence intervals for medians and other position measures, JASA 47, 1952);
/// of fewer than two it is not a number.
pub(super) fn error_of_median(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return f64::NAN;
    }
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let last = (values.len() - 1) as f64;
    let at = |rank: f64| {
        let rank = rank.clamp(0.0, last);
        let below = values[rank as usize];
        below + rank.fract() * (values[rank.ceil() as usize] - below)
    };
    let aside = (values.len() as f64).sqrt() / 2.0;
    (at(last / 2.0 + aside) - at(last / 2.0 - aside)) / 2.0
}

pub(super) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}
