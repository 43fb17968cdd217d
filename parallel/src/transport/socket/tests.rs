use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use tokio_stream::StreamExt;

use super::*;

/// Only a guard: nothing here takes so long unless it hangs.
const HANG: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_millis(150);

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async { timeout(HANG, test).await.expect("no hang") });
}

async fn listen(connections_max: usize, admitted_within: Duration) -> (Accepted, SocketAddr, Counters) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let counters = Counters::default();
    let limits = Limits { connections_max, admitted_within, unadmitted_bytes_max: 1 << 20 };
    (Accepted::new(listener, limits, counters.clone(), Security::Loopback), address, counters)
}

async fn next(accepted: &mut Accepted) -> Connection {
    accepted.next().await.expect("it never ends").expect("a connection")
}

#[test]
fn bytes_are_counted_both_ways_and_the_end_is_put_in_words() {
    run(async {
        let (mut accepted, address, server) = listen(1, HANG).await;
        let (client, line) = (Counters::default(), Arc::<Line>::default());
        let mut there =
            Socket::connect(address, client.clone(), line.clone(), &Congestion::default()).await.expect("it listens");
        let mut here = next(&mut accepted).await;
        there.write_all(&[1; 1000]).await.expect("room");
        let slices = [io::IoSlice::new(&[2; 30]), io::IoSlice::new(&[3; 4])];
        assert_eq!(there.write_vectored(&slices).await.expect("room"), 34);
        here.read_exact(&mut [0; 1034]).await.expect("it was sent");
        here.write_all(&[4; 5]).await.expect("room");
        there.read_exact(&mut [0; 5]).await.expect("it was sent");
        assert_eq!(client.counted(), Counted { sent: 1034, received: 5 });
        assert_eq!(server.counted(), Counted { sent: 5, received: 1034 });
        assert_eq!(line.ended(), None);
        drop(here);
        assert_eq!(there.read(&mut [0; 1]).await.expect("an end"), 0);
        assert_eq!(line.ended(), Some("connection closed"));
    });
}

#[test]
fn who_sends_much_before_a_service_lets_it_in_is_sent_away_and_whom_it_lets_in_is_not() {
    run(async {
        for admitted in [false, true] {
            let (mut accepted, address, _) = listen(1, HANG).await;
            let mut there = TcpStream::connect(address).await.expect("it listens");
            let mut here = next(&mut accepted).await;
            if admitted {
                here.connect_info().line.admit();
            }
            let sends = tokio::spawn(async move {
                // It may be sent away in the midst of it.
                let _ = there.write_all(&vec![0; 2 << 20]).await;
                there
            });
            let mut read = 0;
            let end = loop {
                match here.read(&mut [0; 1 << 16]).await {
                    Ok(count) if read + count < 2 << 20 => read += count,
                    other => break other,
                }
            };
            assert_eq!(end.is_ok(), admitted, "{end:?} after {read} bytes");
            assert!(admitted || read <= (1 << 20) + (1 << 16), "{read}");
            drop(here);
            sends.await.expect("no panic");
        }
    });
}

#[test]
fn a_connection_that_no_service_lets_in_ends_whether_it_is_read_or_written() {
    run(async {
        for write in [false, true] {
            let (mut accepted, address, _) = listen(1, SOON).await;
            let there = TcpStream::connect(address).await.expect("it listens");
            let mut here = next(&mut accepted).await;
            let error = match write {
                false => here.read(&mut [0; 1]).await.map(drop),
                // The other side takes nothing, so this waits once the buffers are full.
                true => here.write_all(&vec![0; 64 << 20]).await,
            };
            assert_eq!(error.expect_err("out of time").kind(), io::ErrorKind::TimedOut);
            assert_eq!(here.connect_info().line.ended(), Some("no service let it in"));
            drop(there);
        }
    });
}

#[test]
fn a_connection_that_a_service_lets_in_stays() {
    run(async {
        let (mut accepted, address, _) = listen(1, SOON).await;
        let mut there = TcpStream::connect(address).await.expect("it listens");
        let mut here = next(&mut accepted).await;
        here.connect_info().line.admit();
        assert!(timeout(2 * SOON, here.read(&mut [0; 1])).await.is_err(), "it waits on");
        there.write_all(b"x").await.expect("room");
        assert_eq!(here.read(&mut [0; 1]).await.expect("it was sent"), 1);
    });
}

#[test]
fn connections_above_the_limit_are_closed_until_a_place_is_free() {
    run(async {
        let (mut accepted, address, _) = listen(2, HANG).await;
        let mut there = Vec::new();
        for _ in 0..3 {
            there.push(TcpStream::connect(address).await.expect("the system's queue"));
        }
        let first = next(&mut accepted).await;
        let _second = next(&mut accepted).await;
        let mut into = [0; 1];
        tokio::select! {
            _ = accepted.next() => panic!("there is no third place"),
            end = there[2].read(&mut into) => assert_eq!(end.expect("closed in order"), 0),
        }
        drop(first);
        let _fourth = TcpStream::connect(address).await.expect("the system's queue");
        next(&mut accepted).await;
    });
}
