//! Whether zstd, the lossless second stage on payloads, is worth its time: a pure function of what was measured.

/// What one trial on the payloads of a step found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trial {
    /// Bytes of the payloads as they are.
    pub raw_bytes: u64,
    /// Bytes of them in zstd frames, those included that got no smaller and stay as they are.
    pub zstd_bytes: u64,
    /// Seconds to make the frames.
    pub compress_s: f64,
    /// Seconds to read them.
    pub decompress_s: f64,
    /// Bytes a second of the link.
    pub link_bytes_per_s: f64,
}

/// Whether the time that is saved on the link is more than what it costs, and the sentence that says so. A number that
/// is none counts against it.
#[must_use]
pub fn zstd_pays(trial: &Trial) -> (bool, String) {
    let &Trial { raw_bytes, zstd_bytes, compress_s, decompress_s, link_bytes_per_s } = trial;
    if zstd_bytes >= raw_bytes {
        return (false, format!("zstd is off: it makes nothing smaller ({raw_bytes} bytes, {zstd_bytes} in zstd frames)"));
    }
    let cost_s = compress_s + decompress_s;
    let saved_s = (raw_bytes - zstd_bytes) as f64 / link_bytes_per_s;
    // A comparison with what is no number is false.
    let pays = compress_s >= 0.0 && decompress_s >= 0.0 && link_bytes_per_s > 0.0 && saved_s > cost_s;
    let percent = 100.0 * (1.0 - zstd_bytes as f64 / raw_bytes as f64);
    let reason = format!(
        "zstd is {}: it saves {percent:.1} % of the bytes, {:.2} ms on a link of {:.1} MB/s, and costs {:.2} ms",
        if pays { "on" } else { "off" },
        1e3 * saved_s,
        link_bytes_per_s / 1e6,
        1e3 * cost_s
    );
    (pays, reason)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn trial(link_bytes_per_s: f64) -> Trial {
        Trial { raw_bytes: 1_000_000, zstd_bytes: 900_000, compress_s: 2e-3, decompress_s: 1e-3, link_bytes_per_s }
    }

    #[test]
    fn it_pays_on_a_slow_link_alone() {
        let (on, why) = zstd_pays(&trial(25e6));
        assert!(on && why == "zstd is on: it saves 10.0 % of the bytes, 4.00 ms on a link of 25.0 MB/s, and costs 3.00 ms", "{why}");
        let (on, why) = zstd_pays(&trial(125e6));
        assert!(!on && why.starts_with("zstd is off: it saves 10.0 %"), "{why}");
        // As long as it saves exactly what it costs, it is not worth it.
        assert!(!zstd_pays(&Trial { compress_s: 3e-3, ..trial(25e6) }).0);
    }

    #[test]
    fn what_gets_no_smaller_or_was_not_measured_never_pays() {
        assert!(!zstd_pays(&Trial { zstd_bytes: 1_000_000, ..trial(1.0) }).0);
        assert!(!zstd_pays(&Trial { raw_bytes: 0, zstd_bytes: 0, ..trial(1.0) }).0);
        for absurd in [f64::NAN, -1.0, f64::INFINITY] {
            assert!(!zstd_pays(&Trial { compress_s: absurd, ..trial(25e6) }).0, "{absurd}");
            assert!(!zstd_pays(&Trial { decompress_s: absurd, ..trial(25e6) }).0, "{absurd}");
            assert!(!zstd_pays(&trial(absurd)).0, "{absurd}");
        }
    }

    proptest! {
        #[test]
        fn a_faster_link_never_turns_it_on(
            raw_bytes in 0u64..1 << 40,
            zstd_bytes in 0u64..1 << 40,
            compress_s in 0.0f64..10.0,
            decompress_s in 0.0f64..10.0,
            link in 1.0f64..1e11,
            faster in 1.0f64..1e3,
        ) {
            let trial = Trial { raw_bytes, zstd_bytes, compress_s, decompress_s, link_bytes_per_s: link };
            let quick = Trial { link_bytes_per_s: link * faster, ..trial };
            prop_assert!(zstd_pays(&trial).0 || !zstd_pays(&quick).0);
        }
    }
}
