//! Which instructions encode and decode, and how work is shared between threads.
//!
//! - `blocks`: the kernels over whole blocks, written once.
//! - `simd`: what they need of a set of vector instructions; `avx2` and `avx512` have it.
//! - `compiled`: their copies, one for each level and codec.
//! - `simple`: the codecs without blocks, and what a compiler makes wide by itself.
//! - [`copy`]: copies to measure against.
//!
//! Whatever the level, the cut or the number of threads, the bits are those of the reference in `codec/block.rs`, which
//! also does the last, shorter block of every slice.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod blocks;
#[cfg(target_arch = "x86_64")]
mod compiled;
pub mod copy;
#[cfg(target_arch = "x86_64")]
mod simd;
mod simple;

use std::fmt;
use std::sync::OnceLock;

use crate::BLOCK;
use crate::codec::layout::{Format, Planes, PlanesMut};
use crate::codec::{Codec, Found, Part, Passed, block, payload};

/// A set of instructions that this processor has. All give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// Whether a kernel writes past the caches what is not read again soon: right for what is larger than they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stores {
    /// Into the caches.
    Cached,
    /// Past them, where addresses allow: multiples of 64 bytes.
    Stream,
}

/// Elements that a thread takes at least: 256 KiB of f32.
const PIECE: usize = 512 * BLOCK;
/// Elements that are summed at a time, so that they stay in the first cache while every part is added.
const SUMMED: usize = 64 * BLOCK;

impl Level {
    /// What a compiler makes of the reference on any processor.
    pub const PORTABLE: Self = Self(Kind::Portable);

