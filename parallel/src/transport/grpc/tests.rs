use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use tokio::sync::mpsc::unbounded_channel;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::metadata::MetadataValue;
use tonic::transport::Endpoint;
use tonic::{Code, Request, Status};

use super::outbound::{EPOCH, LET_IN, RANK, TOKEN, VERSION};
use super::*;
use crate::transport::Incoming;
use crate::transport::http2::{Caller, MAX_CONCURRENT_STREAMS};
use crate::transport::raw::service::data_client::DataClient;

mod connecting;
mod secured;
mod strangers;

/// Only a guard: nothing here takes so long unless it hangs.
const HANG: Duration = Duration::from_secs(60);
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

struct Rank {
    transport: GrpcTransport,
    came: Receiver<Incoming>,
}

impl Rank {
    fn next(&self) -> Incoming {
        self.came.recv_timeout(HANG).expect("something comes in")
    }

    #[track_caller]
    fn expect(&self, from: usize, text: &str) {
        assert_eq!(self.next(), Incoming::Message { from, bytes: text.to_owned().into() });
    }

    #[track_caller]
    fn expect_lost(&self, lost: usize) -> String {
        match self.next() {
            Incoming::Lost { rank, why } if rank == lost => why,
            other => panic!("expected the loss of rank {lost}, came {other:?}"),
        }
    }
}

fn listen() -> Listener {
    Listener::bind(LOOPBACK, 0).expect("a port of loopback")
}

fn group(rank: usize, addresses: &[SocketAddr]) -> Group {
    Group {
        rank,
        addresses: addresses.to_vec(),
        epoch: 7,
        token: "secret".into(),
        connect_within: HANG,
        security: Security::Loopback,
        congestion: Congestion::default(),
    }
}

fn sink() -> (Sink, Receiver<Incoming>) {
    let (tell, came) = channel();
    (Arc::new(move |incoming| drop(tell.send(incoming))), came)
}

/// All ranks at once, each in a thread of its own, as `change` makes their groups.
fn try_connect(ranks: usize, change: impl Fn(&mut Group)) -> Vec<Result<Rank, TransportError>> {
    let listeners = (0..ranks).map(|_| listen()).collect::<Vec<_>>();
    let addresses = listeners.iter().map(Listener::local_address).collect::<Vec<_>>();
    let connecting = listeners.into_iter().enumerate().map(|(rank, listener)| {
        let mut group = group(rank, &addresses);
        change(&mut group);
        thread::spawn(move || {
            let (sink, came) = sink();
            listener.connect(&group, sink).map(|transport| Rank { transport, came })
        })
    });
    let connecting = connecting.collect::<Vec<_>>();
    connecting.into_iter().map(|thread| thread.join().expect("no panic")).collect()
}

fn connect(ranks: usize) -> Vec<Rank> {
    try_connect(ranks, |_| {}).into_iter().map(|rank| rank.expect("all ranks are here")).collect()
}

/// Two ranks and where they listen.
fn pair() -> ([Rank; 2], [SocketAddr; 2]) {
    pair_of([listen(), listen()], &Security::Loopback)
}

fn pair_of(listeners: [Listener; 2], security: &Security) -> ([Rank; 2], [SocketAddr; 2]) {
    let addresses = [listeners[0].local_address(), listeners[1].local_address()];
    let ranks = thread::scope(|scope| {
        let [first, second] = listeners;
        let start = |rank, listener: Listener| {
            let (sink, came) = sink();
            let group = Group { security: security.clone(), ..group(rank, &addresses) };
            Rank { transport: listener.connect(&group, sink).expect("both are here"), came }
        };
        let first = scope.spawn(move || start(0, first));
        let second = start(1, second);
        [first.join().expect("no panic"), second]
    });
    (ranks, addresses)
}

fn close_all(ranks: &[Rank]) {
    thread::scope(|scope| {
        for Rank { transport, .. } in ranks {
            scope.spawn(|| transport.close(HANG));
        }
    });
}

