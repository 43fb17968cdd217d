//! `tributary bench codec`: the kernels of the codecs, against copies of the same elements in the same run.
//!
//! Every round times each copy and each kernel once, one after the other, so that whatever else the machine does meets
//! all of them alike; what counts is the median of each over the rounds.

use std::io::Write as _;
use std::time::Instant;

use clap::Args;
use compression::codec::{par_reduce, reduce};
use compression::kernel::copy;
use compression::{Codec, Found, Level, Part, Payload};
use rayon::ThreadPool;
use serde_json::json;

use super::at_least_one;
use crate::error::{Error, Result};

/// From what stays in a core's second cache to 1 GiB of f32.
const ELEMENTS: [usize; 5] = [1 << 16, 1 << 20, 1 << 24, 1 << 26, 1 << 28];
/// Ranks whose payloads an owner adds in `reduce`.
const RANKS: usize = 4;

/// What is measured.
#[derive(Debug, Args)]
pub struct Options {
    /// Codecs; all unless given
    #[arg(long, value_delimiter = ',')]
    codec: Vec<String>,
    /// Elements; from 64 Ki (256 KiB of f32) to 256 Mi (1 GiB) unless given
    #[arg(long, value_delimiter = ',', value_parser = super::elements)]
    elements: Vec<usize>,
    /// Threads; one, and one a core, unless given
    #[arg(long, value_delimiter = ',', value_parser = at_least_one)]
    threads: Vec<usize>,
    /// Rounds whose median counts; more for small sizes unless given
    #[arg(long, value_parser = at_least_one)]
    rounds: Option<usize>,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

/// What was measured of one kernel.
struct Line {
    kernel: &'static str,
    codec: Option<Codec>,
    median_s: f64,
}

/// Times every kernel of every codec.
///
/// # Errors
/// A codec that does not exist, or threads that cannot be started.
pub fn codec(options: &Options) -> Result<()> {
    let codecs = super::codecs(&options.codec)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let given = |list: &[usize], default: Vec<usize>| if list.is_empty() { default } else { list.to_vec() };
    let threads = given(&options.threads, if cores > 1 { vec![1, cores] } else { vec![1] });
    if !options.json {
        print(&format!(
            "{}; GB/s of f32, and seconds over those of a copy past the caches (copy) and of memcpy\n",
            Level::best()
        ))?;
    }
    for elements in given(&options.elements, ELEMENTS.to_vec()) {
        let mut memory = Memory::new(elements);
        for &threads in &threads {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let pool =
                pool.map_err(|error| Error::Usage(format!("--threads: {threads} cannot be started: {error}")))?;
            let rounds = options.rounds.unwrap_or(((1 << 28) / elements).clamp(5, 401));
            let lines = measure(&mut memory, &codecs, (threads > 1).then_some(&pool), rounds);
            report(options.json, elements, threads, &lines)?;
        }
    }
    Ok(())
}

/// What kernels work on. Everything begins on a multiple of 64 bytes, as what is written past the caches must.
struct Memory {
    values: Aligned,
    residual: Aligned,
    other: Aligned,
    payload: Aligned,
}

struct Aligned {
    floats: Vec<f32>,
    start: usize,
}

impl Aligned {
    fn new(elements: usize) -> Self {
        let floats = vec![0.0; elements + 16];
        let start = floats.as_ptr().align_offset(64).min(16);
        Self { floats, start }
    }

    fn floats(&mut self) -> &mut [f32] {
        let end = self.floats.len() - 16 + self.start;
        &mut self.floats[self.start..end]
    }

    fn bytes(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(self.floats())
    }
}

impl Memory {
    fn new(elements: usize) -> Self {
        let [mut values, mut residual, mut other, mut payload] = [(); 4].map(|()| Aligned::new(elements));
        let mut x = 0x9E37_79B9u32;
        // Like a gradient: most values small, some large.
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            let unit = x as f32 / 2_147_483_648.0 - 1.0;
            unit * unit * unit * 1e-3
        };
        values.floats().iter_mut().chain(residual.floats()).for_each(|value| *value = next());
        // Written once, so that no page is met for the first time while it is timed.
        other.floats().iter_mut().chain(payload.floats()).for_each(|value| *value = 1.0);
        Self { values, residual, other, payload }
    }
}