    /// Every level that this processor has, the best last.
    #[must_use]
    pub fn available() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut))]
        let mut levels = vec![Self::PORTABLE];
        #[cfg(target_arch = "x86_64")]
        {
            macro_rules! has {
                ($($feature:tt),*) => { true $(&& is_x86_feature_detected!($feature))* };
            }
            let avx2 = has!("avx2", "fma", "bmi1", "bmi2", "popcnt", "lzcnt");
            if avx2 {
                levels.push(Self(Kind::Avx2));
            }
            if avx2 && has!("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512vbmi2") {
                levels.push(Self(Kind::Avx512));
            }
        }
        levels
    }

    /// The best that this processor has.
    #[must_use]
    pub fn best() -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().pop().unwrap_or(Self::PORTABLE))
    }

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
        }
    }

    /// `values` and `residual` have one length, which is that of `out`.
    pub(crate) fn encode(
        self,
        codec: Codec,
        stores: Stores,
        values: &mut [f32],
        residual: &[f32],
        out: PlanesMut<'_>,
    ) -> Found {
        #[cfg(not(target_arch = "x86_64"))]
        let _ = stores;
        let whole = values.len() / BLOCK * BLOCK;
        let (values, tail) = values.split_at_mut(whole);
        let (residual, tail_residual) = residual.split_at(whole);
        let (out, mut tail_out) = out.split_at(codec, whole);
        let found = match (self.0, codec.format()) {
            (Kind::Portable, Some(format)) => portable_encode(codec, format, values, residual, out),
            (Kind::Portable, None) => simple::encode(codec, values, residual, out.values),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this level was made because the processor has the instructions.
            (Kind::Avx2, format) => unsafe { compiled::on_avx2::encode(codec, format, stores, values, residual, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Kind::Avx512, format) => unsafe {
                compiled::on_avx512::encode(codec, format, stores, values, residual, out)
            },
        };
        if tail.is_empty() || found == Found::NonFinite {
            return found;
        }
        match codec.format() {
            Some(format) => block::encode(format, tail, tail_residual, &mut tail_out),
            None => simple::encode_rest(codec, tail, tail_residual, tail_out.values),
        }
    }

    /// The first block that no encoder writes, and why.
    pub(crate) fn fault(self, codec: Codec, planes: Planes<'_>, elements: usize) -> Option<(usize, &'static str)> {
        match self.0 {
            Kind::Portable => payload::first_fault(codec, planes, elements),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this level was made because the processor has the instructions.
            Kind::Avx2 => unsafe { compiled::on_avx2::fault(codec, planes, elements) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Kind::Avx512 => unsafe { compiled::on_avx512::fault(codec, planes, elements) },
        }
    }

    pub(crate) fn decode(self, codec: Codec, stores: Stores, planes: Planes<'_>, out: &mut [f32]) {
        #[cfg(not(target_arch = "x86_64"))]
        let _ = stores;
        let whole = out.len() / BLOCK * BLOCK;
        let (planes, tail) = planes.split_at(codec, whole);
        let (out, tail_out) = out.split_at_mut(whole);
        match (self.0, codec.format()) {
            (Kind::Portable, Some(format)) => portable_decode(codec, format, planes, out, |out, value| *out = value),
            (Kind::Portable, None) => simple::decode(codec, planes.values, out),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this level was made because the processor has the instructions.
            (Kind::Avx2, format) => unsafe { compiled::on_avx2::decode(codec, format, stores, planes, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Kind::Avx512, format) => unsafe { compiled::on_avx512::decode(codec, format, stores, planes, out) },
        }
        match codec.format() {
            Some(format) if !tail_out.is_empty() => block::decode(format, tail, tail_out, |out, value| *out = value),
            _ => simple::decode(codec, tail.values, tail_out),
        }
    }

    pub(crate) fn add(self, codec: Codec, planes: Planes<'_>, sum: &mut [f32]) {
        let whole = sum.len() / BLOCK * BLOCK;
        let (planes, tail) = planes.split_at(codec, whole);
        let (sum, tail_sum) = sum.split_at_mut(whole);
        match (self.0, codec.format()) {
            (Kind::Portable, Some(format)) => portable_decode(codec, format, planes, sum, |sum, value| *sum += value),
            (Kind::Portable, None) => simple::decode_add(codec, planes.values, sum),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this level was made because the processor has the instructions.
            (Kind::Avx2, format) => unsafe { compiled::on_avx2::decode_add(codec, format, planes, sum) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Kind::Avx512, format) => unsafe { compiled::on_avx512::decode_add(codec, format, planes, sum) },
        }
        match codec.format() {
            Some(format) if !tail_sum.is_empty() => block::decode(format, tail, tail_sum, |sum, value| *sum += value),
            _ => simple::decode_add(codec, tail.values, tail_sum),
        }
    }

    /// `sum` becomes zero plus the elements from `start` on of every part, in the order of the parts.
    pub(crate) fn reduce<B: AsRef<[u8]>>(self, parts: &[Part<'_, B>], start: usize, sum: &mut [f32]) {
        for (piece, sum) in sum.chunks_mut(SUMMED).enumerate() {
            let start = start + piece * SUMMED;
            if parts.is_empty() {
                sum.fill(0.0);
            }
            for (number, part) in parts.iter().enumerate() {
                match part {
                    Part::Values(values) => simple::add_values(&values[start..start + sum.len()], sum, number == 0),
                    Part::Encoded(payload) => {
                        let codec = payload.codec();
                        let (_, rest) = payload.planes().split_at(codec, start);
                        let (planes, _) = rest.split_at(codec, sum.len());
                        match (number, codec.format()) {
                            // A block codec has no negative zero, which zero plus the value would make a zero.
                            (0, Some(_)) => self.decode(codec, Stores::Cached, planes, sum),
                            (0, None) => {
                                sum.fill(0.0);
                                self.add(codec, planes, sum);
                            }
                            _ => self.add(codec, planes, sum),
                        }
                    }
                }
            }
        }
    }

    /// As [`reduce`](Self::reduce) into `sum`, [`encode`](Self::encode) of that and [`decode`](Self::decode) of what was written,
    /// piece by piece.
    pub(crate) fn pass_on<B: AsRef<[u8]>>(self, parts: &[Part<'_, B>], start: usize, mut to: Passed<'_>) -> Found {
        let (mut start, codec) = (start, to.codec);
        while !to.sum.is_empty() {
            let mut here;
            let elements = SUMMED.min(to.sum.len());
            (here, to) = to.split_at(elements);
            self.reduce(parts, start, here.sum);
            if self.encode(codec, Stores::Cached, here.sum, here.residual, here.payload.reborrow()) == Found::NonFinite
            {
                return Found::NonFinite;
            }
            self.decode(codec, Stores::Cached, here.payload.read(), here.decoded);
            start += here.sum.len();
        }
        Found::Finite
    }

    /// As [`pass_on`](Self::pass_on), by all threads of rayon's pool.
    pub(crate) fn par_pass_on<B: AsRef<[u8]> + Sync>(
        self,
        parts: &[Part<'_, B>],
        start: usize,
        to: Passed<'_>,
    ) -> Found {
        let Some(middle) = middle(to.sum.len()) else { return self.pass_on(parts, start, to) };
        let (to, rest) = to.split_at(middle);
        let (a, b) =
            rayon::join(|| self.par_pass_on(parts, start, to), || self.par_pass_on(parts, start + middle, rest));
        if a == Found::Finite { b } else { a }
    }

    /// As [`encode`](Self::encode), by all threads of rayon's pool.
    pub(crate) fn par_encode(
        self,
        codec: Codec,
        stores: Stores,
        values: &mut [f32],
        residual: &[f32],
        out: PlanesMut<'_>,
    ) -> Found {
        let Some(middle) = middle(values.len()) else { return self.encode(codec, stores, values, residual, out) };
        let (values, values_rest) = values.split_at_mut(middle);
        let (residual, residual_rest) = residual.split_at(middle);
        let (out, out_rest) = out.split_at(codec, middle);
        let (a, b) = rayon::join(
            || self.par_encode(codec, stores, values, residual, out),
            || self.par_encode(codec, stores, values_rest, residual_rest, out_rest),
        );
        if a == Found::Finite { b } else { a }
    }

    /// As [`decode`](Self::decode), by all threads of rayon's pool.
    pub(crate) fn par_decode(self, codec: Codec, stores: Stores, planes: Planes<'_>, out: &mut [f32]) {
        let Some(middle) = middle(out.len()) else { return self.decode(codec, stores, planes, out) };
        let (planes, planes_rest) = planes.split_at(codec, middle);
        let (out, out_rest) = out.split_at_mut(middle);
        rayon::join(
            || self.par_decode(codec, stores, planes, out),
            || self.par_decode(codec, stores, planes_rest, out_rest),
        );
    }

    /// As [`add`](Self::add), by all threads of rayon's pool.
    pub(crate) fn par_add(self, codec: Codec, planes: Planes<'_>, sum: &mut [f32]) {
        let Some(middle) = middle(sum.len()) else { return self.add(codec, planes, sum) };
        let (planes, planes_rest) = planes.split_at(codec, middle);
        let (sum, sum_rest) = sum.split_at_mut(middle);
        rayon::join(|| self.par_add(codec, planes, sum), || self.par_add(codec, planes_rest, sum_rest));
    }

    /// As [`reduce`](Self::reduce), by all threads of rayon's pool.
    pub(crate) fn par_reduce<B: AsRef<[u8]> + Sync>(self, parts: &[Part<'_, B>], start: usize, sum: &mut [f32]) {
        let Some(middle) = middle(sum.len()) else { return self.reduce(parts, start, sum) };
        let (sum, rest) = sum.split_at_mut(middle);
        rayon::join(|| self.par_reduce(parts, start, sum), || self.par_reduce(parts, start + middle, rest));
    }
}

/// Where to cut so many elements between threads, on a block border; `None` when they are few.
const fn middle(elements: usize) -> Option<usize> {
    if elements < 2 * PIECE { None } else { Some(elements / 2 / BLOCK * BLOCK) }
}

impl Stores {
    /// By the size of what is written: what is larger than a core's share of the caches is streamed.
    #[must_use]
    pub const fn for_bytes(bytes: usize) -> Self {
        if bytes >= 16 << 20 { Self::Stream } else { Self::Cached }
    }
}

fn portable_encode(
    codec: Codec,
    format: Format,
    values: &mut [f32],
    residual: &[f32],
    mut out: PlanesMut<'_>,
) -> Found {
    for (values, residual) in values.chunks_exact_mut(BLOCK).zip(residual.chunks_exact(BLOCK)) {
        let mut here;
        (here, out) = out.split_at(codec, BLOCK);
        if block::encode(format, values, residual, &mut here) == Found::NonFinite {
            return Found::NonFinite;
        }
    }
    Found::Finite
}

fn portable_decode(
    codec: Codec,
    format: Format,
    mut planes: Planes<'_>,
    out: &mut [f32],
    put: impl Fn(&mut f32, f32) + Copy,
) {
    for out in out.chunks_exact_mut(BLOCK) {
        let here;
        (here, planes) = planes.split_at(codec, BLOCK);
        block::decode(format, here, out, put);
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests;