/// Rank `from`'s message `i` to rank `to`: its own bytes, of one of many lengths.
fn message(from: usize, to: usize, i: usize) -> Bytes {
    let lengths = [1, 4 << 20, 3, 100, 256 << 10, 16_383, 40_000, 1 << 20, 5, MESSAGE_BYTES_MAX];
    let length = lengths[(from + to + i) % lengths.len()];
    (0..length).map(|at| (at ^ (at >> 8) ^ (from * 31 + to * 7 + i)) as u8).collect::<Vec<_>>().into()
}

#[test]
fn messages_of_three_ranks_come_whole_and_in_order_and_are_counted_at_the_socket() {
    const EACH: usize = 40;
    let ranks = connect(3);
    let others = |rank: usize| (0..3).filter(move |other| *other != rank);
    for i in 0..EACH {
        for (from, rank) in ranks.iter().enumerate() {
            others(from).for_each(|to| rank.transport.send(to, message(from, to, i)));
        }
    }
    for (to, rank) in ranks.iter().enumerate() {
        let mut seen = [0; 3];
        for _ in 0..2 * EACH {
            let Incoming::Message { from, bytes } = rank.next() else { panic!("nobody is lost") };
            assert!(bytes == message(from, to, seen[from]), "message {} of rank {from} to rank {to}", seen[from]);
            seen[from] += 1;
        }
    }
    close_all(&ranks);
    for (here, rank) in ranks.iter().enumerate() {
        let bytes = |from, to| (0..EACH).map(|i| message(from, to, i).len() as u64).sum::<u64>();
        let sent = others(here).map(|to| bytes(here, to)).sum::<u64>();
        let received = others(here).map(|from| bytes(from, here)).sum::<u64>();
        let counted = rank.transport.counted();
        for (payload, counted) in [(sent, counted.sent), (received, counted.received)] {
            assert!(counted > payload, "rank {here}: {counted} bytes cannot hold {payload}");
            assert!(counted <= payload * 101 / 100 + (64 << 10), "rank {here}: {counted} bytes for {payload}");
        }
        assert_eq!(rank.came.try_iter().count(), 0, "no loss is told when all close");
    }
}

#[test]
fn a_rank_that_is_dropped_is_lost_once_to_each_other() {
    let mut ranks = connect(3);
    let dropped = ranks.pop().expect("three ranks");
    drop(dropped);
    for rank in &ranks {
        let why = rank.expect_lost(2);
        assert!(why.contains("connection closed") || why.contains("connection reset"), "{why}");
        rank.transport.send(2, Bytes::from_static(b"to nobody"));
    }
    ranks[0].transport.send(1, Bytes::from_static(b"still here"));
    ranks[1].expect(0, "still here");
    close_all(&ranks);
    assert!(ranks.iter().all(|rank| rank.came.try_iter().count() == 0), "told once");
}

#[test]
fn a_rank_that_closes_is_not_lost_and_all_it_sent_arrives() {
    let mut ranks = connect(3);
    let closed = ranks.pop().expect("three ranks");
    for i in 0..30 {
        closed.transport.send(0, message(2, 0, i));
    }
    closed.transport.close(HANG);
    closed.transport.send(0, Bytes::from_static(b"too late"));
    closed.transport.close(HANG);
    drop(closed);
    for i in 0..30 {
        assert!(ranks[0].next() == Incoming::Message { from: 2, bytes: message(2, 0, i) }, "message {i}");
    }
    ranks[0].transport.send(2, Bytes::from_static(b"to nobody"));
    ranks[0].transport.send(1, Bytes::from_static(b"still here"));
    ranks[1].expect(0, "still here");
    close_all(&ranks);
    assert!(ranks.iter().all(|rank| rank.came.try_iter().count() == 0), "no loss is told");
}

