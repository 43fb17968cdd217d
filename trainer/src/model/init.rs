//! Initial weights: a pure function of (seed, logical name, element), so that every mesh starts from the same numbers,
//! on every machine. Philox in counter mode, and the normal distribution by Box and Muller with `libm`'s functions, which have the same bits everywhere.

use parallel::data::Part;
use rayon::prelude::*;

use crate::rng::philox;

/// Independent elements that one turn of the generator makes.
const LANES: usize = 4;
/// Elements a thread takes at a time; a multiple of [`LANES`].
const CHUNK: usize = 1 << 14;

/// Normally distributed numbers of mean 0 for the elements of one parameter, written to `out`.
pub fn normal(seed: u64, name: &str, deviation: f64, out: &mut [f32]) {
    let key = key(seed, name);
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, out)| draw(key, deviation, chunk * CHUNK, out));
}

/// The same of a part of a parameter: the numbers that its elements have in the whole.
#[must_use]
pub fn normal_part(seed: u64, part: &Part, deviation: f64) -> Vec<f32> {
    let (key, mut out) = (key(seed, &part.whole.name), vec![0.0; part.region.len()]);
    let mut rest = &mut out[..];
    let mut runs = Vec::new();
    for run in part.region.runs(&part.whole.shape) {
        let (these, others) = rest.split_at_mut(run.len());
        runs.push((run.start, these));
        rest = others;
    }
    runs.into_par_iter().for_each(|(start, out)| draw(key, deviation, start, out));
    out
}

/// The numbers of the elements from `start` on.
fn draw(key: [u32; 2], deviation: f64, start: usize, out: &mut [f32]) {
    let mut at = start;
    let mut rest = out;
    while !rest.is_empty() {
        let (turn, lane) = (at / LANES, at % LANES);
        let words = philox(turn as u64, key);
        let values = [box_muller(words[0], words[1]), box_muller(words[2], words[3])];
        let count = (LANES - lane).min(rest.len());
        let (these, others) = rest.split_at_mut(count);
        for (out, value) in these.iter_mut().zip(values.into_iter().flatten().skip(lane)) {
            *out = (value * deviation) as f32;
        }
        (at, rest) = (at + count, others);
    }
}

fn key(seed: u64, name: &str) -> [u32; 2] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(name.as_bytes());
    let hash = hasher.finalize();
    let word = |at: usize| {
        let bytes = hash.as_bytes();
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    };
    [word(0), word(4)]
}

/// Two independent normal numbers from two words.
fn box_muller(a: u32, b: u32) -> [f64; 2] {
    // (0, 1], so that the logarithm is finite.
    let unit = (f64::from(a) + 1.0) / 4_294_967_296.0;
    let angle = std::f64::consts::TAU * (f64::from(b) / 4_294_967_296.0);
    let radius = libm::sqrt(-2.0 * libm::log(unit));
    [radius * libm::cos(angle), radius * libm::sin(angle)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_does_not_depend_on_the_size_of_its_tensor_and_names_do_not_share_numbers() {
        let draw = |name: &str, n: usize| {
            let mut out = vec![0.0; n];
            normal(7, name, 0.02, &mut out);
            out
        };
        assert_eq!(draw("a", 50_000)[..333], draw("a", 333)[..]);
        assert_ne!(draw("a", 8), draw("b", 8));
    }

    #[test]
    fn a_part_has_the_numbers_of_the_whole() {
        let parameter = parallel::data::Parameter { name: "w".into(), shape: vec![7, 9] };
        let mut whole = vec![0.0; 63];
        normal(7, "w", 0.02, &mut whole);
        for (dim, range) in [(0, 2..5), (1, 3..8), (1, 0..9), (0, 1..1)] {
            let part = Part::slice(parameter.clone(), dim, range).expect("inside");
            assert_eq!(normal_part(7, &part, 0.02), part.take(&whole));
        }
    }

    #[test]
    fn the_numbers_are_normal() {
        let mut out = vec![0.0; 1 << 20];
        normal(1, "w", 2.0, &mut out);
        let moment = |power: i32| out.iter().map(|&x| (f64::from(x) / 2.0).powi(power)).sum::<f64>() / out.len() as f64;
        // Four standard errors of each moment at a million draws.
        assert!(moment(1).abs() < 0.004 && (moment(2) - 1.0).abs() < 0.006 && (moment(4) - 3.0).abs() < 0.04);
    }
}
