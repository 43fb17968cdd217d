//! Ranks with a secret, and whoever does not know it.

use super::*;
use crate::transport::tls::{Keys, Mismatch};

const SECRET: &[u8] = b"known to the ranks of this test";
const OTHER: &[u8] = b"known to nobody in this test at all";

/// As a process of its own derives it: each time anew.
fn keys(secret: &[u8]) -> Security {
    Security::Tls(Arc::new(Keys::of(secret).expect("long enough")))
}

fn expect_pair(ranks: Vec<Result<Rank, TransportError>>) -> [Rank; 2] {
    let ranks = ranks.into_iter().map(|rank| rank.expect("all ranks are here")).collect::<Vec<_>>();
    ranks.try_into().unwrap_or_else(|_| panic!("two ranks"))
}

#[test]
fn ranks_with_one_secret_exchange_messages_and_count_them_at_the_socket() {
    const EACH: usize = 20;
    let ranks = expect_pair(try_connect(2, |group| group.security = keys(SECRET)));
    for i in 0..EACH {
        ranks[0].transport.send(1, message(0, 1, i));
        ranks[1].transport.send(0, message(1, 0, i));
    }
    for (to, rank) in ranks.iter().enumerate() {
        let from = 1 - to;
        for i in 0..EACH {
            assert!(rank.next() == Incoming::Message { from, bytes: message(from, to, i) }, "message {i} to {to}");
        }
    }
    close_all(&ranks);
    for (here, rank) in ranks.iter().enumerate() {
        let payload = (0..EACH).map(|i| message(here, 1 - here, i).len() as u64).sum::<u64>();
        let sent = rank.transport.counted().sent;
        assert!(sent > payload && sent <= payload * 101 / 100 + (64 << 10), "rank {here}: {sent} for {payload}");
        assert_eq!(rank.came.try_iter().count(), 0, "no loss is told when all close");
    }
}

/// Rank 0 has a secret, rank 1 has this; what the two say, of which one may say only that the other one is gone.
#[track_caller]
fn check_apart(other: &Security, why: Mismatch) {
    let errors = try_connect(2, |group| {
        group.security = if group.rank == 0 { keys(SECRET) } else { other.clone() };
        group.connect_within = Duration::from_secs(2);
    });
    let errors = errors.into_iter().map(|error| error.map(drop).expect_err("they are apart").to_string());
    let errors = errors.collect::<Vec<_>>();
    assert!(errors.iter().any(|error| error.ends_with(&why.to_string())), "expected {why:?} in {errors:?}");
    for (rank, error) in errors.iter().enumerate() {
        assert!(error.contains(&format!("rank {} at 127.0.0.1:", 1 - rank)), "{error}");
    }
}

#[test]
fn ranks_that_are_not_secured_alike_do_not_connect_and_say_why() {
    check_apart(&keys(OTHER), Mismatch::Secret);
    check_apart(&Security::Loopback, Mismatch::Tls);
}