/// Medians over the rounds. `pool` is there for more than one thread.
fn measure(memory: &mut Memory, codecs: &[Codec], pool: Option<&ThreadPool>, rounds: usize) -> Vec<Line> {
    let mut seconds: Vec<(&'static str, Option<Codec>, Vec<f64>)> = Vec::new();
    for round in 0..=rounds {
        let mut next = 0;
        let mut note = |kernel, codec, time: f64| {
            // The first round only warms up.
            match seconds.get_mut(next) {
                None => seconds.push((kernel, codec, Vec::with_capacity(rounds))),
                Some((.., times)) if round > 0 => times.push(time),
                Some(_) => {}
            }
            next += 1;
        };
        copies(memory, pool, &mut note);
        codecs.iter().for_each(|&codec| kernels(memory, codec, pool, &mut note));
    }
    let line = |(kernel, codec, mut times): (_, _, Vec<f64>)| {
        times.sort_by(f64::total_cmp);
        Line { kernel, codec, median_s: times[times.len() / 2] }
    };
    seconds.into_iter().map(line).collect()
}

fn copies(memory: &mut Memory, pool: Option<&ThreadPool>, note: &mut impl FnMut(&'static str, Option<Codec>, f64)) {
    let Memory { residual, other, .. } = memory;
    let (from, to, level) = (residual.floats(), other.floats(), Level::best());
    let time = match pool {
        None => timed(|| copy::stream(level, from, to)),
        Some(pool) => timed(|| pool.install(|| copy::par_stream(level, from, to))),
    };
    note("copy", None, time);
    let time = match pool {
        None => timed(|| to.copy_from_slice(from)),
        Some(pool) => timed(|| pool.install(|| copy::par_cached(from, to))),
    };
    note("memcpy", None, time);
}

fn kernels(
    memory: &mut Memory,
    codec: Codec,
    pool: Option<&ThreadPool>,
    note: &mut impl FnMut(&'static str, Option<Codec>, f64),
) {
    let Memory { values, residual, other, payload } = memory;
    let (values, residual, other) = (values.floats(), &*residual.floats(), other.floats());
    let bytes = &mut payload.bytes()[..codec.payload_bytes(values.len())];
    let mut found = Found::Finite;
    let time = match pool {
        None => timed(|| found = codec.encode(values, residual, bytes)),
        Some(pool) => timed(|| pool.install(|| found = codec.par_encode(values, residual, bytes))),
    };
    assert_eq!(found, Found::Finite, "the values are finite");
    note("encode", Some(codec), time);
    let mut checked = None;
    let time = timed(|| checked = Payload::new(codec, values.len(), &*bytes).ok());
    // Always by one thread.
    if pool.is_none() {
        note("check", Some(codec), time);
    }
    let checked = checked.expect("our own payload");
    let time = match pool {
        None => timed(|| checked.decode(other)),
        Some(pool) => timed(|| pool.install(|| checked.par_decode(other))),
    };
    note("decode", Some(codec), time);
    let time = match pool {
        None => timed(|| checked.decode_add(other)),
        Some(pool) => timed(|| pool.install(|| checked.par_decode_add(other))),
    };
    note("decode_add", Some(codec), time);
    let parts: [Part<'_, &[u8]>; RANKS] = std::array::from_fn(|_| Part::Encoded(&checked));
    let time = match pool {
        None => timed(|| reduce(&parts, other)),
        Some(pool) => timed(|| pool.install(|| par_reduce(&parts, other))),
    };
    note("reduce", Some(codec), time);
}

fn timed(run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}

fn report(as_json: bool, elements: usize, threads: usize, lines: &[Line]) -> Result<()> {
    let of = |kernel| lines.iter().find(|line| line.kernel == kernel).map_or(f64::NAN, |line| line.median_s);
    let (copy_s, memcpy_s) = (of("copy"), of("memcpy"));
    for &Line { kernel, codec, median_s } in lines {
        let gb_per_s = (4 * elements) as f64 / median_s / 1e9;
        let (copy_ratio, memcpy_ratio) = (median_s / copy_s, median_s / memcpy_s);
        let line = if as_json {
            json!({
                "kernel": kernel, "codec": codec.map(Codec::name), "level": Level::best().name(), "threads": threads,
                "elements": elements, "median_s": median_s, "gb_per_s": gb_per_s, "copy_ratio": copy_ratio,
                "memcpy_ratio": memcpy_ratio,
            })
            .to_string()
        } else {
            let name = codec.map_or("", Codec::name);
            format!(
                "{elements:>10} elements {threads:>2} threads {kernel:<11}{name:<15}{gb_per_s:>7.1} GB/s \
                 {copy_ratio:>6.2} x copy {memcpy_ratio:>6.2} x memcpy"
            )
        };
        print(&(line + "\n"))?;
    }
    Ok(())
}

fn print(text: &str) -> Result<()> {
    std::io::stdout().write_all(text.as_bytes()).map_err(Error::io("write", "standard output"))
}
