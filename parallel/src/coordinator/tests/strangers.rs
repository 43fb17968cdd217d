//! Callers that are no workers, or not of this version.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Endpoint;

use super::*;
use crate::transport::http2::{Caller, MAX_CONCURRENT_STREAMS, REFUSED_STREAM};
use crate::wire::control::coordinator_client::CoordinatorClient;
use crate::wire::control::{FromWorker, ToWorker};

/// Sends bytes and reads until the coordinator closes the connection.
pub(super) fn knock(address: SocketAddr, bytes: &[u8]) {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(GUARD)).expect("a socket");
    // It may be closed before all was written.
    let _ = stream.write_all(bytes);
    loop {
        match stream.read(&mut [0; 4096]) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("the connection stays open"),
            // Reset: it did not even read all.
            Err(_) => return,
        }
    }
}

#[test]
fn strangers_do_not_disturb_a_run() {
    let coordinator = coordinator(2);
    let address = coordinator.address();
    let idle = TcpStream::connect(address).expect("it listens");
    let first = join(&coordinator, 0);
    knock(address, b"GET / HTTP/1.1\r\nHost: here\r\n\r\n");
    let second = join(&coordinator, 1);
    start(&[&first, &second]);
    let mut x = 1u64;
    let mut random = || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (x >> 56) as u8
    };
    for length in [24, 1000, 100_000] {
        let noise: Vec<u8> = (0..length).map(|_| random()).collect();
        knock(address, &noise);
    }
    // HTTP/2 without gRPC: its preface, and then noise.
    knock(address, &[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), vec![0xff; 100]].concat());
    drop(TcpStream::connect(address).expect("it listens"));
    finish(&coordinator, [first, second]);
    drop(idle);
}

/// Calls the coordinator and says this first; then waits for the end of what it answers while the call stays open.
fn call(address: SocketAddr, first: Option<From>, then: Option<FromWorker>) -> (Vec<To>, Result<(), String>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let talk = async {
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address");
        let mut client = CoordinatorClient::new(endpoint.connect().await.expect("it listens"));
        let (out, outgoing) = mpsc::unbounded_channel();
        out.send(FromWorker { what: first }).expect("open");
        let mut messages = client.join(UnboundedReceiverStream::new(outgoing)).await.expect("answers").into_inner();
        let mut heard = Vec::new();
        let mut then = then.into_iter();
        loop {
            match messages.message().await {
                Ok(Some(ToWorker { what: Some(To::Beat(_)) })) => {}
                Ok(Some(message)) => {
                    heard.extend(message.what);
                    then.next().into_iter().for_each(|then| out.send(then).expect("open"));
                }
                Ok(None) => return (heard, Ok(())),
                Err(status) => return (heard, Err(status.message().to_owned())),
            }
        }
    };
    runtime.block_on(async { tokio::time::timeout(GUARD, talk).await.expect("no hang") })
}

#[test]
fn calls_that_are_no_worker_are_ended_by_the_coordinator() {
    let coordinator = coordinator(2);
    let address = coordinator.address();
    let first = join(&coordinator, 0);
    let no_greeting = Err("expected a worker's greeting first: run the same build on every machine".to_owned());
    assert_eq!(call(address, Some(From::Holds(Holds::default())), None), (vec![], no_greeting.clone()));
    assert_eq!(call(address, None, None), (vec![], no_greeting));
    // One that is refused does not keep its place by keeping its call open.
    let (heard, end) = call(address, Some(From::Hello(hello(Some(9)))), None);
    assert!(matches!(&heard[..], [To::Refused(refused)] if refused.why.contains("rank 9")), "{heard:?}");
    assert_eq!(end, Ok(()));
    let second = join(&coordinator, 1);
    start(&[&first, &second]);
    finish(&coordinator, [first, second]);
}

#[test]
fn a_second_call_on_a_connection_is_refused_and_disturbs_nobody() {
    let coordinator = coordinator(2);
    let first = join(&coordinator, 0);
    let mut caller = Caller::new(coordinator.address(), GUARD);
    assert_eq!(caller.setting(MAX_CONCURRENT_STREAMS), Some(1));
    // The first one is a worker's that has not greeted yet, and stays open.
    caller.call(1, "/tributary.control.v1.Coordinator/Join");
    caller.call(3, "/tributary.control.v1.Coordinator/Join");
    assert_eq!(caller.reset(), (3, REFUSED_STREAM));
    let second = join(&coordinator, 1);
    start(&[&first, &second]);
    finish(&coordinator, [first, second]);
}

#[test]
fn a_worker_that_speaks_another_language_is_named() {
    let coordinator = coordinator(2);
    let first = join(&coordinator, 0);
    let address = coordinator.address();
    let (heard, _) = guarded(move || call(address, Some(From::Hello(hello(Some(1)))), Some(FromWorker { what: None })));
    assert!(matches!(&heard[..], [To::Welcome(_), ..]), "{heard:?}");
    let ending = coordinator.ending(GUARD).expect("the run ends");
    let verdict = "rank 1 (host here, process 101) is gone: it sent a message that this version does not know";
    assert!(ending.verdict.starts_with(verdict), "{}", ending.verdict);
    assert_eq!(verdicts(&first.ended), [ending]);
}