#[test]
fn who_does_not_know_the_secret_is_kept_out_while_the_ranks_meet_and_go_on() {
    let mut listeners = [listen(), listen()];
    for listener in &mut listeners {
        listener.admitted_within = Duration::from_secs(2);
    }
    let addresses = listeners.each_ref().map(Listener::local_address);
    // In the queue before the ranks: a handshake that does not go on keeps nobody waiting.
    let connect = |to| {
        let stream = TcpStream::connect(to).expect("the port is open");
        stream.set_read_timeout(Some(HANG)).expect("a timeout");
        stream
    };
    let mute = addresses.map(connect);
    let start = |rank: usize, listener: Listener| {
        let group = Group { security: keys(SECRET), ..group(rank, &addresses) };
        thread::spawn(move || {
            let (sink, came) = sink();
            Rank { transport: listener.connect(&group, sink).expect("both are here"), came }
        })
    };
    let [first, second] = listeners;
    let ranks = [start(0, first), start(1, second)].map(|rank| rank.join().expect("no panic"));

    // They know the token and everything else, but not the secret.
    let plain = asynchronous().block_on(async { timeout(HANG, RIGHT.call(addresses[0])).await.expect("an answer") });
    plain.expect_err("it is plain");
    let other = asynchronous().block_on(async {
        let line = Arc::default();
        let error = keys(OTHER)
            .connect(addresses[0], Counters::default(), Arc::clone(&line), &Congestion::default())
            .await
            .map(drop);
        (error.map_err(|error| error.to_string()), line.mismatch())
    });
    assert_eq!(other, (Err(Mismatch::Secret.to_string()), Some(Mismatch::Secret)));
    // All of these are closed: those who say what they should not at once, the mute ones when their time is up.
    let noise = (0..4096_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect::<Vec<_>>();
    let words: [&[u8]; 4] =
        [b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &noise, b"\x16\x03\x01\xff\xff"];
    let said = words.map(|words| {
        let mut stream = connect(addresses[1]);
        stream.write_all(words).expect("room for a few bytes");
        stream
    });
    for mut stream in said.into_iter().chain(mute) {
        let end = stream.read_to_end(&mut Vec::new()).map(drop);
        assert!(end.as_ref().map_or_else(|error| error.kind() == io::ErrorKind::ConnectionReset, |()| true), "{end:?}");
    }
    for (from, rank) in ranks.iter().enumerate() {
        rank.transport.send(1 - from, Bytes::from_static(b"undisturbed"));
        ranks[1 - from].expect(from, "undisturbed");
    }
    close_all(&ranks);
    assert!(ranks.iter().all(|rank| rank.came.try_iter().count() == 0));
}

#[test]
fn handshakes_that_do_not_go_on_do_not_pile_up() {
    idle_connections(pair_of([listen(), listen()], &keys(SECRET)));
}

#[test]
fn the_secret_does_not_replace_the_token() {
    let errors = try_connect(2, |group| {
        group.security = keys(SECRET);
        group.token = format!("of rank {}", group.rank);
        group.connect_within = Duration::from_secs(2);
    });
    let errors = errors.into_iter().map(|error| error.map(drop).expect_err("refused").to_string());
    let errors = errors.collect::<Vec<_>>();
    assert!(errors.iter().any(|error| error.ends_with("the token is not this run's")), "{errors:?}");
}

/// Everything that a connection to the address which comes back, and from there to `to`, has carried, both ways.
fn forward(to: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let listener = std::net::TcpListener::bind((LOOPBACK, 0)).expect("a port");
    let (address, seen) = (listener.local_addr().expect("an address"), Arc::<Mutex<Vec<u8>>>::default());
    let all = seen.clone();
    thread::spawn(move || {
        let (here, _) = listener.accept().expect("a rank calls");
        let there = TcpStream::connect(to).expect("a rank listens");
        let copy = |mut from: TcpStream, mut to: TcpStream, all: Arc<Mutex<Vec<u8>>>| {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                all.lock().expect("no panic").extend_from_slice(&bytes[..count]);
                if to.write_all(&bytes[..count]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(std::net::Shutdown::Write);
        };
        let clone = |stream: &TcpStream| stream.try_clone().expect("a socket");
        let (back, also) = ((clone(&there), clone(&here)), all.clone());
        thread::spawn(move || copy(back.0, back.1, also));
        copy(here, there, all);
    });
    (address, seen)
}

/// Whether a message can be read on its way.
fn readable(security: impl Fn() -> Security) -> bool {
    const MARKER: &[u8] = b"a gradient that nobody else should read";
    let listeners = [listen(), listen()];
    let addresses = listeners.each_ref().map(Listener::local_address);
    let (between, seen) = forward(addresses[1]);
    let [first, second] = listeners;
    let connect = |group: Group, listener: Listener| {
        let (sink, came) = sink();
        Rank { transport: listener.connect(&group, sink).expect("both are here"), came }
    };
    let (zero, one) = (group(0, &[addresses[0], between]), group(1, &addresses));
    let (zero, one) = (Group { security: security(), ..zero }, Group { security: security(), ..one });
    let zero = thread::spawn(move || connect(zero, first));
    let one = connect(one, second);
    let ranks = [zero.join().expect("no panic"), one];
    ranks[0].transport.send(1, Bytes::from_static(MARKER));
    assert_eq!(ranks[1].next(), Incoming::Message { from: 0, bytes: Bytes::from_static(MARKER) });
    close_all(&ranks);
    let seen = seen.lock().expect("no panic");
    assert!(seen.len() > MARKER.len(), "it went this way");
    seen.windows(MARKER.len()).any(|window| window == MARKER)
}

#[test]
fn nothing_can_be_read_on_the_wire() {
    assert!(!readable(|| keys(SECRET)));
    // The control: without TLS it is found.
    assert!(readable(|| Security::Loopback));
}
