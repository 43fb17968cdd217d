//! What a rank does when: spans on tracks, in a bounded record, and the text that Perfetto opens, which is that of
//! [Chrome's trace events](https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU).
//!
//! A track is a row of the picture; its spans follow each other or lie inside each other. Times are what the machine's
//! clock said when the record began, and count on steadily from there: ranks of one machine line up.
//!
//! The text has one event a line, so that the texts of several ranks are put together line by line ([`merge`]).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Value, json};

use crate::data::plan::Plan;
use crate::{frame, note};

/// Events that one record holds, about 20 MiB; what comes after is counted and left out.
pub const EVENTS_MAX: usize = 200_000;

/// A row of the picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Track {
    /// The thread that trains.
    Compute,
    /// The thread that encodes and adds gradients.
    Gradients,
    /// What goes to a rank.
    Send(usize),
    /// What comes from a rank.
    Receive(usize),
}

/// What happens in a span, or at an instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Label {
    /// One word.
    pub name: &'static str,
    /// The training step.
    pub step: u64,
    /// Which micro-batch.
    pub micro_batch: Option<usize>,
    /// Which bucket of the plan.
    pub bucket: Option<usize>,
    /// Which parameter of the plan.
    pub parameter: Option<usize>,
    /// How many bytes it is about.
    pub bytes: Option<usize>,
    /// Whose it is.
    pub of_rank: Option<usize>,
}

/// The record of one rank.
#[derive(Debug)]
pub struct Trace {
    rank: usize,
    plan: Arc<Plan>,
    start: Instant,
    /// The machine's clock at `start`, in microseconds since 1970.
    start_us: u64,
    events_max: usize,
    /// `None` once it was taken.
    record: Mutex<Option<Record>>,
}

#[derive(Debug, Default)]
struct Record {
    events: Vec<Event>,
    left_out: u64,
    /// When the last span of a queue ended.
    free: BTreeMap<Track, Instant>,
}

/// Times are nanoseconds since the start of the record.
#[derive(Clone, Copy, Debug)]
struct Event {
    track: Track,
    label: Label,
    begin_ns: u64,
    /// `None` for an instant.
    end_ns: Option<u64>,
    /// How long it had waited in a queue when it began.
    waited_ns: Option<u64>,
}

impl Label {
    /// With this name, in this step.
    #[must_use]
    pub fn new(name: &'static str, step: u64) -> Self {
        Self { name, step, ..Self::default() }
    }

    /// Of a message between ranks, whose bytes nobody has checked yet.
    #[must_use]
    pub fn of(name: &'static str, message: &[u8]) -> Self {
        let label = Self { bytes: Some(message.len()), ..Self::new(name, 0) };
        match frame::peek(message) {
            Some((step, bucket, tensor)) => Self { step, bucket: Some(bucket), parameter: Some(tensor), ..label },
            None => Self { step: note::peek(message).unwrap_or(0), ..label },
        }
    }
}

impl Trace {
    /// A record that begins now.
    #[must_use]
    pub fn new(rank: usize, plan: Arc<Plan>) -> Self {
        Self::with_room(rank, plan, EVENTS_MAX)
    }

    fn with_room(rank: usize, plan: Arc<Plan>, events_max: usize) -> Self {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (start, start_us) = (Instant::now(), u64::try_from(since_1970.as_micros()).unwrap_or(0));
        Self { rank, plan, start, start_us, events_max, record: Mutex::new(Some(Record::default())) }
    }

    /// Enters a span that ends now.
    pub fn span(&self, track: Track, begin: Instant, label: Label) {
        self.enter(|_| (track, begin, Some(Instant::now()), None), label);
    }

    /// Enters a span that ends now, of something that had to wait since then for what is before it on its track. It
    /// begins when that ended, or when the wait began where nothing was before it.
    pub fn queued(&self, track: Track, since: Instant, label: Label) {
        let place = |record: &mut Record| {
            let end = Instant::now();
            let before = record.free.insert(track, end);
            let begin = before.map_or(since, |before| before.max(since));
            (track, begin, Some(end), Some(begin - since))
        };
        self.enter(place, label);
    }

    /// Enters an instant, which is now.
    pub fn instant(&self, track: Track, label: Label) {
        self.enter(|_| (track, Instant::now(), None, None), label);
    }

    fn enter(
        &self,
        place: impl FnOnce(&mut Record) -> (Track, Instant, Option<Instant>, Option<std::time::Duration>),
        label: Label,
    ) {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(record) = &mut *record else { return };
        let (track, begin, end, waited) = place(record);
        if record.events.len() >= self.events_max {
            record.left_out += 1;
            return;
        }
        let ns = |at: Instant| at.saturating_duration_since(self.start).as_nanos() as u64;
        let waited_ns = waited.map(|waited| waited.as_nanos() as u64);
        record.events.push(Event { track, label, begin_ns: ns(begin), end_ns: end.map(ns), waited_ns });
    }

