//! `tributary bench aggregate`: the sum of gradients over ranks, without a model that computes them.
//!
//! Two ranks in one process on loopback, or one rank of several on as many hosts. Every round of a codec is followed by a
//! plain copy of as many bytes over TCP, from every rank to the next one at the same time, so that both meet the same
//! network; what counts is the median of each over the rounds.
//!
//! - `watch`: ends it when nothing moves any more.

mod watch;

use std::hint::black_box;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use compression::{BLOCK, Codec};
use parallel::data::engine::{Engine, Inbox};
use parallel::data::exchange::{self, Exchange};
use parallel::data::rules::codec_of;
use parallel::data::shard::payload_bytes;
use parallel::data::{Gradient, GradientStream, Parameter, Plan, StreamError};
use parallel::note::Ballot;
use parallel::progress::Progress;
use parallel::transport::Transport as _;
use parallel::transport::congestion::Congestion;
use parallel::transport::grpc::{Group, Listener};
use parallel::transport::tls::Security;
use serde_json::json;

use super::at_least_one;
use crate::error::{Error, Result};
use crate::run::join::permit;
use crate::run::trace::Tracing;
use crate::step::piece_elements;
use watch::Watch;

/// Elements of a tensor, and so of a bucket; the last one may be smaller.
const TENSOR: usize = 1 << 20;
const CONNECT_WITHIN: Duration = Duration::from_secs(60);
/// A plain copy on which nothing moves for so long has failed.
const STILL: Duration = Duration::from_secs(60);

