//! Levels, stores and addresses.

use proptest::prelude::*;

use super::inputs::{Chance, gradient_and_residual};
use super::*;

/// A slice at a chosen distance from a multiple of 64 bytes, between elements that nobody may touch.
struct Placed<T> {
    buffer: Vec<T>,
    start: usize,
    len: usize,
    guard: T,
}

impl<T: Copy + PartialEq + fmt::Debug> Placed<T> {
    /// `content` lies so that element number `at` of it is `distance` elements behind a multiple of 64 bytes.
    fn new(content: &[T], guard: T, at: usize, distance: usize) -> Self {
        let line = 64 / size_of::<T>();
        let mut buffer = vec![guard; content.len() + 4 * line];
        let phase = buffer.as_ptr().addr() / size_of::<T>();
        let start = line + (line - (phase + line + at) % line) % line + distance % line;
        buffer[start..start + content.len()].copy_from_slice(content);
        Self { buffer, start, len: content.len(), guard }
    }

    fn get(&mut self) -> &mut [T] {
        &mut self.buffer[self.start..self.start + self.len]
    }

    /// The slice, when nothing around it was written.
    fn untouched_around(&mut self) -> &[T] {
        let (before, rest) = self.buffer.split_at(self.start);
        let (slice, after) = rest.split_at(self.len);
        assert!(before.iter().chain(after).all(|x| *x == self.guard), "something was written outside the slice");
        slice
    }
}

/// Where the values begin in a payload: what the kernels stream is written there.
fn values_at(codec: Codec, elements: usize) -> usize {
    codec.format().map_or(0, |format| Format::scale_bytes(elements) + format.bitmap_bytes(elements))
}

const STORES: [Stores; 2] = [Stores::Cached, Stores::Stream];

/// Distances from a multiple of 64 bytes: of floats and of payloads.
type Distances = (usize, usize);

/// Encodes, decodes and adds at every level and with every store, and compares with the reference.
fn check(codec: Codec, gradient: &[f32], residual: &[f32], (floats, bytes): Distances) {
    let n = gradient.len();
    let expected = reference(codec, gradient, residual);
    let sum_before = Chance::new(31).normals(n);
    let (mut out_expected, mut sum_expected) = (vec![0.0; n], sum_before.clone());
    if expected.found == Found::Finite {
        let payload = Payload::new(codec, n, &expected.payload).expect("our own");
        payload.decode_with(Level::PORTABLE, Stores::Cached, &mut out_expected);
        payload.decode_add_with(Level::PORTABLE, &mut sum_expected);
        // The reference of adding is decoding, and adding.
        let added: Vec<f32> = sum_before.iter().zip(&out_expected).map(|(sum, x)| sum + x).collect();
        same_bits(&added, &sum_expected, format_args!("{codec}: decode and add"));
    }
    for level in Level::available() {
        for stores in STORES {
            let what = format!("{codec} at {level} with {stores:?}, {n} elements, {floats} and {bytes} off");
            let mut values = Placed::new(gradient, 7e37, 0, floats);
            let mut residual = Placed::new(residual, 7e37, 0, floats / 3);
            let content = vec![0xa5; codec.payload_bytes(n)];
            let mut payload = Placed::new(&content, 0x5a, values_at(codec, n), bytes);
            let found = codec.encode_with(level, stores, values.get(), residual.get(), payload.get());
            let encoded = Encoded::new(found, payload.untouched_around(), values.untouched_around());
            assert!(encoded == expected, "{what}");
            residual.untouched_around();
            if found == Found::NonFinite {
                continue;
            }
            let payload = Payload::new(codec, n, payload.untouched_around()).expect("our own");
            let mut out = Placed::new(&vec![f32::NAN; n], 7e37, 0, floats);
            payload.decode_with(level, stores, out.get());
            same_bits(out.untouched_around(), &out_expected, format_args!("decoded: {what}"));
            let mut sum = Placed::new(&sum_before, 7e37, 0, floats);
            payload.decode_add_with(level, sum.get());
            same_bits(sum.untouched_around(), &sum_expected, format_args!("added: {what}"));
        }
    }
}

proptest! {
    #[test]
    fn every_level_and_store_gives_the_bits_of_the_reference_on_hard_inputs(
        (gradient, residual) in gradient_and_residual(),
        distances in prop_oneof![Just((0, 0)), Just((0, 32)), (0usize..16, 0usize..64)],
    ) {
        for codec in Codec::ALL {
            check(codec, &gradient, &residual, distances);
        }
    }
}

