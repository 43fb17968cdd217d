//! Workers with a secret, and those that do not know it.

use super::strangers::knock;
use super::*;
use crate::transport::tls::{Keys, Mismatch};

fn keys(secret: &str) -> Security {
    Security::Tls(Arc::new(Keys::of(secret.as_bytes()).expect("long enough")))
}

#[test]
fn workers_that_do_not_know_the_secret_are_told_why_and_the_others_go_on() {
    let ours = || keys("the secret of this run");
    let coordinator = coordinator_with(2, ours());
    let join = |rank, security| try_join_with(coordinator.address().to_string(), GUARD, hello(Some(rank)), security);
    let first = join(0, ours()).expect("welcome");
    let address = coordinator.address().to_string();
    for (security, why) in [
        (keys("the secret of another run"), Mismatch::Secret),
        (Security::Loopback, Mismatch::Tls),
        (Security::TrustedNetwork, Mismatch::Tls),
    ] {
        let refused = join(1, security).map(drop).expect_err("refused");
        assert_eq!(refused, ControlError::Mismatch { address: address.clone(), why });
    }
    knock(coordinator.address(), b"GET / HTTP/1.1\r\nHost: here\r\n\r\n");
    let workers = [first, join(1, ours()).expect("welcome")];
    start(&workers.each_ref());
    finish(&coordinator, workers);
}

#[test]
fn a_secret_finds_no_coordinator_where_one_is_plain() {
    let coordinator = coordinator(1);
    let address = coordinator.address().to_string();
    let secured = try_join_with(address, Duration::from_secs(2), hello(None), keys("a secret of this worker"));
    match secured.map(drop).expect_err("it is plain") {
        ControlError::NotThere { why, .. } => assert_eq!(why, Mismatch::Plain.to_string()),
        other => panic!("{other}"),
    }
}