/// What is measured.
#[derive(Debug, Args)]
pub struct Options {
    /// Codecs; all unless given
    #[arg(long, value_delimiter = ',')]
    codec: Vec<String>,
    /// Elements
    #[arg(long, value_delimiter = ',', value_parser = super::elements, default_values_t = [1 << 20, 1 << 24])]
    elements: Vec<usize>,
    /// Rounds whose median counts
    #[arg(long, value_parser = at_least_one, default_value_t = 7)]
    rounds: usize,
    /// Which of the ranks of --addresses this is; two ranks in this process unless given
    #[arg(long, requires = "addresses")]
    rank: Option<usize>,
    /// Where each rank listens, IP:PORT, the port after it too
    #[arg(long, value_delimiter = ',', requires = "rank")]
    addresses: Vec<SocketAddr>,
    /// What a link carries in a second, in bits, headers of packets included
    #[arg(long, value_parser = rate)]
    line_bits_per_s: Option<f64>,
    /// Ranks of a machine, a divisor of the ranks
    #[arg(long, value_parser = at_least_one, default_value_t = 1)]
    group: usize,
    /// Elements of a frame, a multiple of 128
    #[arg(long, value_parser = chunk, default_value_t = 1 << 18)]
    chunk_elements: usize,
    /// Frames under way to one rank
    #[arg(long, value_parser = at_least_one, default_value_t = 16)]
    window_chunks: usize,
    /// TCP's congestion control, for the plain copy too: one that the machine has, or `system`; cubic unless given, if it is there
    #[arg(long)]
    congestion_control: Option<String>,
    /// Let ranks connect beyond loopback, neither encrypted nor authenticated
    #[arg(long)]
    pub trusted_network: bool,
    /// A folder for a picture of what every rank does when, trace.json, which Perfetto opens; takes time of what is measured
    #[arg(long)]
    trace: Option<PathBuf>,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

/// Votes, and reads every sum once, piece by piece as it comes and as the optimiser does.
fn take(stream: &GradientStream, ballot: Ballot) -> std::result::Result<(), StreamError> {
    stream.vote(ballot)?;
    let at_once = piece_elements();
    for (index, parameter) in stream.plan().parameters().iter().enumerate() {
        for start in (0..parameter.elements()).step_by(at_once) {
            let part = start..(start + at_once).min(parameter.elements());
            stream.with_sum(index, part, |piece| _ = black_box(piece))?;
        }
    }
    stream.settle().map(drop)
}

fn rate(text: &str) -> std::result::Result<f64, String> {
    let rate = text.parse().ok().filter(|rate: &f64| rate.is_finite() && *rate > 0.0);
    rate.ok_or_else(|| "expected a number above 0, such as 200e6".into())
}

fn chunk(text: &str) -> std::result::Result<usize, String> {
    let chunk = text.parse().ok().filter(|&chunk: &usize| chunk.is_multiple_of(BLOCK));
    let chunk = chunk.filter(|chunk| (1..=exchange::CHUNK_BLOCKS_MAX).contains(&(chunk / BLOCK)));
    chunk.ok_or_else(|| format!("expected a multiple of {BLOCK} up to {}", exchange::CHUNK_BLOCKS_MAX * BLOCK))
}

/// Times the sum with every codec, and the copies.
///
/// # Errors
/// A codec that does not exist, addresses that cannot be used, a rank that is lost.
pub fn aggregate(options: &Options, security: &Security) -> Result<()> {
    let codecs = super::codecs(&options.codec)?;
    let ranks = if options.rank.is_some() { options.addresses.len() } else { 2 };
    if !ranks.is_multiple_of(options.group) {
        return Err(Error::Usage(format!("--group {}: expected a divisor of the {ranks} ranks", options.group)));
    }
    if options.group > 1 && options.line_bits_per_s.is_some() {
        return Err(Error::Usage(
            "--line-bits-per-s: with --group not all bytes pass a line; leave one of them out".into(),
        ));
    }
    let congestion = Congestion::chosen(options.congestion_control.as_deref())
        .map_err(|error| Error::Usage(format!("--congestion-control: {error}")))?;
    let place = |rank, addresses: &[[SocketAddr; 2]]| Place {
        rank,
        addresses: addresses.to_vec(),
        security: security.clone(),
        congestion: congestion.clone(),
    };
    match options.rank {
        None => {
            // The system chooses.
            let bind = || Ports::bind([SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0); 2]);
            for &elements in &options.elements {
                let ports = [bind()?, bind()?];
                let addresses = ports.each_ref().map(Ports::addresses);
                std::thread::scope(|scope| {
                    let each = ports.into_iter().enumerate().map(|(rank, ports)| {
                        let place = place(rank, &addresses);
                        let codecs = &codecs;
                        scope.spawn(move || place.run(ports, elements, codecs, options))
                    });
                    let each: Vec<_> = each.collect();
                    each.into_iter().try_for_each(|rank| rank.join().expect("a rank does not panic"))
                })?;
            }
            Ok(())
        }
        Some(rank) if rank < ranks && ranks > 1 => {
            for address in &options.addresses {
                permit(address.ip(), security)?;
            }
            let both = |address: &SocketAddr| match (address.port(), address.port().checked_add(1)) {
                (1.., Some(next)) => Ok([*address, SocketAddr::new(address.ip(), next)]),
                _ => Err(Error::Usage(format!("--addresses: {address}: expected a port from 1 to 65534"))),
            };
            let addresses = options.addresses.iter().map(both).collect::<Result<Vec<_>>>()?;
            for &elements in &options.elements {
                place(rank, &addresses).run(Ports::bind(addresses[rank])?, elements, &codecs, options)?;
            }
            Ok(())
        }
        Some(rank) => Err(Error::Usage(format!(
            "--rank {rank}: expected one of {ranks} addresses, of which there are two or more"
        ))),
    }
}

/// Where a rank is called: for gradients, and for the plain copy.
struct Ports(Listener, TcpListener);

impl Ports {
    fn bind([at, plain]: [SocketAddr; 2]) -> Result<Self> {
        let bind = || {
            let listener = TcpListener::bind(plain)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let bound = bind().map_err(Error::io("listen at", plain.to_string()))?;
        Ok(Self(Listener::bind(at.ip(), at.port())?, bound))
    }

    fn addresses(&self) -> [SocketAddr; 2] {
        let plain = self.1.local_addr().map_or(0, |address| address.port());
        [self.0.local_address(), SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), plain)]
    }
}

/// One rank.
struct Place {
    rank: usize,
    addresses: Vec<[SocketAddr; 2]>,
    security: Security,
    congestion: Congestion,
}

