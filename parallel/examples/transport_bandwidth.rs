//! How fast messages go over [`GrpcTransport`](parallel::transport::grpc::GrpcTransport) on loopback, next to a plain
//! TCP stream that carries the same bytes in the same run. Prints one JSON object a message size.
//!
//! `cargo run -p parallel --example transport_bandwidth`. The system's allocator decides much of the result: the binary
//! `tributary` uses one that keeps large blocks. glibc's does with
//! `MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=67108864`.

use std::error::Error;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parallel::transport::grpc::{Group, GrpcTransport, Listener};
use parallel::transport::{Incoming, Sink, Transport};

const RUN_BYTES: usize = 512 << 20;
const RUNS: usize = 5;
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const HANG: Duration = Duration::from_secs(60);

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Outcome<()> {
    let (sender, receiver, came) = pair()?;
    for message_bytes in [256 << 10, 1 << 20] {
        let message = Bytes::from(vec![0x5a_u8; message_bytes]);
        let (mut grpc_s, mut tcp_s, mut ratio) = (Vec::new(), Vec::new(), Vec::new());
        // One round more than is counted: the first one warms windows, buffers and the allocator up.
        for round in 0..=RUNS {
            let tcp = over_tcp(&message)?;
            let grpc = over_grpc(&sender, &came, &message)?;
            if round > 0 {
                tcp_s.push(tcp);
                grpc_s.push(grpc);
                ratio.push(tcp / grpc);
            }
        }
        let gb_per_s = |seconds: &mut Vec<f64>| RUN_BYTES as f64 / 1e9 / median(seconds);
        let (grpc, tcp, ratio) = (gb_per_s(&mut grpc_s), gb_per_s(&mut tcp_s), median(&mut ratio));
        println!(
            r#"{{"message_bytes": {message_bytes}, "grpc_gb_per_s": {grpc:.3}, "tcp_gb_per_s": {tcp:.3}, "ratio": {ratio:.3}}}"#
        );
    }
    thread::scope(|scope| {
        scope.spawn(|| sender.close(HANG));
        receiver.close(HANG);
    });
    Ok(())
}

/// Two ranks, and the lengths of what reaches the second one.
fn pair() -> Outcome<(GrpcTransport, GrpcTransport, mpsc::Receiver<usize>)> {
    let listeners = [Listener::bind(LOOPBACK, 0)?, Listener::bind(LOOPBACK, 0)?];
    let addresses = listeners.iter().map(Listener::local_address).collect::<Vec<_>>();
    let group = |rank| Group {
        rank,
        addresses: addresses.clone(),
        epoch: 1,
        token: "bandwidth".into(),
        connect_within: Duration::from_secs(10),
    };
    let (tell, came) = mpsc::channel();
    let sink: Sink = Arc::new(move |incoming| {
        if let Incoming::Message { bytes, .. } = incoming {
            let _ = tell.send(bytes.len());
        }
    });
    let (of_first, of_second) = (group(0), group(1));
    let [first, second] = listeners;
    let first = thread::spawn(move || first.connect(&of_first, Arc::new(|_| {})));
    let second = second.connect(&of_second, sink)?;
    let first = first.join().map_err(|_| "the first rank panicked")??;
    Ok((first, second, came))
}

fn over_grpc(sender: &GrpcTransport, came: &mpsc::Receiver<usize>, message: &Bytes) -> Outcome<f64> {
    let start = Instant::now();
    for _ in 0..RUN_BYTES / message.len() {
        sender.send(1, message.clone());
    }
    let mut missing = RUN_BYTES;
    while missing > 0 {
        missing -= came.recv_timeout(HANG)?;
    }
    Ok(start.elapsed().as_secs_f64())
}

fn over_tcp(message: &Bytes) -> Outcome<f64> {
    let listener = TcpListener::bind((LOOPBACK, 0))?;
    let mut to = TcpStream::connect(listener.local_addr()?)?;
    to.set_nodelay(true)?;
    let (mut from, _) = listener.accept()?;
    let mut into = vec![0_u8; message.len()];
    let start = Instant::now();
    thread::scope(|scope| {
        let writer = scope.spawn(|| (0..RUN_BYTES / message.len()).try_for_each(|_| to.write_all(message)));
        for _ in 0..RUN_BYTES / message.len() {
            from.read_exact(&mut into)?;
        }
        writer.join().map_err(|_| "the writer panicked")??;
        Ok(start.elapsed().as_secs_f64())
    })
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
