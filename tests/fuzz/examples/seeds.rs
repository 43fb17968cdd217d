//! Writes the seeds of the corpus again, in the root of the repository:
//!
//! ```text
//! cargo run --manifest-path tests/fuzz/Cargo.toml --example seeds
//! ```

use std::path::Path;

use bytes::Bytes;
use compression::{Codec, Found};
use fuzz::call::{Call, Dtype, Operation, Reduction};
use fuzz::data::norm::SquaredNorm;
use fuzz::frame::{Header, Packer, Phase, pack};
use fuzz::message::{Body, Leg, Message};
use fuzz::note::{Ballot, Note};
use fuzz::targets;

fn main() -> std::io::Result<()> {
    for (name, message) in messages() {
        write_file("collective", name, &message.write())?;
    }
    for (name, note) in notes() {
        write_file("note", &name, &note.write(3, 40))?;
    }
    let mut packer = Packer::new()?;
    for (number, codec) in Codec::ALL.into_iter().enumerate() {
        let number = number as u8;
        for (name, values) in inputs() {
            // The input of the targets `encode` ...
            let pairs = values.iter().flat_map(|value| [*value, value * 0.01]).flat_map(f32::to_le_bytes);
            write("encode", codec, name, &[number].into_iter().chain(pairs).collect::<Vec<u8>>())?;
            // ... `payload` ...
            let mut payload = vec![0; codec.payload_bytes(values.len())];
            let found = codec.encode(&mut values.clone(), &vec![0.0; values.len()], &mut payload);
            assert_eq!(found, Found::Finite, "{name}");
            let [low, high] = (values.len() as u16).to_le_bytes();
            write("payload", codec, name, &[&[number | targets::FIT, low, high], &payload[..]].concat())?;
            // ... and `frame`, as it is, without its zeros and packed.
            let (phase, elements) = (Phase::Scatter, values.len() as u32);
            let header = Header { phase, codec, epoch: 3, step: 40, bucket: 5, tensor: 7, start: 256, elements };
            let frame: Bytes = header.frame(&payload);
            match name {
                "tail" => write("frame", codec, name, &frame)?,
                "zeros" => write("frame", codec, "zeros", &frame)?,
                "even" => write("frame", codec, "packed", &pack(&frame, &mut packer).unwrap_or(frame))?,
                _ => {}
            }
        }
    }
    Ok(())
}

/// What is encoded: an odd tail alone, a block of zeros and its tail, blocks of one value, a usual block with a tail and a very
/// small one.
fn inputs() -> [(&'static str, Vec<f32>); 4] {
    let usual = |at: usize| (at as f32 * 12.9898).sin() * 0.1;
    [
        ("tail", vec![1.0, -3.0, 3.0, 3.0, -2.0]),
        ("zeros", vec![0.0; 131]),
        ("even", vec![0.5; 1000]),
        ("blocks", (0..262).map(|at| if at / 128 == 1 { 1e-35 } else { usual(at) }).collect()),
    ]
}

/// A piece of each operation, of one dtype or another, some of them empty, and refusals.
fn messages() -> Vec<(&'static str, Message)> {
    use Operation::{AllGather, AllReduce, AllToAll, Barrier, Broadcast, ReduceScatter, Send};
    let call = |operation, dtype, reduction| {
        let (elements, root) = (12, if operation == Broadcast { 2 } else { 0 });
        let site = String::from("model.layers.3/forward");
        Call { operation, dtype, reduction, epoch: 3, group: 1 << 60, sequence: 17, elements, root, site }
    };
    let piece = |leg, offset: u64, call: Call| {
        let bytes = (0..(12 - offset) * call.dtype.bytes() as u64).map(|at| (at * 7) as u8).collect::<Vec<u8>>();
        Message { call, body: Body::Piece { leg, offset, bytes: bytes.into() } }
    };
    let refusal = |call: Call, text: &str| Message { call, body: Body::Refusal(text.into()) };
    let nowhere = |operation| Call { site: String::new(), ..call(operation, Dtype::U8, None) };
    vec![
        ("broadcast", piece(Leg::Out, 4, call(Broadcast, Dtype::F32, None))),
        ("broadcast-here", piece(Leg::In, 12, call(Broadcast, Dtype::F32, None))),
        ("all_reduce-sum", piece(Leg::In, 0, call(AllReduce, Dtype::Bf16, Some(Reduction::Sum)))),
        ("all_reduce-max", piece(Leg::Out, 6, call(AllReduce, Dtype::I32, Some(Reduction::Max)))),
        ("all_gather", piece(Leg::Out, 0, call(AllGather, Dtype::I64, None))),
        ("reduce_scatter-min", piece(Leg::In, 0, call(ReduceScatter, Dtype::U8, Some(Reduction::Min)))),
        ("all_to_all", piece(Leg::Out, 11, call(AllToAll, Dtype::Bf16, None))),
        ("send", piece(Leg::Out, 0, call(Send, Dtype::F32, None))),
        ("send-nowhere", piece(Leg::Out, 8, nowhere(Send))),
        ("barrier", piece(Leg::Out, 12, nowhere(Barrier))),
        ("refusal", refusal(call(AllReduce, Dtype::F32, Some(Reduction::Sum)), "rank 1 is at barrier 3 of élan")),
        ("refusal-empty", refusal(nowhere(Barrier), "")),
    ]
}

/// Ballots of all kinds, and numbers. No filler: 256 KiB without a meaning.
fn notes() -> Vec<(String, Note)> {
    let plain = Ballot { finite: true, stop: false, busy: false, loss: 2.5, compute_s: 0.125, parameters: None, codec: None };
    let mut norm = SquaredNorm::default();
    norm.add(&[1.5, -2e9, 1e-20]);
    let ballots = [
        ("plain", plain),
        ("stop", Ballot { stop: true, ..plain }),
        ("busy", Ballot { busy: true, ..plain }),
        ("skip", Ballot { finite: false, loss: f64::NAN, ..plain }),
        ("hash", Ballot { parameters: Some(std::array::from_fn(|at| at as u8)), ..plain }),
    ];
    let ballots = ballots.map(|(name, ballot)| (name.to_owned(), Note::Ballot(ballot, norm)));
    let chosen = Codec::ALL.map(|codec| {
        (format!("codec-{codec}"), Note::Ballot(Ballot { codec: Some(codec), ..plain }, SquaredNorm::default()))
    });
    let values = [("values", vec![1.5, -0.0, f64::INFINITY]), ("values-none", Vec::new())];
    let values = values.map(|(name, values)| (name.to_owned(), Note::Values(values)));
    ballots.into_iter().chain(chosen).chain(values).collect()
}

fn write(target: &str, codec: Codec, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    write_file(target, &format!("{codec}-{name}"), bytes)
}

fn write_file(target: &str, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join(name), bytes)
}
