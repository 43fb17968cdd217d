//! `--trace`: one picture of what every rank does when.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::ranks::WIDE;
use crate::support::Place;

/// A model whose backward pass takes long after its first bucket is full.
const RECIPE: [&str; 6] =
    ["--set", "model.num_hidden_layers=3", "--set", "parallel.bucket_bytes_max=65536", "--set", "train.seq_len=64"];

/// What is on the picture of a run.
struct Picture(Vec<Value>);

impl Picture {
    fn of(place: &Place, file: &str) -> Self {
        let text = std::fs::read_to_string(place.path(file)).expect(file);
        let value: Value = serde_json::from_str(&text).expect("JSON");
        Self(value["traceEvents"].as_array().expect("a list").clone())
    }

    /// The spans of one kind of one rank.
    fn spans<'a>(&'a self, rank: usize, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.0.iter().filter(move |event| event["ph"] == "X" && event["pid"] == rank && event["cat"] == kind)
    }

    /// The tracks of one rank, by name.
    fn tracks(&self, rank: usize) -> Vec<&str> {
        let named = |event: &&Value| event["name"] == "thread_name" && event["pid"] == rank;
        self.0.iter().filter(named).filter_map(|event| event["args"]["name"].as_str()).collect()
    }

    fn ranks(&self) -> BTreeSet<u64> {
        self.0.iter().filter_map(|event| event["pid"].as_u64()).collect()
    }

    /// Every span of a track lies behind the ones before it or inside them.
    #[track_caller]
    fn is_nested(&self) {
        let mut open: BTreeMap<(u64, u64), Vec<(u64, u64)>> = BTreeMap::new();
        for span in self.0.iter().filter(|event| event["ph"] == "X") {
            let number = |key: &str| span[key].as_u64().expect(key);
            let (begin, end) = (number("ts"), number("ts") + number("dur"));
            let track = open.entry((number("pid"), number("tid"))).or_default();
            assert!(track.last().is_none_or(|&(before, _)| before <= begin), "out of order: {span}");
            track.retain(|&(_, open_until)| open_until > begin);
            assert!(track.iter().all(|&(_, open_until)| end <= open_until), "{span} in {track:?}");
            track.push((begin, end));
        }
        assert!(open.len() > 2, "{open:?}");
    }

    /// For how many steps the first frame of gradients goes to another rank before the backward pass is over.
    fn overlaps(&self, rank: usize) -> usize {
        let overlaps = |backward: &&Value| {
            let of =
                |span: &&Value| span["args"]["step"] == backward["args"]["step"] && span["args"]["bucket"].is_u64();
            let first = self.spans(rank, "send").filter(of).filter_map(|span| span["ts"].as_u64()).min();
            first < Some(end(backward)) && first.is_some()
        };
        self.spans(rank, "backward").filter(overlaps).count()
    }
}

fn end(span: &Value) -> u64 {
    span["ts"].as_u64().expect("a time") + span["dur"].as_u64().expect("a length")
}

fn steps<'a>(spans: impl Iterator<Item = &'a Value>) -> BTreeSet<u64> {
    spans.filter_map(|span| span["args"]["step"].as_u64()).collect()
}

#[test]
fn the_picture_of_two_ranks_shows_gradients_leave_during_the_backward_pass_and_late_ones_after_it() {
    let place = Place::with(WIDE);
    place.train("plain", &RECIPE).ok();
    assert!(!place.path("runs/plain/trace").exists() && !place.path("runs/plain/trace.json").exists());
    place.train("traced", &[&RECIPE[..], &["--trace", "--trace-steps", "15"]].concat()).ok();
    assert_eq!(place.summary("traced")["parameter_hash"], place.summary("plain")["parameter_hash"]);

    let picture = Picture::of(&place, "runs/traced/trace.json");
    assert_eq!(picture.ranks(), BTreeSet::from([0, 1]));
    picture.is_nested();
    for rank in [0, 1] {
        let other = 1 - rank;
        let (send, receive) = (format!("send to rank {other}"), format!("receive from rank {other}"));
        assert_eq!(picture.tracks(rank), ["compute", "gradients", &send, &receive]);
        for kind in ["step", "forward", "backward", "wait", "update", "encode", "reduce", "decode", "send", "receive"] {
            let steps = steps(picture.spans(rank, kind));
            assert!((1..=15).all(|step| steps.contains(&step)), "rank {rank}, {kind}: {steps:?}");
            let compute = ["step", "forward", "backward", "wait", "update"].contains(&kind);
            assert!(!compute || steps.len() == 15, "rank {rank}, {kind}: {steps:?}");
        }
        assert_eq!(steps(picture.spans(rank, "evaluate")), BTreeSet::from([8]));
        let voted = |of: usize| picture.0.iter().filter(move |e| e["cat"] == "vote" && e["args"]["of_rank"] == of);
        assert!([0, 1].iter().all(|&of| (1..=15).all(|step| steps(voted(of)).contains(&step))));
        let decode = picture.spans(rank, "decode").next().expect("counted above");
        assert!(decode["args"]["parameter"].is_string() && decode["args"]["bytes"].as_u64() > Some(52), "{decode}");
        assert!(picture.overlaps(rank) > 0, "rank {rank}: no first frame left before a backward pass was over");
        let own = Picture::of(&place, &format!("runs/traced/trace/rank-{rank}.json"));
        assert_eq!(own.ranks(), BTreeSet::from([rank as u64]));
    }

    // The control: gradients that wait for the end of the backward pass are seen to be late.
    place.train_with("late", "late", &[&RECIPE[..], &["--trace"]].concat()).ok();
    assert_eq!(place.summary("late")["parameter_hash"], place.summary("plain")["parameter_hash"]);
    let late = Picture::of(&place, "runs/late/trace.json");
    late.is_nested();
    assert_eq!([0, 1].map(|rank| (late.overlaps(rank), steps(late.spans(rank, "step")).len())), [(0, 20), (0, 20)]);
}

#[test]
fn one_rank_has_a_picture_too_and_a_start_shows_its_own_steps_and_no_others() {
    let place = Place::new();
    let (stop, trace) = (["--set", "train.stop_at_step=5"], ["--trace", "--trace-steps", "3"]);
    place.train("a", &[&stop[..], &["--trace"]].concat()).ok();
    let picture = Picture::of(&place, "runs/a/trace.json");
    assert_eq!(picture.tracks(0), ["compute"]);
    assert_eq!(steps(picture.spans(0, "step")), (1..=5).collect(), "it ended before the twentieth");
    assert_eq!(picture.spans(0, "forward").count(), 10, "two micro-batches a step");
    assert_eq!(steps(picture.spans(0, "snapshot")), BTreeSet::from([5]));
    place.train("a", &[&["--resume"], &trace[..]].concat()).ok();
    let picture = Picture::of(&place, "runs/a/trace.json");
    assert_eq!(steps(picture.spans(0, "step")), (6..=8).collect());
}

#[test]
fn a_trace_that_nobody_would_write_is_refused() {
    let place = Place::new();
    place.train("a", &["--trace-steps", "3"]).failed(2, &["--trace"]);
    place.train("a", &["--trace", "--trace-steps", "0"]).failed(2, &["0"]);
    place.run(&["coordinator", "small.toml", "--trace"]).failed(2, &["give it to each worker"]);
    assert!(!place.path("runs/a").exists());
}
