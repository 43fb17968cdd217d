//! Steps that touch some rows of a table.

use super::*;
use crate::frame::HEADER_BYTES;

const NAME: &str = "model.embed_tokens.weight";
/// Elements of the table.
const ELEMENTS: usize = 300 * ROW;

/// Two sides as those of [`side`], but that the table has this name.
fn sides(name: &str, codec: Codec) -> Vec<Exchange> {
    let mut parameters = plan().parameters().to_vec();
    parameters[TABLE].name = name.into();
    let plan = Arc::new(Plan::new(parameters, 1 << 18).expect("small"));
    (0..2).map(|rank| Exchange::new(plan.clone(), group(rank, 2, 32), codec)).collect()
}

/// A gradient of the table alone.
fn touched(rank: usize, number: u64, tensor: usize) -> Vec<f32> {
    let mut gradient = gradient(rank, number, tensor);
    if tensor != TABLE {
        gradient.fill(0.0);
    }
    gradient
}

/// What rank 0 sends of a tensor with this name in the first step and in the second.
fn sent(name: &str, codec: Codec) -> [usize; 2] {
    let mut sides = sides(name, codec);
    [1, 2].map(|number| step(&mut sides, number, |rank, tensor| touched(rank, number, tensor), |n| n - 1).1[0])
}

#[test]
fn rows_that_a_step_does_not_touch_are_not_sent() {
    // What the other tensors take, and everything that does not depend on the table's values.
    let rest = (77 + 150) * size_of::<f32>() + 64 * HEADER_BYTES;
    for codec in [Codec::Fp32, Codec::Bf16, Codec::Int8] {
        let whole = codec.payload_bytes(ELEMENTS);
        for bytes in sent(NAME, codec) {
            // An eighth of half the table as a gradient, two eighths of the other half as a sum; a bit for each 64 bytes.
            assert!(bytes < whole * 3 / 16 + whole / 512 + whole / 64 + rest, "{codec}: {bytes} of {whole} bytes");
        }
    }
    // The control: another tensor sends in the second step what it left out of the rows of the first one.
    let [first, second] = sent("table", Codec::Int8);
    assert!(second > first + Codec::Int8.payload_bytes(ELEMENTS) / 8, "{first}, then {second} bytes");
}

#[test]
fn what_was_left_out_of_a_row_waits_until_it_is_touched_again_and_nothing_is_lost() {
    let (mut sides, mut exact) = (sides(NAME, Codec::Int8), Exact::default());
    let left = |side: &Exchange, row: usize| residuals(side, TABLE)[0][row * ROW..][..ROW].to_vec();
    // Rank 0 sends what rank 1 owns: the rows of the second half. This one is touched in steps 1 and 5.
    let row = (150..300).find(|&row| touches(0, 1, row) && touches(0, 5, row)).expect("every fourth step");
    let mut kept: Option<Vec<f32>> = None;
    for number in 1..6 {
        let given = |rank, tensor| touched(rank, number, tensor);
        assert_eq!(booked(&mut exact, &mut sides, number, given), Verdict::Commit);
        assert_eq!(sums(&sides[0]), sums(&sides[1]), "replicas");
        let now = left(&sides[0], row);
        match &kept {
            None => assert!(now.iter().any(|&x| x != 0.0), "something is left out"),
            Some(kept) => assert_eq!(*kept == now, number < 5, "step {number}"),
        }
        kept = Some(now);
    }
    // Once nothing is to be left out any more, everything that waits is sent, touched or not.
    let mut all = exact.clone();
    remembered(&mut all, &sides, false);
    assert!(all.is_zero(), "the ledger");
    sides.iter_mut().for_each(Exchange::flush);
    step(&mut sides, 6, |_, tensor| vec![0.0; gradient(0, 1, tensor).len()], |n| n - 1);
    assert!(sides.iter().all(|side| residuals(side, TABLE).concat().iter().all(|&x| x == 0.0)), "all was sent");
}
