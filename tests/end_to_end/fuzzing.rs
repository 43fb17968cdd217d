//! The fuzz targets of `tests/fuzz` as ordinary tests: the corpus, and seeded mutations of it. `docs/testing.md` has
//! the commands that run libFuzzer.

use std::path::Path;

use compression::{Codec, Found, Level, Payload, Stores};
// Where the targets look for them: the other crate that they are part of has only these of `parallel`.
use parallel::collective::message;
use parallel::frame;
use parallel::note;

use targets::Seen;

#[path = "../fuzz/src/targets.rs"]
mod targets;

const MUTATIONS: u64 = 20_000;

#[test]
fn whatever_the_bytes_are_a_payload_is_refused_or_read_the_same_by_all() {
    replay("payload", targets::payload);
}

#[test]
fn whatever_the_floats_are_they_cannot_be_sent_or_come_back_whole() {
    replay("encode", targets::encode);
}

#[test]
fn whatever_the_bytes_are_a_frame_is_refused_or_is_what_it_says() {
    replay("frame", targets::frame);
}

#[test]
fn whatever_the_bytes_are_a_collective_message_is_refused_or_is_what_it_says() {
    replay("collective", targets::collective);
}

#[test]
fn whatever_the_bytes_are_a_note_is_refused_or_is_what_it_says() {
    replay("note", targets::note);
}

/// The control of what is above: each target with something wrong in it.
#[test]
fn a_wrong_decoder_encoder_or_reader_is_noticed() {
    let last_element_forgotten = |payload: &Payload<&[u8]>, level: Level, stores: Stores, out: &mut [f32]| {
        payload.decode_with(level, stores, out);
        if let Some(last) = out.last_mut() {
            *last = 0.0;
        }
    };
    assert!(is_noticed("payload", |data| targets::payload_with(data, last_element_forgotten)));

    let nothing_is_left = |codec: Codec, level, stores, values: &mut [f32], residual: &[f32], payload: &mut [u8]| {
        let found: Found = codec.encode_with(level, stores, values, residual, payload);
        values.fill(0.0);
        found
    };
    assert!(is_noticed("encode", |data| targets::encode_with(data, nothing_is_left)));

    let last_byte_changed = |data: &[u8]| {
        targets::read(data).map(|(header, mut payload)| {
            payload.iter_mut().next_back().into_iter().for_each(|byte| *byte ^= 1);
            (header, payload)
        })
    };
    assert!(is_noticed("frame", |data| targets::frame_with(data, last_byte_changed)));

    let reduction_forgotten = |data: &[u8]| {
        targets::read_message(data).map(|mut message| {
            message.call.reduction = None;
            message
        })
    };
    assert!(is_noticed("collective", |data| targets::collective_with(data, reduction_forgotten)));

    let asked_to_stop = |data: &[u8]| {
        note::Note::read(data).map(|(mut note, epoch, step)| {
            if let note::Note::Ballot(ballot, _) = &mut note {
                ballot.stop = true;
            }
            (note, epoch, step)
        })
    };
    assert!(is_noticed("note", |data| targets::note_with(data, asked_to_stop)));
}

/// Runs the corpus of a target, all of which is taken, and mutations of it, of which at least a twentieth is taken and
/// as many are refused.
fn replay(name: &str, target: fn(&[u8]) -> Seen) {
    let corpus = corpus(name);
    for (file, data) in &corpus {
        assert_eq!(target(data), Seen::Taken, "{name}/{file}");
    }
    let mut taken = 0;
    for seed in 0..MUTATIONS {
        let data = mutated(&corpus, &mut Random(seed));
        let seen = std::panic::catch_unwind(|| target(&data));
        let seen = seen.unwrap_or_else(|_| panic!("{name}: the mutation of seed {seed}: {data:02x?}"));
        taken += u64::from(seen == Seen::Taken);
    }
    assert!((MUTATIONS / 20..=MUTATIONS / 20 * 19).contains(&taken), "{name}: {taken} of {MUTATIONS} taken");
}

fn is_noticed(name: &str, target: impl Fn(&[u8]) -> Seen + std::panic::RefUnwindSafe) -> bool {
    corpus(name).iter().any(|(_, data)| std::panic::catch_unwind(|| target(data)).is_err())
}

/// Names and contents, in the order of the names.
fn corpus(name: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let files = std::fs::read_dir(&folder).expect("the folder of the corpus");
    let names = files.map(|file| file.expect("a file of the corpus").file_name().to_string_lossy().into_owned());
    let read = |file: String| (file.clone(), std::fs::read(folder.join(file)).expect("a file of the corpus"));
    let mut corpus: Vec<_> = names.map(read).collect();
    corpus.sort();
    assert!(corpus.len() >= 2 * Codec::ALL.len(), "two seeds a codec at least");
    corpus
}

/// A file of the corpus with one to four changes.
fn mutated(corpus: &[(String, Vec<u8>)], random: &mut Random) -> Vec<u8> {
    let any_file = |random: &mut Random| corpus[random.below(corpus.len())].1.clone();
    let mut data = any_file(random);
    for _ in 0..=random.below(4) {
        let at = random.below(data.len());
        match random.below(8) {
            0..3 => data[at] ^= 1 << random.below(8),
            3 => data[at] = random.below(256) as u8,
            4 => data[at] = [0x00, 0x01, 0x08, 0x33, 0x7f, 0x80, 0x88, 0xff][random.below(8)],
            5 => data.insert(at, random.below(256) as u8),
            6 if data.len() > 1 => drop(data.remove(at)),
            // The rest of another file.
            _ => {
                let other = any_file(random);
                data.truncate(at + 1);
                data.extend(&other[random.below(other.len())..]);
            }
        }
    }
    data
}

/// `SplitMix64`: the same mutations in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) % bound as u64) as usize
    }
}
