//! What is read of frames, and what is refused.

use proptest::prelude::*;

use super::*;

fn header() -> Header {
    let (phase, codec) = (Phase::Gather, Codec::Int8);
    Header { phase, codec, epoch: 3, step: 1 << 40, bucket: 5, tensor: 7, start: 256, elements: 200 }
}

fn frame() -> Bytes {
    header().frame(&[9; 204])
}

fn half_zeros() -> Bytes {
    header().frame(&[[0; 128].as_slice(), &[9; 76]].concat())
}

fn read(bytes: &[u8]) -> Result<(Header, Bytes), FrameError> {
    Header::read(&Bytes::copy_from_slice(bytes))
}

#[test]
fn a_frame_comes_back_as_it_was() {
    let out = frame();
    assert_eq!(out.len(), HEADER_BYTES + 204);
    assert_eq!(Header::read(&out), Ok((header(), Bytes::from_static(&[9; 204]))));
}

#[test]
fn every_codec_has_a_number_of_its_own() {
    for codec in Codec::ALL {
        assert_eq!(codec_of_number(codec_number(codec)), Some(codec));
    }
    assert_eq!(codec_of_number(6), None);
}

#[test]
fn a_packed_frame_is_smaller_and_has_the_same_payload() {
    let mut packer = Packer::new().expect("memory");
    let packed = pack(&frame(), &mut packer).expect("204 equal bytes");
    assert!(packed.len() < frame().len() - 150, "{}", packed.len());
    assert_eq!(Header::read(&packed), Header::read(&frame()));
    // Noise does not get smaller, and stays as it is.
    let noise: Vec<u8> = (0..204u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    assert_eq!(pack(&header().frame(&noise), &mut packer), None);
}

#[test]
fn a_zstd_frame_of_another_size_or_none_at_all_is_refused_without_taking_its_memory() {
    // A thousand million zeros in a few bytes: only the payload's 204 are taken.
    let bomb = zstd::bulk::compress(&vec![0; 1 << 27], 1).expect("compresses");
    for (body, why) in
        [(&bomb[..], ""), (&[0u8; 20][..], ""), (&zstd::bulk::compress(&[1; 100], 1).expect("ok"), "100 bytes")]
    {
        let error = Header::read(&header().write(ZSTD, body)).expect_err("not the payload").to_string();
        assert!(
            error.contains("a zstd frame that holds the 204 bytes of a int8 payload") && error.contains(why),
            "{error}"
        );
    }
}

#[test]
fn a_frame_without_its_zeros_is_smaller_and_has_the_same_payload() {
    let out = half_zeros();
    assert_eq!(out.len(), HEADER_BYTES + 1 + 204 - 128, "lines 0 and 1 of four are zeros");
    let payload = [[0; 128].as_slice(), &[9; 76]].concat();
    assert_eq!(Header::read(&out), Ok((header(), payload.into())));
    assert_eq!(pack(&out, &mut Packer::new().expect("memory")), None, "one or the other");
    let error = Header::read(&header().write(ZEROS, &[3])).expect_err("no line follows").to_string();
    assert!(error.contains("the 204 bytes of a int8 payload") && error.contains("line 0 of 4 is missing"), "{error}");
}

#[test]
fn every_flipped_bit_is_noticed() {
    let packed = pack(&frame(), &mut Packer::new().expect("memory")).expect("smaller");
    for out in [frame(), packed, half_zeros()] {
        for at in 0..8 * out.len() {
            let mut bytes = out.to_vec();
            bytes[at / 8] ^= 1 << (at % 8);
            assert!(read(&bytes).is_err(), "bit {at}");
        }
    }
}

#[test]
fn cut_trailing_foreign_newer_and_stale_frames_have_a_name() {
    let out = frame();
    assert_eq!(read(&out[..51]), Err(FrameError::Short { found: 51 }));
    assert!(matches!(read(&out[..out.len() - 1]), Err(FrameError::Length { expected: 204, found: 203, .. })));
    assert!(matches!(read(&[&out[..], &[0]].concat()), Err(FrameError::Length { found: 205, .. })));
    assert!(matches!(read(&[b'G'; 60]), Err(FrameError::Magic { .. })));
    let with = |at: usize, value: u8| {
        let mut bytes = out.to_vec();
        bytes[at] = value;
        read(&bytes).map(|_| ())
    };
    assert_eq!(with(4, 2), Err(FrameError::Version { found: 2 }));
    assert_eq!(with(6, 3), Err(FrameError::Unknown { field: "phase", found: 3 }));
    assert_eq!(with(7, 200), Err(FrameError::Unknown { field: "codec", found: 200 }));
    assert_eq!(with(8, 4), Err(FrameError::Unknown { field: "flags", found: 4 }));
    assert_eq!(with(8, 3), Err(FrameError::Unknown { field: "flags", found: 3 }), "one or the other");
    assert_eq!(with(9, 1), Err(FrameError::Unknown { field: "flags", found: 1 }));
    assert!(matches!(with(47, 0xff), Err(FrameError::Large { .. })));
    assert!(matches!(with(43, 0xff), Err(FrameError::Large { .. })));
    let (header, _) = Header::read(&out).expect("ours");
    assert_eq!(header.check_now(3, 1 << 40), Ok(()));
    assert!(matches!(header.check_now(3, 1), Err(FrameError::Stale { found_step, .. }) if found_step == 1 << 40));
    assert!(header.check_now(4, 1 << 40).is_err());
}

proptest! {
    #[test]
    fn bytes_from_anywhere_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), ours in any::<bool>()) {
        if ours && bytes.len() >= 12 {
            bytes[..12].copy_from_slice(&frame()[..12]);
        }
        prop_assert!(read(&bytes).is_err());
    }
}
