//! TensorBoard's event files: records of length, masked CRC-32C, and a protocol buffer.
//!
//! The messages are the few fields of TensorFlow's `event.proto` and `summary.proto` that scalars need. A resumed run
//! writes a new file that starts with a session log of its first step, at which TensorBoard drops what older files say
//! of later steps.

use std::fs::OpenOptions;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use super::metrics::appended::Appended;
use crate::error::{Error, Result};

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, tag = "2")]
    simple_value: f32,
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    /// 1 is START.
    #[prost(int32, tag = "1")]
    status: i32,
}

/// An open event file.
#[derive(Debug)]
pub struct EventFile {
    out: Appended,
}

impl EventFile {
    /// Makes `events.out.tfevents.SECONDS.tributary.N` in `folder`, with the first unused N. `resumed_at` is the step
    /// after which a resumed run goes on.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn create(folder: &Path, resumed_at: Option<u64>) -> Result<Self> {
        let seconds = now() as u64;
        let taken = |n: &u32| folder.join(format!("events.out.tfevents.{seconds}.tributary.{n}"));
        let path = (0..u32::MAX).map(|n| taken(&n)).find(|path| !path.exists()).unwrap_or_else(|| taken(&u32::MAX));
        let file = OpenOptions::new().append(true).create_new(true).open(&path).map_err(Error::io("create", &path))?;
        let mut out = Appended::new(file, "TensorBoard's file").map_err(Error::io("read", &path))?;
        let mut head = record(0, What::FileVersion("brain.Event:2".into()));
        if let Some(step) = resumed_at {
            head.extend(record(step + 1, What::SessionLog(SessionLog { status: 1 })));
        }
        out.append(&head).map_err(|refused| Error::io("write", path)(refused.error))?;
        Ok(Self { out })
    }

    /// Writes scalars of one step. While the disk is full they wait in memory.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) {
        let value = values.iter().map(|(tag, x)| Value { tag: (*tag).into(), simple_value: *x as f32 }).collect();
        self.out.append_or_tell(&record(step, What::Summary(Summary { value })));
    }

    /// For tests: the file.
    #[cfg(test)]
    pub fn appended(&mut self) -> &mut Appended {
        &mut self.out
    }
}

/// An event as it lies in the file.
fn record(step: u64, what: What) -> Vec<u8> {
    let event = Event { wall_time: now(), step: i64::try_from(step).unwrap_or(i64::MAX), what: Some(what) };
    let bytes = event.encode_to_vec();
    let length = (bytes.len() as u64).to_le_bytes();
    [&length[..], &masked(&length).to_le_bytes(), &bytes, &masked(&bytes).to_le_bytes()].concat()
}

/// The masked CRC of TFRecord files.
fn masked(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_can_be_read_back_and_a_resumed_file_starts_with_its_step() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut file = EventFile::create(folder.path(), Some(7)).expect("writable");
        file.scalars(8, &[("loss", 1.5)]);
        drop(file);
        let path =
            std::fs::read_dir(folder.path()).expect("a folder").next().expect("one file").expect("readable").path();
        let bytes = std::fs::read(path).expect("readable");
        let mut rest = bytes.as_slice();
        let mut events = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().expect("8 bytes"));
            assert_eq!(u32::from_le_bytes(rest[8..12].try_into().expect("4 bytes")), masked(&rest[..8]));
            let end = 12 + usize::try_from(length).expect("small");
            assert_eq!(u32::from_le_bytes(rest[end..end + 4].try_into().expect("4 bytes")), masked(&rest[12..end]));
            events.push(Event::decode(&rest[12..end]).expect("an event"));
            rest = &rest[end + 4..];
        }
        assert_eq!(events[0].what, Some(What::FileVersion("brain.Event:2".into())));
        assert_eq!((events[1].step, &events[1].what), (8, &Some(What::SessionLog(SessionLog { status: 1 }))));
        let value = vec![Value { tag: "loss".into(), simple_value: 1.5 }];
        assert_eq!((events[2].step, &events[2].what), (8, &Some(What::Summary(Summary { value }))));
    }

    #[test]
    fn the_mask_is_tensorflows() {
        // The CRC of no bytes is 0, whose mask is the constant alone.
        assert_eq!(masked(b""), 0xa282_ead8);
        // RFC 3720's check value of "123456789" is 0xe3069283.
        assert_eq!(masked(b"123456789"), 0xe306_9283u32.rotate_right(15).wrapping_add(0xa282_ead8));
    }
}