impl Place {
    fn run(self, ports: Ports, elements: usize, codecs: &[Codec], options: &Options) -> Result<()> {
        let (rank, ranks) = (self.rank, self.addresses.len());
        let Ports(listener, plain) = ports;
        let shape = |start: usize| vec![TENSOR.min(elements - start).div_ceil(256), 256];
        let tensor = |start| Parameter { name: format!("tensor-{}", start / TENSOR), shape: shape(start) };
        let plan = Plan::new((0..elements).step_by(TENSOR).map(tensor).collect(), 4 * TENSOR);
        let plan = Arc::new(plan.map_err(|error| Error::Usage(format!("--elements {elements}: {error}")))?);
        let begin = |folder| Tracing::begin(folder, rank, plan.clone(), 0, u64::MAX);
        let mut tracing = options.trace.as_deref().map(begin).transpose()?;
        let trace = tracing.as_ref().map(Tracing::trace).cloned();
        let inbox = Inbox::new(trace.clone());
        let progress = Arc::<Progress>::default();
        let watch = Watch::begin(progress.clone(), inbox.aborter()).map_err(Error::io("start", "a thread"))?;
        let group = Group {
            rank,
            addresses: self.addresses.iter().map(|[address, _]| *address).collect(),
            epoch: 1,
            token: "bench aggregate".into(),
            connect_within: CONNECT_WITHIN,
            security: self.security.clone(),
            congestion: self.congestion.clone(),
        };
        let transport = Arc::new(listener.traced(trace).connect(&group, inbox.sink())?);
        let Options { group: members, chunk_elements, window_chunks: window, .. } = *options;
        let group = exchange::Group { rank, ranks, members, epoch: 1, chunk_blocks: chunk_elements / BLOCK, window };
        let exchange = Exchange::new(plan.clone(), group, Codec::Fp32);
        let engine = Engine::start(exchange, transport.clone(), inbox, progress);
        let stream = GradientStream::across(engine.map_err(Error::io("start", "a thread"))?);
        // To the next machine, if there are several.
        let distance = if group.nodes().count() > 1 { members } else { 1 };
        let wire = Copies::connect(&plain, self.addresses[(rank + distance) % ranks][1], &self.congestion)?;
        let gradient: Vec<f32> = (0..TENSOR).map(|i| ((i * 31 + rank * 7) as f32 * 0.1).sin() * 1e-2).collect();

        let mut step = 0;
        for &codec in codecs {
            stream.engine().expect("several ranks").exchange().set_codec(codec);
            let (mut sums, mut copies, mut sent) = (Vec::new(), Vec::new(), 0);
            // The first round warms buffers and connections up.
            for round in 0..=options.rounds {
                step += 1;
                let (before, start) = (stream.counted(), Instant::now());
                let sum_s = together(&stream, || {
                    stream.begin(step, 1);
                    let start = Instant::now();
                    for (index, parameter) in plan.parameters().iter().enumerate().rev() {
                        stream.add(index, Gradient::Host(&gradient[..parameter.elements()]));
                    }
                    if let Some(tracing) = &tracing {
                        tracing.span("give", start, step);
                    }
                    let ballot = Ballot {
                        finite: true,
                        stop: false,
                        busy: false,
                        loss: 0.0,
                        compute_s: 0.0,
                        parameters: None,
                        codec: None,
                    };
                    take(&stream, ballot).map_err(Error::from)
                })?;
                if let Some(tracing) = &tracing {
                    tracing.span("sum", start, step);
                }
                let bytes = stream.counted().sent - before.sent;
                // Ranks send some bytes more or less than each other; the copies must agree.
                let most = largest(&stream, bytes as f64)? as u64;
                let copy_s = together(&stream, || watch.pausing(|| wire.copy(most)))?;
                if round > 0 {
                    sums.push(sum_s);
                    copies.push(copy_s);
                    sent = bytes;
                }
            }
            if rank == 0 {
                let travel: Vec<_> = plan
                    .parameters()
                    .iter()
                    .map(|parameter| (parameter.elements(), codec_of(parameter, codec)))
                    .collect();
                let sent_by_formula = payload_bytes(&travel, group.nodes());
                let formula = sent_by_formula.inside + sent_by_formula.across;
                report(
                    options,
                    codec,
                    [plan.elements(), ranks, formula],
                    sent,
                    [median(&mut sums), median(&mut copies)],
                    &self,
                )?;
            }
        }
        transport.close(CONNECT_WITHIN);
        tracing.as_mut().map_or(Ok(()), Tracing::end)
    }
}

