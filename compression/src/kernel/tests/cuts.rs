//! Cuts on block borders, and threads.

use proptest::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::inputs::{Chance, gradient_and_residual};
use super::*;

/// The planes of a payload, each by itself.
fn planes(codec: Codec, payload: &[u8], elements: usize) -> [Vec<u8>; 3] {
    let Planes { scales, bitmap, values } = Planes::of(codec, payload, elements);
    [scales, bitmap, values].map(<[u8]>::to_vec)
}

proptest! {
    #[test]
    fn a_cut_on_any_block_borders_changes_no_bit(
        (gradient, residual) in gradient_and_residual(),
        cuts in prop::collection::vec(0usize..6, 0..4),
    ) {
        let n = gradient.len();
        let mut borders: Vec<usize> = cuts.iter().map(|cut| (cut * BLOCK).min(n)).chain([0, n]).collect();
        borders.sort_unstable();
        for codec in Codec::ALL {
            let whole = reference(codec, &gradient, &residual);
            for level in Level::available() {
                let (mut joined, mut left, mut decoded) = (<[Vec<u8>; 3]>::default(), Vec::new(), Vec::new());
                let mut found = Found::Finite;
                for range in borders.windows(2).map(|border| border[0]..border[1]) {
                    let mut values = gradient[range.clone()].to_vec();
                    let mut payload = vec![0; codec.payload_bytes(values.len())];
                    let of_piece =
                        codec.encode_with(level, Stores::Stream, &mut values, &residual[range], &mut payload);
                    if of_piece == Found::NonFinite {
                        found = of_piece;
                        continue;
                    }
                    for (joined, plane) in joined.iter_mut().zip(planes(codec, &payload, values.len())) {
                        joined.extend(plane);
                    }
                    let mut out = vec![0.0; values.len()];
                    Payload::new(codec, out.len(), payload).expect("our own").decode_with(level, Stores::Cached, &mut out);
                    left.extend(values);
                    decoded.extend(out);
                }
                prop_assert_eq!(&Encoded::new(found, &joined.concat(), &left), &whole, "{} at {}", codec, level);
                if found == Found::Finite {
                    let mut out = vec![0.0; n];
                    Payload::new(codec, n, &whole.payload[..]).expect("our own").decode(&mut out);
                    prop_assert_eq!(bits(&decoded), bits(&out), "{} at {}", codec, level);
                }
            }
        }
    }
}

/// The control: elsewhere a cut does change bits, for each piece has a scale of its own.
#[test]
fn a_cut_inside_a_block_changes_bits() {
    let mut y = vec![0.3f32; BLOCK];
    y[0] = 1.0;
    for codec in [Codec::Int8, Codec::Int4, Codec::Sparse24Int8, Codec::Sparse24Int4] {
        let zeros = vec![0.0; BLOCK];
        let whole = reference(codec, &y, &zeros).left;
        let halves = y.chunks(64).flat_map(|half| reference(codec, half, &zeros[..64]).left);
        assert!(whole != halves.collect::<Vec<_>>(), "{codec}");
    }
}

/// More than is cut between eight threads, and not a whole number of blocks.
const N: usize = 9 * PIECE + 2 * BLOCK + 77;

fn pools() -> Vec<(usize, ThreadPool)> {
    [1, 2, 3].map(|threads| (threads, ThreadPoolBuilder::new().num_threads(threads).build().expect("threads"))).into()
}

/// Blocks of very different sizes, some of them zero.
fn many(seed: u64) -> Vec<f32> {
    let mut chance = Chance::new(seed);
    let mut values: Vec<f32> = (0..N).map(|_| chance.bits().cast_signed() as f32).collect();
    for block in values.chunks_mut(BLOCK) {
        let size = 2.0f32.powi((chance.bits() % 200) as i32 - 140);
        block.iter_mut().for_each(|x| *x *= size);
    }
    values
}

#[test]
fn any_number_of_threads_encodes_and_decodes_the_same_bits_at_every_level() {
    let (gradient, residual) = (many(41), many(42));
    for codec in Codec::ALL {
        let expected = reference(codec, &gradient, &residual);
        assert_eq!(expected.found, Found::Finite);
        let payload = Payload::new(codec, N, &expected.payload[..]).expect("our own");
        let (mut out_expected, mut sum_expected) = (vec![0.0; N], gradient.clone());
        payload.decode_with(Level::PORTABLE, Stores::Cached, &mut out_expected);
        payload.decode_add_with(Level::PORTABLE, &mut sum_expected);
        for (threads, pool) in pools() {
            pool.install(|| {
                for level in Level::available() {
                    let what = format!("{codec} at {level} by {threads} threads");
                    let mut values = gradient.clone();
                    let mut bytes = vec![0; codec.payload_bytes(N)];
                    let out = PlanesMut::of(codec, &mut bytes, N);
                    let found = level.par_encode(codec, Stores::Stream, &mut values, &residual, out);
                    assert!(Encoded::new(found, &bytes, &values) == expected, "{what}");
                    let mut out = vec![f32::NAN; N];
                    level.par_decode(codec, Stores::Stream, payload.planes(), &mut out);
                    same_bits(&out, &out_expected, format_args!("decoded: {what}"));
                    let mut sum = gradient.clone();
                    level.par_add(codec, payload.planes(), &mut sum);
                    same_bits(&sum, &sum_expected, format_args!("added: {what}"));
                }
                // The same by the functions that others call.
                let (mut values, mut bytes) = (gradient.clone(), vec![0; codec.payload_bytes(N)]);
                let found = codec.par_encode(&mut values, &residual, &mut bytes);
                assert!(Encoded::new(found, &bytes, &values) == expected, "{codec} by {threads} threads");
                let (mut out, mut sum) = (vec![f32::NAN; N], gradient.clone());
                payload.par_decode(&mut out);
                payload.par_decode_add(&mut sum);
                same_bits(&out, &out_expected, format_args!("{codec} decoded by {threads} threads"));
                same_bits(&sum, &sum_expected, format_args!("{codec} added by {threads} threads"));
            });
        }
    }
}

