//! Numbers and slices that are hard on a codec.

use proptest::prelude::*;

use crate::BLOCK;
use crate::codec::TOO_LARGE;

/// The largest value that can be sent.
pub(crate) const LARGEST: f32 = f32::from_bits(TOO_LARGE.to_bits() - 1);

/// Numbers of very different sizes, up to 2^110 so that a run of sums stays below 2^126; zeros, negative zeros and
/// denormals among them.
pub(crate) fn number() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => -1.0f32..1.0,
        2 => (any::<u32>(), -140i32..110).prop_map(|(m, e)| {
            let x = ((f64::from(m) / 4.3e9 + 1.0) * 2.0f64.powi(e)) as f32;
            if m % 2 == 0 { x } else { -x }
        }),
        1 => Just(0.0f32),
        1 => Just(-0.0f32),
        1 => any::<u32>().prop_map(|m| f32::from_bits(m & 0x807f_ffff)),
    ]
}

/// One block that is hard in one way.
fn block() -> impl Strategy<Value = Vec<f32>> {
    let many = |element: BoxedStrategy<f32>| prop::collection::vec(element, BLOCK);
    let sign = || prop_oneof![Just(1.0f32), Just(-1.0f32)];
    prop_oneof![
        many((-1.0f32..1.0).boxed()),
        many(number().boxed()),
        // All of one size: every group of four is a tie.
        number().prop_flat_map(move |x| many(sign().prop_map(move |sign| sign * x).boxed())),
        // Few sizes: ties between some of four, at every place.
        many(prop::sample::select(vec![0.0f32, -0.0, 1.0, -1.0, 2.0, -2.0, 3.0]).boxed()),
        // Halves of a scale, or the next number to one: ties in rounding, and what y / s and y * (1 / s) round apart.
        (0x1280u16..0x7180, any::<bool>(), any::<bool>()).prop_flat_map(move |(bits, narrow, is_power)| {
            let scale = f32::from_bits(u32::from(if is_power { bits & 0xff80 } else { bits }) << 16);
            let q_max = if narrow { 7 } else { 127 };
            let near = (1 - 2 * q_max..2 * q_max, -1i32..=1).prop_map(move |(halves, ulps)| {
                let half = halves as f32 / 2.0 * scale;
                if halves == 0 { half } else { f32::from_bits(half.to_bits().wrapping_add_signed(ulps)) }
            });
            many(near.boxed()).prop_map(move |mut block| {
                block[5] = q_max as f32 * scale;
                block
            })
        }),
        // Nothing but denormals.
        many(any::<u32>().prop_map(|m| f32::from_bits(m & 0x807f_ffff)).boxed()),
        // Nothing at all.
        many(prop_oneof![Just(0.0f32), Just(-0.0f32)].boxed()),
        // A single element.
        (0..BLOCK, number()).prop_map(|(at, x)| {
            let mut block = vec![0.0; BLOCK];
            block[at] = x;
            block
        }),
        // As large as can be sent.
        many(
            (0u32..0x90_0000, sign()).prop_map(|(less, sign)| sign * f32::from_bits(LARGEST.to_bits() - less)).boxed()
        ),
        // A largest element whose scale is just below, at or above a bf16; often one of those around 2^-100 (0x0d80),
        // below which a block is sent as zeros.
        (prop_oneof![0x0d7eu16..=0x0d80, 0x3000u16..0x6000], any::<bool>(), -2i32..=2, many((-1.0f32..1.0).boxed()))
            .prop_map(|(scale, narrow, ulps, mut block)| {
                let largest = (if narrow { 7.0 } else { 127.0f32 }) * f32::from_bits(u32::from(scale) << 16);
                block.iter_mut().for_each(|x| *x *= largest * 0.9);
                block[77] = f32::from_bits(largest.to_bits().wrapping_add_signed(ulps));
                block
            }),
    ]
}

/// A gradient of up to five blocks and a rest, each hard in its own way, and the residual that is added to it. Some sums
/// are 2^126 or more, and some residuals are.
pub(crate) fn gradient_and_residual() -> impl Strategy<Value = (Vec<f32>, Vec<f32>)> {
    let gradient = (prop::collection::vec(block(), 1..6), 0..=BLOCK).prop_map(|(blocks, less)| {
        let mut gradient = blocks.concat();
        gradient.truncate(gradient.len() - less);
        gradient
    });
    (gradient, 0..6, prop::collection::vec(number(), BLOCK)).prop_map(|(gradient, kind, numbers)| {
        let residual = gradient
            .iter()
            .zip(numbers.iter().cycle())
            .enumerate()
            .map(|(at, (g, number))| match kind {
                0 => 0.0,
                1 => -0.0,
                // The sum is exactly zero.
                2 => -g,
                3 => g * 0.01,
                // So large that what is held back of it may be too large, and a little of it not.
                4 => f32::from_bits(LARGEST.to_bits() + 0x8_0000 - at as u32 % 64 * 0x4_0000).copysign(*number),
                _ => *number,
            })
            .collect();
        (gradient, residual)
    })
}

/// Deterministic numbers that look like chance: a linear congruential generator (Knuth's MMIX).
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) const fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    /// Close to normal, with mean 0 and variance 1: the sum of twelve uniform numbers.
    pub(crate) fn normal(&mut self) -> f64 {
        (0..12).map(|_| f64::from(self.bits()) / 4_294_967_296.0).sum::<f64>() - 6.0
    }

    pub(crate) fn normals(&mut self, elements: usize) -> Vec<f32> {
        (0..elements).map(|_| self.normal() as f32).collect()
    }
}
