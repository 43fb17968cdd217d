//! Parts of a payload, and copies of it.

use super::*;

#[test]
fn every_part_of_whole_blocks_is_that_of_the_whole() {
    let elements = 9 * BLOCK + 37;
    let values: Vec<f32> = (0..elements).map(|at| (at as f32 * 0.37).sin() * (at / BLOCK) as f32).collect();
    for codec in Codec::ALL {
        let (_, bytes, _) = encode(codec, &values);
        let whole = decode(codec, &bytes, elements);
        let payload = Payload::new(codec, elements, &bytes[..]).expect("our own payload");
        let copy = payload.copy_to(vec![1; 7]);
        assert_eq!(copy.bytes(), &bytes);
        let edges: Vec<usize> = (0..elements).step_by(BLOCK).chain([elements]).collect();
        for (from, &start) in edges.iter().enumerate() {
            for &end in edges[from..].iter().filter(|_| start < elements) {
                let mut out = vec![f32::NAN; end - start];
                copy.decode_part(start, &mut out);
                assert_eq!(bits(&out), bits(&whole[start..end]), "{codec}: {start}..{end}");
            }
        }
        assert_eq!(copy.into_bytes(), bytes);
    }
}

#[test]
fn a_part_of_a_block_or_behind_the_end_is_refused() {
    let (_, bytes, _) = encode(Codec::Int8, &[1.0; 3 * BLOCK]);
    let payload = Payload::new(Codec::Int8, 3 * BLOCK, bytes).expect("our own payload");
    for (start, length) in [(1, BLOCK), (0, BLOCK - 1), (BLOCK, 3 * BLOCK), (4 * BLOCK, 0)] {
        let refused = std::panic::catch_unwind(|| payload.decode_part(start, &mut vec![0.0; length]));
        assert!(refused.is_err(), "{length} elements from {start}");
    }
    // The control.
    payload.decode_part(BLOCK, &mut vec![0.0; 2 * BLOCK]);
}
