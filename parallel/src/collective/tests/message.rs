//! Messages as bytes.

use bytes::Bytes;

use super::super::message::{Body, Leg, Message, MessageError, SITE_BYTES_MAX, VERSION};
use super::*;

fn call() -> Call {
    Call {
        operation: Operation::AllReduce,
        dtype: Dtype::Bf16,
        reduction: Some(Reduction::Max),
        epoch: 3,
        group: 0x0123_4567_89ab_cdef,
        sequence: 1 << 40,
        elements: 1000,
        root: 0,
        site: "model.layers.3.mlp/forward".into(),
    }
}

fn message() -> Message {
    Message { call: call(), body: Body::Piece { leg: Leg::Out, offset: 998, bytes: Bytes::from_static(&[1, 2, 3, 4]) } }
}

/// With the checksum that it should have.
fn mended(message: &Message, change: impl FnOnce(&mut Vec<u8>)) -> Result<Message, MessageError> {
    let mut bytes = message.write().to_vec();
    change(&mut bytes);
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&bytes[..56]), &bytes[60..]);
    bytes[56..60].copy_from_slice(&checksum.to_le_bytes());
    Message::read(&bytes.into())
}

#[test]
fn a_message_comes_back_as_it_was() {
    let refusal = Message { call: call(), body: Body::Refusal("rank 1 is elsewhere".into()) };
    let give = Call { operation: Operation::Broadcast, reduction: None, root: 5, site: String::new(), ..call() };
    let nothing = Body::Piece { leg: Leg::In, offset: 0, bytes: Bytes::new() };
    let long = Call { site: "x".repeat(SITE_BYTES_MAX), ..call() };
    for message in
        [message(), refusal, Message { call: give, body: nothing.clone() }, Message { call: long, body: nothing }]
    {
        assert_eq!(Message::read(&message.write()), Ok(message));
    }
}

#[test]
fn what_stands_in_the_header_is_where_the_page_says() {
    let bytes = message().write();
    assert_eq!(bytes.len(), 60 + 26 + 4);
    assert_eq!(bytes[..12], [b'T', b'R', b'I', b'C', VERSION as u8, 0, 0, 1, 1, 2, 1, 26]);
    assert_eq!(bytes[12..24], [3, 0, 0, 0, 0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 0x01]);
    assert_eq!(bytes[24..40], [0, 0, 0, 0, 0, 1, 0, 0, 0xe8, 3, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[40..56], [0xe6, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0]);
    assert_eq!(&bytes[60..86], b"model.layers.3.mlp/forward");
}

#[test]
fn whatever_is_not_as_it_should_be_has_a_name() {
    let check = |found: Result<Message, MessageError>, words: &str| {
        let error = found.expect_err(words).to_string();
        assert!(error.contains(words), "{error}");
    };
    assert_eq!(mended(&message(), |_| {}), Ok(message()), "the control: it is mended");
    check(Message::read(&Bytes::from_static(b"TRIC")), "at least 60 bytes, 4 came");
    let set = |at: usize, to: u8| mended(&message(), |bytes| bytes[at] = to);
    check(set(0, b'X'), "starts with \"TRIC\"");
    check(set(4, 2), "version 2 came");
    check(set(6, 2), "kind of a collective message is 2");
    check(set(7, 7), "operation of a collective message is 7");
    check(set(8, 5), "dtype of a collective message is 5");
    check(set(9, 0), "reduction of a collective message is 0");
    check(set(9, 4), "reduction of a collective message is 4");
    check(set(7, 2), "reduction of a collective message is 2");
    check(set(10, 2), "leg of a collective message is 2");
    check(set(48, 1), "root of a collective message is 1");
    check(set(60, 0xff), "site of a collective message is no UTF-8");
    check(set(40, 0xe7), "4 bytes from element 999 on are no piece of 1000 elements of 2 bytes");
    check(mended(&message(), |bytes| bytes[40..48].fill(0xff)), "are no piece of 1000 elements");
    check(mended(&message(), |bytes| bytes[55] = 1), "at most 4194304 bytes, the header names 16777220");
    check(mended(&message(), |bytes| bytes.push(0)), "has 30 bytes after it, 31 came");
    let odd = |bytes: &mut Vec<u8>| {
        bytes.pop();
        bytes[52] = 3;
    };
    check(mended(&message(), odd), "3 bytes from element 998 on are no piece");
    let refusal = Message { call: call(), body: Body::Refusal("é".into()) };
    check(mended(&refusal, |bytes| bytes[86] = b'e'), "refusal of a collective message is no UTF-8");
    check(mended(&refusal, |bytes| bytes[40] = 1), "offset of a collective message is 1");
    check(mended(&refusal, |bytes| bytes[10] = 1), "leg of a collective message is 1");
    check(mended(&refusal, |bytes| bytes[53] = 0x20), "at most 4096 bytes, the header names 8194");
    check(Message::read(&Bytes::from([&message().write()[..89], &[0]].concat())), "checksum");
}

#[test]
fn every_flipped_bit_is_noticed() {
    let bytes = message().write();
    for bit in 0..8 * bytes.len() {
        let mut flipped = bytes.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(Message::read(&flipped.into()).is_err(), "bit {bit}");
    }
}

proptest! {
    #[test]
    fn a_change_under_a_right_checksum_is_refused_or_is_another_message(at in 4usize..90, to: u8) {
        let mut spoiled = message().write().to_vec();
        spoiled[at] = to;
        if let Ok(read) = mended(&message(), |bytes| bytes[at] = to) {
            let written = read.write();
            prop_assert!(written[..56] == spoiled[..56] && written[60..] == spoiled[60..]);
            prop_assert_eq!(Message::read(&written), Ok(read));
        }
    }
}