/// What a caller says of itself.
struct Said {
    rank: &'static str,
    epoch: &'static str,
    token: &'static str,
    version: &'static str,
}

const RIGHT: Said = Said { rank: "1", epoch: "7", token: "secret", version: env!("CARGO_PKG_VERSION") };

impl Said {
    /// With a body that lets the other's call in, and then sends nothing and does not end.
    async fn call(&self, address: SocketAddr) -> Result<(), Status> {
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address");
        let mut client = DataClient::new(endpoint.connect().await.expect("a server"));
        let (open, waiting) = unbounded_channel::<Bytes>();
        open.send(Bytes::from_static(LET_IN)).expect("there is its other end");
        let mut request = Request::new(UnboundedReceiverStream::new(waiting));
        for (key, value) in [(RANK, self.rank), (EPOCH, self.epoch), (VERSION, self.version)] {
            request.metadata_mut().insert(key, MetadataValue::from_static(value));
        }
        let token = blake3::hash(self.token.as_bytes());
        request.metadata_mut().insert_bin(TOKEN, MetadataValue::from_bytes(token.as_bytes()));
        client.stream(request).await.map(drop)
    }
}

fn asynchronous() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

#[test]
fn a_call_that_is_not_of_the_run_is_refused_by_name_and_disturbs_nobody() {
    let (ranks, [address, _]) = pair();
    let check = |said: &Said, code: Code, words: &str| {
        let refused = asynchronous().block_on(async { timeout(HANG, said.call(address)).await.expect("an answer") });
        let status = refused.expect_err("refused");
        assert_eq!((status.code(), status.message()), (code, words));
    };
    check(&Said { token: "guess", ..RIGHT }, Code::Unauthenticated, "the token is not this run's");
    check(&Said { epoch: "6", ..RIGHT }, Code::FailedPrecondition, "epoch 6 calls, epoch 7 is here");
    let versions = concat!("version 0.0.1 calls, version ", env!("CARGO_PKG_VERSION"), " is here");
    check(&Said { version: "0.0.1", ..RIGHT }, Code::FailedPrecondition, versions);
    for rank in ["0", "2", "-1", "x"] {
        let words = format!("rank {rank} calls rank 0: expected another one below 2");
        check(&Said { rank, ..RIGHT }, Code::InvalidArgument, &words);
    }
    check(&RIGHT, Code::AlreadyExists, "rank 1 has a stream to rank 0 already");
    ranks[1].transport.send(0, Bytes::from_static(b"undisturbed"));
    ranks[0].expect(1, "undisturbed");
    close_all(&ranks);
    assert!(ranks.iter().all(|rank| rank.came.try_iter().count() == 0));
}

