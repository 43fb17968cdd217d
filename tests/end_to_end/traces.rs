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

/// For how many of rank 0's steps the line of metrics has the seconds of encoding and the overlap that the picture shows. A
/// step's gradients may end their way in the step after it.
fn agrees(picture: &Picture, lines: &[Value]) -> (usize, usize) {
    let waits: Vec<&Value> = picture.spans(0, "wait").collect();
    let of = |step: u64, kind| picture.spans(0, kind).filter(move |span| span["args"]["step"] == step);
    let drawn = |step: u64| {
        let encode_s = of(step, "encode").filter_map(|span| span["dur"].as_u64()).sum::<u64>() as f64 / 1e6;
        let first = of(step, "encode").filter_map(|span| span["ts"].as_u64()).min()?;
        let last = of(step, "keep").map(end).max()?;
        let within = |wait: &&Value| end(wait).min(last).saturating_sub(wait["ts"].as_u64().unwrap_or(last).max(first));
        let waited: u64 = waits.iter().map(within).sum();
        Some([encode_s, 1.0 - waited as f64 / (last - first).max(1) as f64])
    };
    let is_of = |line: &Value, [encode_s, overlap]: [f64; 2]| {
        let number = |key: &str| line[key].as_f64().unwrap_or(f64::NAN);
        (number("encode_s") / encode_s - 1.0).abs() < 0.1 && (number("overlap") - overlap).abs() < 0.05
    };
    let steps: Vec<u64> = steps(picture.spans(0, "step")).into_iter().collect();
    let is_told = |step: u64| {
        let near = lines.iter().filter(|line| line["step"] == step || line["step"] == step + 1);
        drawn(step).is_some_and(|drawn| near.into_iter().any(|line| is_of(line, drawn)))
    };
    (steps.iter().filter(|&&step| is_told(step)).count(), steps.len())
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
        for kind in
            ["step", "forward", "backward", "wait", "update", "encode", "reduce", "keep", "decode", "send", "receive"]
        {
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

    // The metrics tell what the picture shows; in a step or two the system may have stopped a thread between the two clocks.
    let (told, all) = agrees(&picture, &place.metrics("traced"));
    assert!(4 * told > 3 * all, "{told} of {all} steps");
    // The control: those of slower encoding do not.
    let mut others = place.metrics("traced");
    others.iter_mut().for_each(|line| line["encode_s"] = (1.5 * line["encode_s"].as_f64().expect("seconds")).into());
    let (told, all) = agrees(&picture, &others);
    assert!(4 * told < 3 * all, "{told} of {all} steps");

    // The control: gradients that wait for the end of the backward pass are seen to be late.
    place.train_with("late", "late", &[&RECIPE[..], &["--trace"]].concat()).ok();
    assert_eq!(place.summary("late")["parameter_hash"], place.summary("plain")["parameter_hash"]);
    let late = Picture::of(&place, "runs/late/trace.json");
    late.is_nested();
    assert_eq!([0, 1].map(|rank| (late.overlaps(rank), steps(late.spans(rank, "step")).len())), [(0, 20), (0, 20)]);
    let overlap = |run: &str| {
        let all: Vec<f64> = place.metrics(run).iter().filter_map(|line| line["overlap"].as_f64()).collect();
        all.iter().sum::<f64>() / all.len() as f64
    };
    let (early, late) = (overlap("traced"), overlap("late"));
    assert!(late < early, "by the metrics {late} of the way is hidden, {early} when gradients leave early");
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
