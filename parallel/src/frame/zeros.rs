//! Payloads without their zeros.
//!
//! Of a table of embeddings only the rows whose tokens a step has seen have a gradient, and of a mixture the experts that were
//! asked: the payload of the others is zeros. A payload is looked at in **lines** of 64 bytes from its beginning, the last of
//! which may be shorter. What stands in the frame is one bit a line, line `i` at bit `i % 8` (from the lowest) of byte `i / 8`,
//! 1 for a line that follows and 0 for one of zeros, the bits after the last line 0; and then the lines that follow, in their
//! order.

const LINE: usize = 64;
/// Zeros are left out where that saves this part of the payload. Looking for them in one without costs a byte a line.
const WORTH: usize = 8;

/// What stands for the payload in a frame, if that is worth having.
pub(super) fn left_out(payload: &[u8]) -> Option<Vec<u8>> {
    // Compared as a whole, without an early end: most lines of a table are zeros to their last byte.
    let is_zero = |line: &[u8]| line[0] == 0 && *line == [0; LINE][..line.len()];
    let saved: usize = payload.chunks(LINE).filter(|line| is_zero(line)).map(<[u8]>::len).sum();
    let bits = bit_bytes(payload.len());
    if saved == 0 || saved < bits + payload.len().div_ceil(WORTH) {
        return None;
    }
    let mut out = Vec::with_capacity(bits + payload.len() - saved);
    out.resize(bits, 0);
    for (index, line) in payload.chunks(LINE).enumerate().filter(|(_, line)| !is_zero(line)) {
        out[index / 8] |= 1 << (index % 8);
        out.extend_from_slice(line);
    }
    Some(out)
}

/// The payload of so many bytes, or what is wrong. No more memory is taken, whatever the bits say.
pub(super) fn restored(body: &[u8], payload_bytes: usize) -> Result<Vec<u8>, String> {
    let (bits, mut rest) = body
        .split_at_checked(bit_bytes(payload_bytes))
        .ok_or_else(|| format!("{} bytes came, one bit a line takes {}", body.len(), bit_bytes(payload_bytes)))?;
    let lines = payload_bytes.div_ceil(LINE);
    if let Some(last) = bits.last().filter(|&&last| !lines.is_multiple_of(8) && last >> (lines % 8) != 0) {
        return Err(format!("bits after the last line are set: {last:#010b}"));
    }
    let mut out = vec![0; payload_bytes];
    for (index, line) in out.chunks_mut(LINE).enumerate().filter(|(index, _)| bits[index / 8] >> (index % 8) & 1 == 1) {
        let (bytes, after) =
            rest.split_at_checked(line.len()).ok_or_else(|| format!("line {index} of {lines} is missing, or cut"))?;
        line.copy_from_slice(bytes);
        rest = after;
    }
    match rest {
        [] => Ok(out),
        more => Err(format!("{} bytes follow the last line", more.len())),
    }
}

const fn bit_bytes(payload_bytes: usize) -> usize {
    payload_bytes.div_ceil(LINE).div_ceil(8)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_of_zeros_take_a_bit_each_and_all_others_stay_as_they_are() {
        // Lines 0 and 2 of three and a half are zeros; the last byte of line 1 alone is not.
        let mut payload = vec![0; 3 * LINE + 32];
        payload[2 * LINE - 1] = 5;
        payload[3 * LINE..].fill(7);
        let expected = [&[0b1010][..], &[0; LINE - 1], &[5], &[7; 32]].concat();
        assert_eq!(left_out(&payload), Some(expected.clone()));
        assert_eq!(restored(&expected, payload.len()), Ok(payload));
        assert_eq!(left_out(&[0; 1000]), Some(vec![0; 2]));
        // What saves less than an eighth is left as it is.
        assert_eq!(left_out(&[1; 1000]), None);
        assert_eq!(left_out(&[]), None);
        let mut dense = vec![1; 32 * LINE];
        dense[..4 * LINE].fill(0);
        assert_eq!(left_out(&dense), None);
        dense[..5 * LINE].fill(0);
        assert!(left_out(&dense).is_some());
    }

    #[test]
    fn what_is_no_such_payload_is_named() {
        let why = |body: &[u8], bytes| restored(body, bytes).expect_err("refused");
        assert_eq!(why(&[], 65), "0 bytes came, one bit a line takes 1");
        assert_eq!(why(&[0b100], 65), "bits after the last line are set: 0b00000100");
        assert_eq!(why(&[0b1, 1, 2, 3], 65), "line 0 of 2 is missing, or cut");
        assert_eq!(why(&[0b10, 1, 2, 3], 65), "2 bytes follow the last line");
        assert_eq!(restored(&[0; 2], 16 * LINE).map(|payload| payload.len()), Ok(16 * LINE));
    }

    proptest! {
        #[test]
        fn any_payload_comes_back(lines in prop::collection::vec((any::<bool>(), any::<u8>()), 0..40), cut in 0..LINE) {
            let mut payload: Vec<u8> = lines.iter().flat_map(|&(zero, byte)| [if zero { 0 } else { byte }; LINE]).collect();
            payload.truncate(payload.len().saturating_sub(cut));
            if let Some(body) = left_out(&payload) {
                prop_assert!(body.len() < payload.len());
                prop_assert_eq!(restored(&body, payload.len()), Ok(payload));
            }
        }

        #[test]
        fn bytes_from_anywhere_are_refused_or_make_a_payload(body in prop::collection::vec(any::<u8>(), 0..300), bytes in 0usize..2000) {
            if let Ok(payload) = restored(&body, bytes) {
                prop_assert_eq!(payload.len(), bytes);
            }
        }
    }
}