#[test]
fn strangers_are_sent_away_and_messages_go_on() {
    let mut listeners = [listen(), listen()];
    for listener in &mut listeners {
        listener.admitted_within = Duration::from_secs(2);
    }
    let (ranks, addresses) = pair_of(listeners, &Security::Loopback);
    let stranger = |bytes: &[u8], to: SocketAddr| {
        let mut stream = TcpStream::connect(to).expect("the port is open");
        stream.set_read_timeout(Some(HANG)).expect("a timeout");
        stream.write_all(bytes).expect("room for a few bytes");
        // Reading ends when the other side closes, in order or with a reset; a time-out is neither.
        let end = stream.read_to_end(&mut Vec::new());
        let ended = end.map(drop).or_else(|error| match error.kind() {
            io::ErrorKind::ConnectionReset => Ok(()),
            kind => Err(kind),
        });
        assert_eq!(ended, Ok(()));
    };
    let noise = (0..4096_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect::<Vec<_>>();
    let noise = &noise[..];
    let sender = &ranks[0].transport;
    thread::scope(|scope| {
        scope.spawn(|| (0..100).for_each(|i| sender.send(1, message(0, 1, i % 4))));
        for to in addresses {
            scope.spawn(move || stranger(b"GET / HTTP/1.1\r\nHost: rank\r\n\r\n", to));
            scope.spawn(move || stranger(noise, to));
            // HTTP/2, but what follows is none: this one is not let in, and its time is up after a while.
            scope.spawn(move || stranger(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", noise].concat(), to));
        }
    });
    for i in 0..100 {
        assert!(ranks[1].next() == Incoming::Message { from: 0, bytes: message(0, 1, i % 4) }, "message {i}");
    }
    close_all(&ranks);
    assert!(ranks.iter().all(|rank| rank.came.try_iter().count() == 0));
}

/// That a call above the bound is refused is tested at the coordinator's, whose calls stay open.
#[test]
fn a_connection_is_told_how_many_calls_it_may_make() {
    let (ranks, [address, _]) = pair();
    assert_eq!(Caller::new(address, HANG).setting(MAX_CONCURRENT_STREAMS), Some(CALLS_MAX));
    close_all(&ranks);
}

#[test]
fn idle_connections_do_not_pile_up() {
    idle_connections(pair());
}

/// As many as there are places, and one more.
fn idle_connections((ranks, [address, _]): ([Rank; 2], [SocketAddr; 2])) {
    // One place is the other rank's.
    let places = ranks.len() + STRANGERS_MAX - 1;
    let idle = (0..places).map(|_| TcpStream::connect(address).expect("a place")).collect::<Vec<_>>();
    let mut more = TcpStream::connect(address).expect("the system's queue");
    more.set_read_timeout(Some(HANG)).expect("a timeout");
    assert_eq!(more.read(&mut [0; 1]).expect("closed in order"), 0);
    ranks[1].transport.send(0, Bytes::from_static(b"undisturbed"));
    ranks[0].expect(1, "undisturbed");
    drop(idle);
    close_all(&ranks);
}

#[test]
fn closing_does_not_wait_longer_than_told_for_a_rank_that_takes_nothing() {
    let (here, mute) = (listen(), listen());
    let addresses = [here.local_address(), mute.local_address()];
    let address = addresses[0];
    thread::spawn(move || asynchronous().block_on(RIGHT.call(address)));
    let (sink, came) = sink();
    let rank = Rank { transport: here.connect(&group(0, &addresses), sink).expect("it called"), came };
    (0..10).for_each(|i| rank.transport.send(1, message(0, 1, i)));
    let begun = std::time::Instant::now();
    rank.transport.close(Duration::from_millis(200));
    assert!(begun.elapsed() < HANG / 10, "{:?}", begun.elapsed());
    assert!(rank.transport.counted().sent < (8 << 20), "the other one takes nothing");
}

#[test]
fn a_drop_among_asynchronous_tasks_does_not_panic() {
    let ([here, there], _) = pair();
    asynchronous().block_on(async move { drop(here) });
    there.expect_lost(0);
}

#[test]
#[should_panic(expected = "an empty message is the goodbye")]
fn an_empty_message_cannot_be_sent() {
    let ([here, _there], _) = pair();
    here.transport.send(1, Bytes::new());
}

#[test]
fn a_service_that_reads_the_stream_gets_what_waits_until_the_goodbye() {
    let (told, tells) = channel();
    let (queue, outbox) = outbound::outbox(3, Arc::new(move |incoming| _ = told.send(incoming)), None);
    let queued = |text: &'static str| Queued { message: text.into(), since: None };
    for text in ["one", "TRIB two", "", "three"] {
        queue.send(queued(text)).expect("it is open");
    }
    let came = asynchronous().block_on(outbox.collect::<Vec<Bytes>>());
    assert_eq!(came, ["one", "TRIB two", ""]);
    assert_eq!(tells.try_iter().collect::<Vec<_>>(), [Incoming::Left { to: 3 }], "frames of gradients alone are told");
    assert!(queue.send(queued("four")).is_err(), "it does not pile up");
}
