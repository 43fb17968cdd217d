//! Writes the seeds of the corpus again, in the root of the repository:
//!
//! ```text
//! cargo run --manifest-path tests/fuzz/Cargo.toml --example seeds
//! ```

use std::path::Path;

use bytes::Bytes;
use compression::{Codec, Found};
use fuzz::frame::{Header, Packer, Phase, pack};
use fuzz::targets;

fn main() -> std::io::Result<()> {
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
            // ... and `frame`, packed where that makes it smaller.
            let (phase, elements) = (Phase::Scatter, values.len() as u32);
            let header = Header { phase, codec, epoch: 3, step: 40, bucket: 5, tensor: 7, start: 256, elements };
            let frame: Bytes = header.frame(&payload);
            match name {
                "tail" => write("frame", codec, name, &frame)?,
                "zeros" => write("frame", codec, "packed", &pack(&frame, &mut packer).unwrap_or(frame))?,
                _ => {}
            }
        }
    }
    Ok(())
}

/// What is encoded: an odd tail alone, a block of zeros and its tail, a usual block with a tail and a very small one.
fn inputs() -> [(&'static str, Vec<f32>); 3] {
    let usual = |at: usize| (at as f32 * 12.9898).sin() * 0.1;
    [
        ("tail", vec![1.0, -3.0, 3.0, 3.0, -2.0]),
        ("zeros", vec![0.0; 131]),
        ("blocks", (0..262).map(|at| if at / 128 == 1 { 1e-35 } else { usual(at) }).collect()),
    ]
}

fn write(target: &str, codec: Codec, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join(format!("{codec}-{name}")), bytes)
}