/// How long the slowest rank takes for something that all begin together.
fn together(stream: &GradientStream, act: impl FnOnce() -> Result<()>) -> Result<f64> {
    largest(stream, 0.0)?;
    let start = Instant::now();
    act()?;
    largest(stream, start.elapsed().as_secs_f64())
}

/// The largest of all ranks' numbers, once all have given theirs.
fn largest(stream: &GradientStream, own: f64) -> Result<f64> {
    let all = stream.engine().expect("several ranks").gather(vec![own]).map_err(StreamError::from)?;
    Ok(all.iter().flatten().copied().fold(0.0, f64::max))
}

/// A plain connection to the next rank and one from the rank before.
struct Copies(TcpStream, TcpStream);

impl Copies {
    fn connect(listener: &TcpListener, next: SocketAddr, congestion: &Congestion) -> Result<Self> {
        let failed = |error| Error::io("connect to", next.to_string())(error);
        let to = TcpStream::connect(next).map_err(failed)?;
        let until = Instant::now() + CONNECT_WITHIN;
        let from = loop {
            match listener.accept() {
                Ok((from, _)) => break from,
                Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(Error::io("accept a connection at", "the port of plain copies")(error)),
            }
        };
        from.set_nonblocking(false).map_err(failed)?;
        to.set_nodelay(true).map_err(failed)?;
        congestion.set(&to).map_err(failed)?;
        // The others have gone, or the network has: no copy waits for ever.
        from.set_read_timeout(Some(STILL)).map_err(failed)?;
        to.set_write_timeout(Some(STILL)).map_err(failed)?;
        Ok(Self(to, from))
    }

    /// Sends so many bytes, and receives as many.
    fn copy(&self, bytes: u64) -> Result<()> {
        const PIECE: usize = 256 << 10;
        let pieces = || (0..bytes).step_by(PIECE).map(|start| PIECE.min((bytes - start) as usize));
        let (mut to, mut from) = (&self.0, &self.1);
        std::thread::scope(|scope| {
            let sends = scope.spawn(move || {
                let out = vec![0x5a; PIECE];
                pieces().try_for_each(|count| to.write_all(&out[..count]))
            });
            let mut into = vec![0; PIECE];
            let received = pieces().try_for_each(|count| from.read_exact(&mut into[..count]));
            sends.join().expect("a write does not panic").and(received)
        })
        .map_err(Error::io("copy over", "a plain connection"))
    }
}

fn report(
    options: &Options,
    codec: Codec,
    [elements, ranks, formula]: [usize; 3],
    sent: u64,
    [sum_s, copy_s]: [f64; 2],
    place: &Place,
) -> Result<()> {
    let line_ratio = options.line_bits_per_s.map(|rate| sent as f64 * 8.0 / rate / sum_s);
    let (of_formula, of_copy) = (sent as f64 / formula as f64, copy_s / sum_s);
    let line = if options.json {
        json!({
            "codec": codec.name(), "world": ranks, "elements": elements, "rounds": options.rounds,
            "tls": matches!(place.security, Security::Tls(_)), "congestion_control": place.congestion.name(), "median_s": sum_s, "line_rate_ratio": line_ratio,
            "bytes_sent": sent, "bytes_formula": formula, "bytes_ratio": of_formula, "tcp_copy_s": copy_s,
            "tcp_copy_ratio": of_copy,
        })
        .to_string()
    } else {
        let line = line_ratio.map_or_else(String::new, |ratio| format!(", {ratio:.3} of the line rate"));
        format!(
            "{:<14} {elements:>10} elements: {:>8.2} ms, {sent:>10} bytes sent ({of_formula:.4} of the formula), {of_copy:.2} of a TCP copy's rate{line}",
            codec.name(),
            sum_s * 1e3,
        )
    };
    writeln!(std::io::stdout(), "{line}").map_err(Error::io("write", "standard output"))
}

fn median(seconds: &mut [f64]) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}
