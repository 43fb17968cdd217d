//! How fast messages go over [`GrpcTransport`](parallel::transport::grpc::GrpcTransport) on loopback, plain and with TLS,
//! next to a plain TCP stream that carries the same bytes in the same run. Prints one JSON object a message size, with
//! seconds of processor time a gigabyte, both ends together, where Linux tells them.
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
use parallel::transport::congestion::Congestion;
use parallel::transport::grpc::{Group, GrpcTransport, Listener};
use parallel::transport::tls::{Keys, Security};
use parallel::transport::{Incoming, Sink, Transport};

const RUN_BYTES: usize = 512 << 20;
const RUNS: usize = 7;
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const HANG: Duration = Duration::from_secs(60);

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Outcome<()> {
    let keys = Keys::of(b"a secret of both of these ranks")?;
    let (plain, tls) = (pair(&Security::Loopback)?, pair(&Security::Tls(Arc::new(keys)))?);
    for message_bytes in [256 << 10, 1 << 20] {
        let message = Bytes::from(vec![0x5a_u8; message_bytes]);
        let (mut tcp_s, mut grpc_s, mut tls_s) = (Vec::new(), Vec::new(), Vec::new());
        let (mut ratio, mut tls_ratio) = (Vec::new(), Vec::new());
        let (mut tcp_cpu_s, mut grpc_cpu_s, mut tls_cpu_s) = (0.0, 0.0, 0.0);
        // One round more than is counted: the first one warms windows, buffers and the allocator up.
        for round in 0..=RUNS {
            let (tcp, tcp_cpu) = timed(|| over_tcp(&message))?;
            let (grpc, grpc_cpu) = timed(|| over_grpc(&plain, &message))?;
            let (encrypted, tls_cpu) = timed(|| over_grpc(&tls, &message))?;
            if round > 0 {
                tcp_s.push(tcp);
                grpc_s.push(grpc);
                tls_s.push(encrypted);
                ratio.push(tcp / grpc);
                tls_ratio.push(tcp / encrypted);
                tcp_cpu_s += tcp_cpu;
                grpc_cpu_s += grpc_cpu;
                tls_cpu_s += tls_cpu;
            }
        }
        let gb_per_s = |seconds: &mut Vec<f64>| RUN_BYTES as f64 / 1e9 / median(seconds);
        let (tcp, grpc, tls) = (gb_per_s(&mut tcp_s), gb_per_s(&mut grpc_s), gb_per_s(&mut tls_s));
        let (ratio, tls_ratio) = (median(&mut ratio), median(&mut tls_ratio));
        let a_gigabyte = |cpu_s: f64| cpu_s * 1e9 / (RUNS * RUN_BYTES) as f64;
        let [tcp_cpu, grpc_cpu, tls_cpu] = [tcp_cpu_s, grpc_cpu_s, tls_cpu_s].map(a_gigabyte);
        println!(
            r#"{{"message_bytes": {message_bytes}, "tcp_gb_per_s": {tcp:.3}, "grpc_gb_per_s": {grpc:.3}, "ratio": {ratio:.3}, "tls_gb_per_s": {tls:.3}, "tls_ratio": {tls_ratio:.3}, "tcp_cpu_s_per_gb": {tcp_cpu:.3}, "grpc_cpu_s_per_gb": {grpc_cpu:.3}, "tls_cpu_s_per_gb": {tls_cpu:.3}}}"#
        );
    }
    for pair in [plain, tls] {
        thread::scope(|scope| {
            scope.spawn(|| pair.sender.close(HANG));
            pair.receiver.close(HANG);
        });
    }
    Ok(())
}

/// Two ranks, and the lengths of what reaches the second one.
struct Pair {
    sender: GrpcTransport,
    receiver: GrpcTransport,
    came: mpsc::Receiver<usize>,
}

fn pair(security: &Security) -> Outcome<Pair> {
    let listeners = [Listener::bind(LOOPBACK, 0)?, Listener::bind(LOOPBACK, 0)?];
    let addresses = listeners.iter().map(Listener::local_address).collect::<Vec<_>>();
    let group = |rank| Group {
        rank,
        addresses: addresses.clone(),
        epoch: 1,
        token: "bandwidth".into(),
        connect_within: Duration::from_secs(10),
        security: security.clone(),
        congestion: Congestion::default(),
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
    Ok(Pair { sender: first, receiver: second, came })
}

fn over_grpc(Pair { sender, came, .. }: &Pair, message: &Bytes) -> Outcome<f64> {
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

/// What it returns, and the processor time that it took in all threads of this process.
fn timed(act: impl FnOnce() -> Outcome<f64>) -> Outcome<(f64, f64)> {
    let before = processor_s();
    let seconds = act()?;
    Ok((seconds, processor_s() - before))
}

/// Seconds of processor time of this process so far, to a hundredth; nothing where there is no such file.
fn processor_s() -> f64 {
    const TICKS_PER_S: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name may have spaces; user and system time are the 12th and 13th field behind it.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / TICKS_PER_S
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
