//! The page that Prometheus reads, in the format of [OpenMetrics](https://prometheus.io/docs/specs/om/open_metrics_spec/).

use std::sync::atomic::AtomicU64;

use parallel::coordinator::state::RankNumbers;
use parallel::wire::control::{Numbers, PeerBytes};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

/// What the page is.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRank {
    rank: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfPeer {
    rank: usize,
    peer: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Place {
    rank: usize,
    host: String,
    pid: u32,
    at: String,
    collective: String,
}

type Reals<L> = Family<L, Gauge<f64, AtomicU64>>;
type Wholes<L> = Family<L, Counter>;

/// A number of a rank that may go up and down: name, meaning, unit, and where it is.
type Real = (&'static str, &'static str, Option<Unit>, fn(&Numbers) -> Option<f64>);
/// A number of a rank that only grows.
type Whole = (&'static str, &'static str, Option<Unit>, fn(&Numbers) -> u64);

#[rustfmt::skip]
const REALS: [Real; 13] = [
    ("step", "the last step that was taken", None, |n| Some(n.step as f64)),
    ("loss", "mean cross entropy of the step's tokens of all ranks in nats", None, |n| n.loss),
    ("grad_norm", "global norm of the gradient before clipping", None, |n| n.grad_norm),
    ("learning_rate", "of the step", None, |n| Some(n.learning_rate)),
    ("tokens_per_second", "tokens of the step over its seconds", None, |n| Some(n.tokens_per_s)),
    ("step", "the step, without evaluation and checkpoint", Some(Unit::Seconds), |n| Some(n.step_s)),
    ("forward", "forward passes of the step", Some(Unit::Seconds), |n| Some(n.forward_s)),
    ("backward", "backward passes of the step", Some(Unit::Seconds), |n| Some(n.backward_s)),
    ("encode", "encoding of the step's gradients", Some(Unit::Seconds), |n| Some(n.encode_s)),
    ("wait", "waiting for the votes after the last backward pass, and for sums of the step before", Some(Unit::Seconds), |n| Some(n.wait_s)),
    ("exposed", "communication that no computing hid: the same as wait", Some(Unit::Seconds), |n| Some(n.exposed_s)),
    ("overlap", "part of the communication that hid behind the backward pass", Some(Unit::Ratios), |n| n.overlap),
    ("memory", "resident memory of the process; 0 where the system does not tell", Some(Unit::Bytes), |n| Some(n.memory_bytes as f64)),
];

#[rustfmt::skip]
const WHOLES: [Whole; 4] = [
    ("tokens", "predicted since the run began", None, |n| n.tokens),
    ("skipped_steps", "since the run began, because something was not finite", None, |n| n.skipped_steps),
    ("wire_sent", "at the sockets since the process began", Some(Unit::Bytes), |n| n.wire_bytes_sent),
    ("wire_received", "at the sockets since the process began", Some(Unit::Bytes), |n| n.wire_bytes_received),
];

/// A number of a rank and one other that only grows.
type OfBoth = (&'static str, fn(&PeerBytes) -> u64);

const PEERS: [OfBoth; 2] = [("peer_sent", |peer| peer.sent), ("peer_received", |peer| peer.received)];

/// What all ranks last said of themselves.
pub(super) fn page(ranks: &[RankNumbers]) -> String {
    let mut registry = Registry::with_prefix("tributary");
    let version = Info::new(vec![("version", crate::VERSION)]);
    registry.register("build", "the program", version);
    places(&mut registry, ranks);
    let said = || ranks.iter().filter_map(|rank| Some((rank.rank, rank.numbers.as_ref()?)));
    for (name, about, unit, of) in REALS {
        let family = Reals::<OfRank>::default();
        for (rank, numbers) in said() {
            if let Some(value) = of(numbers) {
                family.get_or_create(&OfRank { rank }).set(value);
            }
        }
        register(&mut registry, name, about, unit, family);
    }
    for (name, about, unit, of) in WHOLES {
        let family = Wholes::<OfRank>::default();
        said().for_each(|(rank, numbers)| _ = family.get_or_create(&OfRank { rank }).inc_by(of(numbers)));
        register(&mut registry, name, about, unit, family);
    }
    for (name, of) in PEERS {
        let family = Wholes::<OfPeer>::default();
        for (rank, numbers) in said() {
            for peer in &numbers.peers {
                family.get_or_create(&OfPeer { rank, peer: peer.rank }).inc_by(of(peer));
            }
        }
        let about = "of messages with another rank since the process began, without what protocols add";
        register(&mut registry, name, about, Some(Unit::Bytes), family);
    }
    let mut text = String::new();
    encode(&mut text, &registry).expect("a string takes whatever is written");
    text
}

/// Where every rank is.
fn places(registry: &mut Registry, ranks: &[RankNumbers]) {
    let (place, waiting) = (Reals::<Place>::default(), Reals::<OfRank>::default());
    for RankNumbers { rank, host, pid, at, waits, numbers } in ranks {
        let collective = numbers.as_ref().map(|numbers| numbers.last_collective.clone()).unwrap_or_default();
        let of = Place { rank: *rank, host: host.clone(), pid: *pid, at: at.clone(), collective };
        place.get_or_create(&of).set(1.0);
        waiting.get_or_create(&OfRank { rank: *rank }).set(f64::from(*waits));
    }
    registry.register(
        "place",
        "where the rank is, what of which rank it waits for, and the last collective operation up to its last step",
        place,
    );
    registry.register("waiting", "whether the rank waits for others", waiting);
}

fn register(
    registry: &mut Registry,
    name: &str,
    about: &str,
    unit: Option<Unit>,
    family: impl prometheus_client::registry::Metric,
) {
    match unit {
        Some(unit) => registry.register_with_unit(name, about, unit, family),
        None => registry.register(name, about, family),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_has_its_numbers_and_one_that_has_said_nothing_has_its_place_alone() {
        let peers = vec![PeerBytes { rank: 1, sent: 5, received: 6 }];
        let numbers = Numbers {
            step: 3,
            step_s: 0.1,
            loss: Some(1.0 / 3.0),
            tokens: 64,
            peers,
            skipped_steps: 2,
            last_collective: "votes of step 3".into(),
            ..Numbers::default()
        };
        let rank = |rank, numbers| RankNumbers {
            rank,
            host: "a \"host\"".into(),
            pid: 7,
            at: "step 4,\nwaiting".into(),
            waits: rank == 1,
            numbers,
        };
        let text = page(&[rank(0, Some(numbers)), rank(1, None)]);
        for line in [
            "tributary_build_info{version=\"0.1.0\"} 1",
            "tributary_step{rank=\"0\"} 3.0",
            "tributary_step_seconds{rank=\"0\"} 0.1",
            "tributary_loss{rank=\"0\"} 0.3333333333333333",
            "tributary_tokens_total{rank=\"0\"} 64",
            "tributary_peer_sent_bytes_total{rank=\"0\",peer=\"1\"} 5",
            "tributary_peer_received_bytes_total{rank=\"0\",peer=\"1\"} 6",
            "tributary_skipped_steps_total{rank=\"0\"} 2",
            "tributary_waiting{rank=\"0\"} 0.0",
            "tributary_waiting{rank=\"1\"} 1.0",
            "tributary_place{rank=\"1\",host=\"a \\\"host\\\"\",pid=\"7\",at=\"step 4,\\nwaiting\",collective=\"\"} 1.0",
            "tributary_place{rank=\"0\",host=\"a \\\"host\\\"\",pid=\"7\",at=\"step 4,\\nwaiting\",collective=\"votes of step 3\"} 1.0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        assert!(!text.contains("tributary_step{rank=\"1\"}") && !text.contains("tributary_grad_norm{"), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }
}