#[test]
fn any_number_of_threads_finds_a_value_that_cannot_be_sent() {
    let zeros = vec![0.0; N];
    for (threads, pool) in pools() {
        for codec in Codec::ALL {
            for at in [0, N / 2 - 1, N / 2, N - BLOCK, N - 1] {
                let mut values = vec![1.0; N];
                values[at] = f32::NAN;
                let mut payload = vec![0; codec.payload_bytes(N)];
                let found = pool.install(|| codec.par_encode(&mut values, &zeros, &mut payload));
                assert_eq!(found, Found::NonFinite, "{codec} by {threads} threads, {at}");
            }
        }
    }
}

#[test]
fn any_number_of_threads_reduces_to_the_same_bits_at_every_level() {
    let own = many(43);
    let payloads: Vec<Payload<Vec<u8>>> = (44..)
        .zip(Codec::ALL)
        .map(|(seed, codec)| {
            let encoded = reference(codec, &many(seed), &vec![0.0; N]);
            Payload::new(codec, N, encoded.payload).expect("our own")
        })
        .collect();
    let mut parts: Vec<_> = payloads.iter().map(Part::Encoded).collect();
    parts.insert(2, Part::Values(&own));
    // Whatever comes first, and by itself: zero plus a negative zero is a zero.
    let negative = vec![-0.0; N];
    for first in parts.iter().chain([&Part::Values(&negative)]) {
        let mut expected = vec![0.0; N];
        match first {
            Part::Encoded(payload) => payload.decode_add_with(Level::PORTABLE, &mut expected),
            Part::Values(values) => expected.iter_mut().zip(*values).for_each(|(sum, value)| *sum += value),
        }
        for level in Level::available() {
            let mut sum = vec![f32::NAN; N];
            level.reduce(std::slice::from_ref(first), 0, &mut sum);
            same_bits(&sum, &expected, level);
        }
    }
    let mut expected = vec![0.0; N];
    for part in &parts {
        match part {
            Part::Encoded(payload) => payload.decode_add_with(Level::PORTABLE, &mut expected),
            Part::Values(values) => expected.iter_mut().zip(*values).for_each(|(sum, value)| *sum += value),
        }
    }
    for level in Level::available() {
        let mut sum = vec![f32::NAN; N];
        level.reduce(&parts, 0, &mut sum);
        same_bits(&sum, &expected, level);
        // Any part of it by itself: from a block border on.
        let start = 3 * BLOCK;
        let mut some = vec![f32::NAN; 2 * SUMMED + 5 * BLOCK];
        level.reduce(&parts, start, &mut some);
        same_bits(&some, &expected[start..start + some.len()], level);
        for (threads, pool) in pools() {
            let mut sum = vec![f32::NAN; N];
            pool.install(|| level.par_reduce(&parts, 0, &mut sum));
            same_bits(&sum, &expected, format_args!("{level} by {threads} threads"));
        }
    }
    let mut sum = vec![f32::NAN; N];
    crate::codec::par_reduce(&parts, &mut sum);
    same_bits(&sum, &expected, "as others call it");
    crate::codec::par_reduce::<Vec<u8>>(&[], &mut sum);
    assert!(sum.iter().all(|x| x.to_bits() == 0), "the sum of nothing is zero");
}

/// The control: work of this size is cut, and on block borders.
#[test]
fn what_is_cut_between_threads_is_cut_on_block_borders() {
    assert_eq!(middle(2 * PIECE - 1), None);
    for elements in [2 * PIECE, 2 * PIECE + 1, N, 3 * PIECE + 130] {
        let middle = middle(elements).expect("a cut");
        assert!(middle.is_multiple_of(BLOCK) && middle >= PIECE && elements - middle >= PIECE, "{elements}");
    }
    assert_eq!((Stores::for_bytes((16 << 20) - 1), Stores::for_bytes(16 << 20)), (Stores::Cached, Stores::Stream));
}

#[test]
fn a_copy_by_many_threads_is_a_copy() {
    let from = many(50);
    for level in Level::available() {
        for (_, pool) in pools() {
            let mut to = vec![f32::NAN; N];
            pool.install(|| copy::par_stream(level, &from, &mut to));
            same_bits(&to, &from, level);
            to.fill(f32::NAN);
            pool.install(|| copy::par_cached(&from, &mut to));
            same_bits(&to, &from, "into the caches");
        }
    }
}