    /// Ends the record and returns its text; `None` when that was done before.
    #[must_use]
    pub fn finish(&self) -> Option<String> {
        let Record { mut events, left_out, .. } = self.record.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        // Whatever lies inside a span comes after it.
        events.sort_by_key(|event| (event.begin_ns, std::cmp::Reverse(event.end_ns)));
        let mut tracks: Vec<Track> = events.iter().map(|event| event.track).collect();
        tracks.sort_unstable();
        tracks.dedup();
        let mut lines = vec![self.about("process_name", None, &json!({ "name": format!("rank {}", self.rank) }))];
        lines.push(self.about("process_sort_index", None, &json!({ "sort_index": self.rank })));
        if left_out > 0 {
            let labels = format!("full: {left_out} events after the first {} are left out", events.len());
            lines.push(self.about("process_labels", None, &json!({ "labels": labels })));
        }
        for track in tracks {
            lines.push(self.about("thread_name", Some(track), &json!({ "name": track.title() })));
            lines.push(self.about("thread_sort_index", Some(track), &json!({ "sort_index": track.number() })));
        }
        lines.extend(events.iter().map(|event| self.line(event)));
        Some(join(&lines))
    }

    /// What is said of a process or a track.
    fn about(&self, name: &str, track: Option<Track>, args: &Value) -> String {
        let tid = track.map_or(0, Track::number);
        json!({ "name": name, "ph": "M", "pid": self.rank, "tid": tid, "args": args }).to_string()
    }

    fn line(&self, event: &Event) -> String {
        let Event { track, label, begin_ns, end_ns, waited_ns } = *event;
        // Whole microseconds, both rounded down, so that what did not overlap does not.
        let us = |ns: u64| self.start_us + ns / 1000;
        let parameters = self.plan.parameters();
        let name = |&index: &usize| parameters.get(index).map(|parameter| parameter.name.as_str());
        // A bucket's own work is about all of its parameters.
        let of_bucket = label.bucket.filter(|_| label.parameter.is_none());
        let of_bucket = of_bucket.and_then(|bucket| self.plan.buckets().get(bucket));
        let line = Line {
            name: match label.bucket {
                Some(bucket) => format!("{} bucket {bucket}", label.name),
                None => label.name.to_owned(),
            },
            cat: label.name,
            ph: if end_ns.is_some() { "X" } else { "i" },
            ts: us(begin_ns),
            dur: end_ns.map(|end| us(end) - us(begin_ns)),
            s: end_ns.is_none().then_some("t"),
            pid: self.rank,
            tid: track.number(),
            args: Args {
                step: label.step,
                micro_batch: label.micro_batch,
                bucket: label.bucket,
                parameter: label.parameter.as_ref().and_then(name),
                parameters: of_bucket.map(|bucket| bucket.parameters.iter().filter_map(name).collect()),
                bytes: label.bytes,
                of_rank: label.of_rank,
                waited_us: waited_ns.map(|ns| ns / 1000),
            },
        };
        serde_json::to_string(&line).expect("numbers and texts are JSON")
    }
}

impl Track {
    fn title(self) -> String {
        match self {
            Self::Compute => "compute".into(),
            Self::Gradients => "gradients".into(),
            Self::Send(rank) => format!("send to rank {rank}"),
            Self::Receive(rank) => format!("receive from rank {rank}"),
        }
    }

    /// The thread's number in the text: larger than any rank, because Perfetto takes a thread that has its process's
    /// number for something special.
    const fn number(self) -> usize {
        match self {
            Self::Compute => 10_000,
            Self::Gradients => 10_001,
            Self::Send(rank) => 20_000 + rank,
            Self::Receive(rank) => 30_000 + rank,
        }
    }
}

/// One event as it is written.
#[derive(Serialize)]
struct Line<'a> {
    name: String,
    cat: &'a str,
    ph: &'a str,
    ts: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<u64>,
    /// How far an instant's mark reaches: `t` is its track.
    #[serde(skip_serializing_if = "Option::is_none")]
    s: Option<&'a str>,
    pid: usize,
    tid: usize,
    args: Args<'a>,
}

#[derive(Serialize)]
struct Args<'a> {
    step: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    micro_batch: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bucket: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parameter: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<Vec<&'a str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    of_rank: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    waited_us: Option<u64>,
}

const HEAD: &str = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n";
const TAIL: &str = "\n]}\n";

fn join<T: AsRef<str>>(lines: &[T]) -> String {
    let lines: Vec<&str> = lines.iter().map(AsRef::as_ref).collect();
    format!("{HEAD}{}{TAIL}", lines.join(",\n"))
}

/// The texts of several records as one, which shows all of them; what is no such text is left out.
#[must_use]
pub fn merge<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    let inner = |text: &'a str| text.strip_prefix(HEAD)?.strip_suffix(TAIL);
    let inners: Vec<&str> = texts.into_iter().filter_map(inner).collect();
    join(&inners)
}

#[cfg(test)]
mod tests;
