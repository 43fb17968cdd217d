//! `tributary bench`: that it measures what it says. How fast it is says docs/benchmarks.md.

use serde_json::Value;

use crate::support::Place;

#[test]
fn bench_aggregate_sends_the_formulas_bytes_with_every_codec_and_with_tls() {
    let place = Place::new();
    let lines =
        |ran: &str| -> Vec<Value> { ran.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect() };
    let arguments =
        ["bench", "aggregate", "--json", "--rounds", "1", "--elements", "300000", "--line-bits-per-s", "1e9"];
    let plain = place.run(&arguments).ok();
    let plain = lines(&plain.stdout);
    let codecs: Vec<_> = plain.iter().map(|line| line["codec"].as_str().expect("a name")).collect();
    assert_eq!(codecs, ["fp32", "bf16", "int8", "sparse24-int8", "int4", "sparse24-int4"]);
    let number = |line: &Value, key: &str| line[key].as_f64().expect("a number");
    for line in &plain {
        let (sent, formula) = (number(line, "bytes_sent"), number(line, "bytes_formula"));
        assert!(sent > formula && sent <= 1.01 * formula + 65_536.0, "{line}");
        for key in ["median_s", "tcp_copy_s", "tcp_copy_ratio", "line_rate_ratio", "bytes_ratio"] {
            assert!(number(line, key) > 0.0, "{line}");
        }
        assert_eq!((&line["tls"], &line["world"]), (&false.into(), &2.into()));
        assert!((300_000..300_000 + 256).contains(&line["elements"].as_u64().expect("a number")), "{line}");
    }
    assert!(number(&plain[0], "bytes_formula") > 3.9 * number(&plain[2], "bytes_formula"));
    let mut secured = place.command(&[&arguments[..], &["--codec", "int8"]].concat());
    let secured = secured.env("TRIBUTARY_JOIN_SECRET", "a secret of enough bytes").output().expect("it runs");
    let secured = lines(&String::from_utf8_lossy(&secured.stdout));
    assert_eq!((secured.len(), &secured[0]["tls"]), (1, &Value::Bool(true)));
    assert!(number(&secured[0], "bytes_sent") > number(&plain[2], "bytes_sent"), "every record has its tag");
}

#[test]
fn bench_aggregate_draws_what_both_ranks_do_where_that_is_asked_for() {
    let place = Place::new();
    let arguments = ["bench", "aggregate", "--rounds", "1", "--elements", "300000", "--codec", "int8"];
    place.run(&arguments).ok();
    assert!(!place.path("drawn").exists());
    place.run(&[&arguments[..], &["--trace", "drawn"]].concat()).ok();
    let text = std::fs::read_to_string(place.path("drawn/trace.json")).expect("a picture");
    let picture: Value = serde_json::from_str(&text).expect("JSON");
    let events = picture["traceEvents"].as_array().expect("events");
    for rank in 0..2 {
        for category in ["sum", "give", "encode", "send", "receive", "reduce", "decode"] {
            assert!(events.iter().any(|event| event["pid"] == rank && event["cat"] == category), "{rank} {category}");
        }
    }
}

#[test]
fn bench_aggregate_refuses_what_it_cannot_measure() {
    let place = Place::new();
    let refused = |arguments: &[&str], said: &str| {
        place.run(&[&["bench", "aggregate"], arguments].concat()).failed(2, &[said]);
    };
    refused(&["--codec", "int9"], "expected one of fp32, bf16");
    refused(&["--elements", "99999999999"], "expected a whole number from 1 to 1073741824");
    refused(&["--elements", "0"], "expected a whole number from 1 to 1073741824");
    refused(
        &["--rank", "0", "--addresses", "127.0.0.1:65535,127.0.0.1:3"],
        "127.0.0.1:65535: expected a port from 1 to 65534",
    );
    refused(&["--line-bits-per-s", "0"], "expected a number above 0");
    refused(&["--rank", "0"], "--addresses");
    refused(&["--rank", "2", "--addresses", "127.0.0.1:1,127.0.0.1:3"], "--rank 2: expected one of 2 addresses");
    refused(&["--rank", "0", "--addresses", "10.77.0.1:1,10.77.0.2:1"], "10.77.0.1 is beyond loopback");
}

#[test]
fn bench_checkpoint_measures_every_field_and_leaves_what_was_asked_for() {
    let place = Place::new();
    let arguments =
        ["bench", "checkpoint", "--json", "--elements", "20000", "--rounds", "2", "--step-ms", "1", "--folder", "."];
    let line = |more: &[&str]| -> Value {
        let ran = place.run(&[&arguments[..], more].concat()).ok();
        serde_json::from_str(&ran.stdout).expect("one JSON object")
    };
    let before = place.names(".");
    let found = line(&[]);
    assert_eq!(place.names("."), before, "nothing is left");
    assert_eq!(found["state_bytes"], 240_000);
    for key in ["memcpy_s", "stall_s", "stall_ratio", "write_s", "write_ratio", "step_s", "step_ratio"] {
        assert!(found[key].as_f64().expect("a number") > 0.0, "{key} of {found}");
    }
    let loads = ["load_s", "load_again_s", "read_s"];
    for key in loads {
        assert!(found[key].as_f64().expect("a number") > 0.0, "{key} of {found}");
    }
    let path = line(&["--keep"])["path"].as_str().expect("a path").to_owned();
    let alone = place.run(&["bench", "checkpoint", "--json", "--load", &path]).ok();
    let alone: Value = serde_json::from_str(&alone.stdout).expect("one JSON object");
    assert!(loads.iter().all(|key| alone[key].as_f64().is_some_and(|seconds| seconds > 0.0)), "{alone}");
    place.run(&["bench", "checkpoint", "--load", "none"]).failed(1, &["could not read the manifest none/"]);
    let checkpoint = checkpoint::Checkpoint::open(&place.path(&path)).expect("a checkpoint");
    assert!(checkpoint.verify().expect("whole") > 240_000);
    assert!(found["zstd_ratio"].is_null());
    let packed = line(&["--zstd", "--keep"]);
    let ratio = packed["zstd_ratio"].as_f64().expect("a number");
    assert!(ratio > 0.5 && ratio < 0.99, "exponents are alike: {packed}");
    let path = place.path(packed["path"].as_str().expect("a path"));
    assert_eq!(checkpoint::Checkpoint::open(&path).expect("a checkpoint").manifest().version, 2);
    place.run(&["bench", "checkpoint", "--elements", "0"]).failed(2, &["expected a whole number from 1"]);
    place.run(&["bench", "checkpoint", "--elements", "9", "--folder", "none"]).failed(1, &["make a folder in", "none"]);
}
