//! A record is bounded, its text is JSON, and its spans nest.

use std::time::Duration;

use super::*;
use crate::data::norm::SquaredNorm;
use crate::data::plan::Parameter;

fn trace(rank: usize, events_max: usize) -> Trace {
    let parameter = |name: &str| Parameter { name: name.into(), shape: vec![4] };
    let plan = Plan::new(vec![parameter("first \"quoted\""), parameter("second")], 1 << 10).expect("small");
    Trace::with_room(rank, Arc::new(plan), events_max)
}

fn events(text: &str) -> Vec<Value> {
    let value: Value = serde_json::from_str(text).expect("JSON");
    value["traceEvents"].as_array().expect("a list").clone()
}

/// Without what is said of processes and tracks.
fn spans(text: &str) -> Vec<Value> {
    events(text).into_iter().filter(|event| event["ph"] != "M").collect()
}

#[test]
fn a_span_comes_before_what_lies_inside_it_and_has_its_place_and_its_words() {
    let trace = trace(3, 10);
    let outer = Instant::now();
    let inner = Instant::now();
    let label = Label { micro_batch: Some(1), ..Label::new("forward", 7) };
    trace.span(Track::Compute, inner, label);
    trace.span(Track::Compute, outer, Label::new("step", 7));
    trace.span(Track::Gradients, outer, Label { bucket: Some(0), bytes: Some(32), ..Label::new("encode", 7) });
    let label = Label { bucket: Some(0), parameter: Some(1), ..Label::new("decode", 7) };
    trace.span(Track::Gradients, Instant::now(), label);
    trace.instant(Track::Gradients, Label { of_rank: Some(2), ..Label::new("vote", 7) });
    let text = trace.finish().expect("the first time");
    assert_eq!(trace.finish(), None);

    let spans = spans(&text);
    let compute: Vec<&Value> = spans.iter().filter(|span| span["tid"] == 10_000).collect();
    let names: Vec<&Value> = compute.iter().map(|span| &span["name"]).collect();
    assert_eq!(names, ["step", "forward"], "the inner one was entered first");
    let [begin, end] = [0, 1].map(|index| {
        let span = compute[index];
        (span["ts"].as_u64().expect("a time"), span["dur"].as_u64().expect("a length"))
    });
    assert!(begin.0 <= end.0 && end.0 + end.1 <= begin.0 + begin.1, "{text}");
    assert_eq!((&compute[1]["args"]["micro_batch"], &compute[1]["pid"]), (&json!(1), &json!(3)));
    let find = |cat: &str| spans.iter().find(|span| span["cat"] == cat).expect("it was entered");
    assert_eq!(find("encode")["name"], "encode bucket 0");
    assert_eq!(find("encode")["args"]["parameters"], json!(["second", "first \"quoted\""]));
    assert_eq!(
        (&find("decode")["args"]["parameter"], &find("decode")["args"]["bytes"]),
        (&json!("second"), &Value::Null)
    );
    assert_eq!((&find("vote")["ph"], &find("vote")["args"]["of_rank"]), (&json!("i"), &json!(2)));

    let said: Vec<Value> = events(&text).into_iter().filter(|event| event["ph"] == "M").collect();
    let names: Vec<&Value> = said.iter().map(|event| &event["args"]["name"]).filter(|name| !name.is_null()).collect();
    assert_eq!(names, ["rank 3", "compute", "gradients"]);
}

#[test]
fn what_waits_in_a_queue_begins_when_what_was_before_it_ended() {
    let trace = trace(0, 10);
    let since = Instant::now();
    for _ in 0..3 {
        trace.queued(Track::Send(1), since, Label::new("send", 1));
    }
    // The control: spans that are entered as they are lie over each other.
    let far = since + Duration::from_secs(1);
    trace.queued(Track::Receive(1), since.min(far), Label::new("receive", 1));
    trace.span(Track::Receive(1), since, Label::new("receive", 1));
    let record = trace.record.lock().expect("no panic");
    let events = &record.as_ref().expect("not taken yet").events;
    let overlap = |a: &Event, b: &Event| b.begin_ns < a.end_ns.expect("a span");
    assert!(!overlap(&events[0], &events[1]) && !overlap(&events[1], &events[2]));
    assert!(overlap(&events[3], &events[4]));
    assert_eq!(events[0].waited_ns, Some(0));
    assert_eq!(
        events[2].waited_ns.map(|ns| ns + events[0].begin_ns),
        Some(events[2].begin_ns),
        "since the same moment"
    );
}

#[test]
fn a_full_record_takes_no_more_and_says_how_much_it_left_out() {
    for (room, left_out) in [(3, true), (5, false)] {
        let trace = trace(0, room);
        (0..5).for_each(|step| trace.instant(Track::Compute, Label::new("vote", step)));
        let text = trace.finish().expect("the first time");
        assert_eq!(spans(&text).len(), room.min(5));
        assert_eq!(text.contains("2 events after the first 3 are left out"), left_out, "{text}");
        // What comes after the end changes nothing.
        trace.instant(Track::Compute, Label::new("vote", 9));
        assert!(trace.record.lock().expect("no panic").is_none());
    }
}

#[test]
fn texts_of_ranks_become_one_and_what_is_none_is_left_out() {
    let text = |rank: usize| {
        let trace = trace(rank, 10);
        (0..rank + 1).for_each(|step| trace.instant(Track::Compute, Label::new("vote", step as u64)));
        trace.finish().expect("the first time")
    };
    let (a, b) = (text(0), text(1));
    let merged = merge([a.as_str(), "something else", &b[..b.len() - 4], &b]);
    let ranks: Vec<Value> = spans(&merged).into_iter().map(|span| span["pid"].clone()).collect();
    assert_eq!(ranks, [0, 1, 1]);
    assert_eq!(merge([a.as_str()]), a);
    assert!(events(&merge([])).is_empty());
}

#[test]
fn a_message_says_what_it_is_of_and_garbage_says_nothing() {
    use crate::frame::{Header, Phase};
    use crate::note::{Ballot, Note};
    let header = Header {
        phase: Phase::Gather,
        codec: compression::Codec::Fp32,
        epoch: 1,
        step: 9,
        bucket: 5,
        tensor: 6,
        start: 0,
        elements: 1,
    };
    let frame = header.frame(&[1; 4]);
    let label = Label::of("send", &frame);
    assert_eq!(label, Label { bucket: Some(5), parameter: Some(6), bytes: Some(56), ..Label::new("send", 9) });
    let ballot =
        Ballot { finite: true, stop: false, busy: false, loss: 0.0, compute_s: 0.0, parameters: None, codec: None };
    assert_eq!(Label::of("send", &Note::Ballot(ballot, SquaredNorm::default()).write(1, 4)).step, 4);
    for garbage in [&frame[..51], &[0; 60], b"TRIN", b""] {
        assert_eq!(Label::of("send", garbage), Label { bytes: Some(garbage.len()), ..Label::new("send", 0) });
    }
}