#[test]
fn every_level_and_store_gives_the_bits_of_the_reference_at_every_length() {
    let (gradient, residual) = (Chance::new(32).normals(400), Chance::new(33).normals(400));
    for codec in Codec::ALL {
        for n in 0..=gradient.len() {
            check(codec, &gradient[..n], &residual[..n], (n, 3 * n));
        }
    }
}

#[test]
fn every_level_and_store_gives_the_bits_of_the_reference_at_every_address() {
    let (gradient, residual) = (Chance::new(34).normals(300), Chance::new(35).normals(300));
    for codec in Codec::ALL {
        for distance in 0..64 {
            check(codec, &gradient, &residual, (distance % 16, distance));
        }
    }
}

/// Every order and tie of four sizes, in every place of a block: all that the choice of two of four can meet.
#[test]
fn every_level_chooses_the_same_two_of_four_in_every_order() {
    for sizes in [[0.0f32, 1.0, 2.0, 3.0], [f32::from_bits(1), -0.0, 1e-40, 0.5], [1.0, -1.0, 1.0 + f32::EPSILON, -2.0]]
    {
        let groups: Vec<[f32; 4]> =
            (0..256).map(|number| [0, 1, 2, 3].map(|place| sizes[number >> (2 * place) & 3])).collect();
        for shift in 0..32 {
            let mut y: Vec<f32> = groups.iter().cycle().skip(shift).take(256).flatten().copied().collect();
            // A scale, so that no block is one of zeros.
            y.iter_mut().step_by(BLOCK).for_each(|first| *first = 4.0);
            for codec in [Codec::Sparse24Int8, Codec::Sparse24Int4] {
                check(codec, &y, &vec![0.0; y.len()], (0, 0));
            }
        }
    }
}

/// Every value that a payload can hold, under every scale that one byte of exponent allows.
#[test]
fn every_level_decodes_every_value_under_every_scale() {
    for (codec, q_max) in [(Codec::Int8, 127), (Codec::Int4, 7), (Codec::Sparse24Int8, 127), (Codec::Sparse24Int4, 7)] {
        for exponent in -100..=117 {
            let scale = 2.0f32.powi(exponent) * 1.992_187_5;
            let y: Vec<f32> =
                (0..4 * BLOCK as i32).map(|i| ((i * 5 + i / 128) % (2 * q_max + 1) - q_max) as f32 * scale).collect();
            check(codec, &y, &vec![0.0; y.len()], (0, 0));
        }
    }
}

/// The control: one unit in the last place of one element is noticed.
#[test]
#[should_panic(expected = "at 130 of 200")]
fn another_bit_is_noticed() {
    let a = Chance::new(36).normals(200);
    let mut b = a.clone();
    b[130] = f32::from_bits(b[130].to_bits() ^ 1);
    same_bits(&a, &b, "the control");
}

/// The control: a write outside a slice is noticed.
#[test]
#[should_panic(expected = "outside the slice")]
fn a_write_outside_a_slice_is_noticed() {
    let mut placed = Placed::new(&[1u8, 2, 3], 9, 0, 5);
    assert_eq!(placed.untouched_around(), [1, 2, 3]);
    placed.buffer[placed.start + 3] = 0;
    placed.untouched_around();
}

#[test]
fn a_slice_is_placed_where_it_is_wanted() {
    for distance in 0..16 {
        let mut placed = Placed::new(&[0.0f32; 20], 1.0, 3, distance);
        assert_eq!(placed.get()[3..].as_ptr().addr() % 64, 4 * distance);
    }
}

#[test]
fn the_best_level_is_the_last_of_those_that_are_there() {
    let levels = Level::available();
    assert_eq!((levels[0], levels.last().copied()), (Level::PORTABLE, Some(Level::best())));
    let names: Vec<String> = levels.iter().map(ToString::to_string).collect();
    assert_eq!(names, ["portable", "avx2", "avx512"][..names.len()]);
}

#[test]
fn a_copy_is_a_copy_at_every_level_length_and_address() {
    let from = Chance::new(37).normals(100);
    for level in Level::available() {
        for n in 0..from.len() {
            for distance in [0, 1, 8] {
                let mut to = Placed::new(&vec![f32::NAN; n], 7e37, 0, distance);
                copy::stream(level, &from[..n], to.get());
                same_bits(to.untouched_around(), &from[..n], level);
            }
        }
    }
}
