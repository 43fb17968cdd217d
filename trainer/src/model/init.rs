//! Initial weights: a pure function of (seed, logical name, element), so that every mesh starts from the same numbers,
//! on every machine. Philox in counter mode, and the normal distribution by Box and Muller with `libm`'s functions, which have the same bits everywhere.

use rayon::prelude::*;

use crate::rng::philox;

/// Independent elements that one turn of the generator makes.
const LANES: usize = 4;
/// Elements a thread takes at a time; a multiple of [`LANES`].
const CHUNK: usize = 1 << 14;

/// Normally distributed numbers of mean 0 for the elements of one parameter, written to `out`.
pub fn normal(seed: u64, name: &str, deviation: f64, out: &mut [f32]) {
    let key = key(seed, name);
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, out)| {
        for (turn, out) in out.chunks_mut(LANES).enumerate() {
            let counter = (chunk * (CHUNK / LANES) + turn) as u64;
            let words = philox(counter, key);
            let values = [box_muller(words[0], words[1]), box_muller(words[2], words[3])];
            for (out, value) in out.iter_mut().zip(values.into_iter().flatten()) {
                *out = (value * deviation) as f32;
            }
        }
    });
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
    fn the_numbers_are_normal() {
        let mut out = vec![0.0; 1 << 20];
        normal(1, "w", 2.0, &mut out);
        let moment = |power: i32| out.iter().map(|&x| (f64::from(x) / 2.0).powi(power)).sum::<f64>() / out.len() as f64;
        // Four standard errors of each moment at a million draws.
        assert!(moment(1).abs() < 0.004 && (moment(2) - 1.0).abs() < 0.006 && (moment(4) - 3.0).abs() < 0.04);
    }
}
