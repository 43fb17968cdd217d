//! `metrics.prometheus_port`: the numbers of all ranks, over plain HTTP on loopback.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::Child;

use rustix::process::Signal;
use serde_json::Value;

use crate::ranks::WIDE;
use crate::support::{Place, Ran, end, wait_until};

/// Enough steps to ask while they are taken.
const LONG: [&str; 4] = ["--set", "train.steps=100000", "--set", "metrics.prometheus_port=0"];

/// Where a run serves, as its events say.
fn address(place: &Place, run: &str, child: &mut Child) -> SocketAddr {
    let url = || {
        let event = place.events(run).into_iter().find(|event| event["event"] == "prometheus");
        event.and_then(|event| event["url"].as_str().map(str::to_owned))
    };
    assert!(wait_until(child, || url().is_some()), "it ended before it served");
    let url = url().expect("it was there");
    let address = url.strip_prefix("http://").and_then(|rest| rest.strip_suffix("/metrics")).expect("a URL");
    address.parse().expect("an address")
}

/// What comes back for these bytes; nothing when the connection is closed without an answer.
fn ask(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).expect("it listens");
    // The server may close while we write.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).expect("UTF-8")
}

/// The numbers of the page by name and labels, and the page.
fn scrape(address: SocketAddr) -> (BTreeMap<String, f64>, String) {
    let answer = ask(address, b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n");
    let (head, page) = answer.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    let head = head.to_lowercase();
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"), "{head}");
    assert!(page.ends_with("# EOF\n"), "{page}");
    let number = |line: &str| {
        let (name, value) = line.rsplit_once(' ').expect("a name and a value");
        assert!(name.starts_with("tributary_"), "{line}");
        (name.to_owned(), value.parse().expect("a number"))
    };
    let numbers = page.lines().filter(|line| !line.starts_with('#')).map(number).collect();
    (numbers, page.to_owned())
}

/// A page on which every rank has taken this step and more.
fn scrape_after(child: &mut Child, address: SocketAddr, ranks: usize, step: f64) -> (BTreeMap<String, f64>, String) {
    let took = || {
        let (numbers, _) = scrape(address);
        (0..ranks).all(|rank| numbers.get(&format!("tributary_step{{rank=\"{rank}\"}}")).is_some_and(|&at| at > step))
    };
    assert!(wait_until(child, took), "it ended before step {step}");
    scrape(address)
}

/// The numbers of rank 0 are those of its line of metrics, to the last digit.
fn agrees(place: &Place, run: &str, child: &mut Child, (numbers, page): &(BTreeMap<String, f64>, String)) {
    let of = |name: &str| numbers.get(&format!("tributary_{name}{{rank=\"0\"}}")).copied();
    let step = of("step").expect("it has taken a step");
    let line = || {
        let text = std::fs::read_to_string(place.path(&format!("runs/{run}/metrics.jsonl"))).expect("metrics");
        let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let mut lines = lines.map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        lines.find(|line| line["step"].as_f64() == Some(step))
    };
    // It is written after the numbers are told.
    assert!(wait_until(child, || line().is_some()), "it ended before the line of step {step}");
    let line = line().expect("it was there");
    for (name, key) in [
        ("loss", "loss"),
        ("grad_norm", "grad_norm"),
        ("learning_rate", "learning_rate"),
        ("tokens_total", "tokens"),
        ("tokens_per_second", "tokens_per_s"),
        ("step_seconds", "step_s"),
        ("forward_seconds", "forward_s"),
        ("backward_seconds", "backward_s"),
        ("encode_seconds", "encode_s"),
        ("wait_seconds", "wait_s"),
        ("exposed_seconds", "exposed_s"),
        ("overlap_ratios", "overlap"),
        ("memory_bytes", "memory_bytes"),
    ] {
        assert_eq!(of(name), line[key].as_f64(), "{name} of step {step} in\n{page}");
    }
}

#[test]
fn the_launcher_serves_the_numbers_of_all_ranks_and_garbage_changes_nothing() {
    let place = Place::with(WIDE);
    let more = [&LONG[..], &["--set", "parallel.peer_timeout_s=4"]].concat();
    let mut child = place.start("a", &more);
    let address = address(&place, "a", &mut child);
    let page = scrape_after(&mut child, address, 2, 2.0);
    agrees(&place, "a", &mut child, &page);
    let (numbers, text) = &page;
    for (rank, peer) in [(0, 1), (1, 0)] {
        let of = |name: &str, labels: &str| numbers.get(&format!("tributary_{name}{{{labels}}}")).copied().expect(name);
        let own = format!("rank=\"{rank}\"");
        for way in ["sent", "received"] {
            let with = of(&format!("peer_{way}_bytes_total"), &format!("{own},peer=\"{peer}\""));
            let wire = of(&format!("wire_{way}_bytes_total"), &own);
            // There is one other rank; what is queued may not have left, and protocols add little.
            assert!(
                with > 0.0 && wire > with / 2.0 && wire < with * 1.05 + 65536.0,
                "{way}: {with}, {wire} in\n{text}"
            );
        }
        assert!(text.contains(&format!("tributary_place{{{own},host=")) && text.contains("at=\"step "), "{text}");
        assert!(text.contains("collective=\"votes of step ") || text.contains("collective=\"sums of step "), "{text}");
    }

    // Nobody but loopback is served, and nothing but one page.
    assert!(TcpStream::connect(("127.0.0.2", address.port())).is_err());
    assert!(ask(address, b"GET / HTTP/1.1\r\nHost: here\r\n\r\n").starts_with("HTTP/1.1 404"));
    assert!(
        ask(address, b"POST /metrics HTTP/1.1\r\nHost: here\r\nContent-Length: 0\r\n\r\n").starts_with("HTTP/1.1 405")
    );
    let long = [b"GET /metrics HTTP/1.1\r\nA: ", &[b'a'; 100_000][..], b"\r\n\r\n"].concat();
    for garbage in [b"\0\xff garbage \r\n\r\n".as_slice(), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &long] {
        let answer = ask(address, garbage);
        assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    // Connections that say nothing take all places; they are closed, and there is room again.
    let idle: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(address).expect("it listens")).collect();
    let answer = ask(address, b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n");
    assert_eq!(answer, "", "no place is left");
    for mut stream in idle {
        let _ = stream.read_to_end(&mut Vec::new());
    }
    scrape(address);

    end(child, Signal::TERM).failed(75, &["metrics for Prometheus: http://127.0.0.1:"]);
    assert!(TcpStream::connect(address).is_err(), "nobody listens after the end");
}

#[test]
fn one_rank_serves_its_own_numbers_and_a_port_that_is_taken_is_refused() {
    let place = Place::new();
    let mut child = place.start("a", &LONG);
    let address = address(&place, "a", &mut child);
    let page = scrape_after(&mut child, address, 1, 1.0);
    agrees(&place, "a", &mut child, &page);
    assert!(!page.1.contains("tributary_peer_sent_bytes_total{") && page.1.contains("at=\"step "), "{}", page.1);
    let set = format!("metrics.prometheus_port={}", address.port());
    for (name, data) in [("b", "parallel.data=1"), ("c", "parallel.data=2")] {
        let ran: Ran = place.train(name, &["--set", &set, "--set", data]);
        ran.failed(2, &["metrics.prometheus_port: 127.0.0.1:", "choose another"]);
        assert!(!place.path(&format!("runs/{name}")).exists());
    }
    end(child, Signal::TERM).failed(75, &[]);
    // The control: without the key nobody serves.
    place.train("d", &["--set", "train.stop_at_step=2"]).ok();
    assert!(place.events("d").iter().all(|event| event["event"] != "prometheus"));
}
