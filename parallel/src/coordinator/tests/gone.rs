//! Coordinators that are not there, end or fall silent.

use std::io::Write as _;

use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use super::*;
use crate::wire::control::coordinator_server::Coordinator as Service;
use crate::wire::control::{FromWorker, ToWorker, Welcome};

fn not_there(address: &str) -> String {
    let within = Duration::from_secs(1);
    match try_join(address.to_owned(), within, hello(None)).map(|_| ()) {
        Err(ControlError::NotThere { address: at, within_s, why }) => {
            assert_eq!((&*at, within_s), (address, 1.0));
            why
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn who_finds_no_coordinator_is_told_what_was_there() {
    let bind = || TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let address = |listener: &TcpListener| listener.local_addr().expect("bound").to_string();
    let free = address(&bind());
    assert_eq!(not_there(&free), "connection refused");
    // The system accepts, but nobody answers.
    let silent = bind();
    assert_eq!(not_there(&address(&silent)), "it did not answer");
    // A server of another protocol.
    let other = bind();
    let at = address(&other);
    std::thread::spawn(move || {
        let mut open = Vec::new();
        for stream in other.incoming() {
            let mut stream = stream.expect("accepts");
            // The caller may have gone.
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
            open.push(stream);
        }
    });
    let why = not_there(&at);
    assert!(!why.is_empty() && !why.contains('\n'), "{why}");
    assert_eq!(not_there("127.0.0.1"), "that is not HOST:PORT");
    assert_eq!(not_there("127.0.0.1:notaport"), "that is not HOST:PORT");
}

#[test]
fn who_comes_when_a_run_ends_is_not_refused_for_good() {
    let coordinator = coordinator(1);
    let worker = join(&coordinator, 0);
    start(&[&worker]);
    let _ = worker.leave(0);
    assert_eq!(coordinator.ending(GUARD).map(|ending| ending.code), Some(0));
    assert_eq!(not_there(&coordinator.address().to_string()), "it says: the run is ending");
}

#[test]
fn a_coordinator_that_ends_is_named_once_to_each_worker() {
    let coordinator = coordinator(2);
    let address = coordinator.address();
    let workers = running(&coordinator);
    drop(coordinator);
    let verdict = format!(
        "the coordinator at {address} (host here, process 1) closed the connection; this worker was at starting"
    );
    for worker in &workers {
        assert_eq!(verdicts(&worker.ended), [Ending { verdict: verdict.clone(), code: TRY_AGAIN }]);
        assert_eq!(worker.control.ending(Duration::ZERO).verdict, verdict);
        assert_eq!(worker.control.poll(GUARD).map(|_| ()).expect_err("ended").to_string(), verdict);
    }
}

/// A coordinator that welcomes everybody and then says nothing, or says it in vain.
struct Mute {
    lines: Mutex<Vec<mpsc::UnboundedSender<Result<ToWorker, Status>>>>,
}

#[tonic::async_trait]
impl Service for Mute {
    type JoinStream = UnboundedReceiverStream<Result<ToWorker, Status>>;

    async fn join(&self, _: Request<Streaming<FromWorker>>) -> Result<Response<Self::JoinStream>, Status> {
        let (line, outgoing) = mpsc::unbounded_channel();
        let welcome = Welcome { ranks: 1, peer_timeout_s: 0.5, ..Welcome::default() };
        line.send(Ok(ToWorker { what: Some(To::Welcome(welcome)) })).expect("open");
        self.lines.lock().expect("no panic").push(line);
        Ok(Response::new(UnboundedReceiverStream::new(outgoing)))
    }
}

fn mute() -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            listener.set_nonblocking(true).expect("a socket");
            let listener = tokio::net::TcpListener::from_std(listener).expect("a socket");
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
            let mute = Mute { lines: Mutex::default() };
            Server::builder().add_service(CoordinatorServer::new(mute)).serve_with_incoming(incoming).await
        })
    });
    address
}

#[test]
fn a_silent_coordinator_is_named() {
    let address = mute();
    let worker = try_join(address.to_string(), GUARD, hello(None)).expect("welcome");
    let all = verdicts(&worker.ended);
    let [Ending { verdict, code: TRY_AGAIN }] = &all[..] else { panic!("{all:?}") };
    assert!(
        verdict.starts_with(&format!("the coordinator at {address} (host , process 0) has been silent for ")),
        "{verdict}"
    );
}

#[test]
fn a_dropped_worker_lets_go_even_of_a_coordinator_that_takes_no_notice() {
    let worker = try_join(mute().to_string(), GUARD, hello(None)).expect("welcome");
    drop(worker.control);
    assert_eq!(verdicts(&worker.ended), []);
}
