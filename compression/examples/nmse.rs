//! How far is what a decoder reads from what an encoder was given? Prints the table of `docs/compression.md`:
//!
//! ```text
//! cargo run --release -p compression --example nmse
//! ```
//!
//! NMSE is the sum of squared differences over the sum of squares, of a single encode without a past. `sum of 16` compares
//! the sum of 16 decoded gradients with the sum of the 16 gradients, where error feedback carries what one step leaves out
//! into the next; that is what the weights of a model see.

use compression::{Codec, Payload};

const N: usize = 1 << 20;
const STEPS: usize = 16;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Box and Muller 1958.
    fn gaussian(&mut self) -> f64 {
        (-2.0 * (1.0 - self.unit()).ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Student's t with 3 degrees of freedom: a few values are many times larger than the rest.
    fn heavy(&mut self) -> f64 {
        let chi: f64 = (0..3).map(|_| self.gaussian().powi(2)).sum();
        self.gaussian() / (chi / 3.0).sqrt()
    }
}

/// One shot, and the sum of many steps with feedback.
fn errors(codec: Codec, mut draw: impl FnMut() -> f64) -> [f64; 2] {
    let (mut residual, mut decoded) = (vec![0.0f32; N], vec![0.0f32; N]);
    let (mut exact, mut found) = (vec![0.0f64; N], vec![0.0f64; N]);
    let mut payload = vec![0; codec.payload_bytes(N)];
    let mut one_shot = 0.0;
    for step in 0..STEPS {
        let mut gradient: Vec<f32> = (0..N).map(|_| draw() as f32 * 1e-3).collect();
        exact.iter_mut().zip(&gradient).for_each(|(sum, g)| *sum += f64::from(*g));
        let _ = codec.encode(&mut gradient, &residual, &mut payload);
        // What is left has taken the gradient's place.
        residual = gradient;
        Payload::new(codec, N, &payload[..]).expect("our own").decode(&mut decoded);
        found.iter_mut().zip(&decoded).for_each(|(sum, x)| *sum += f64::from(*x));
        if step == 0 {
            one_shot = nmse(&exact, &found);
        }
    }
    [one_shot, nmse(&exact, &found)]
}

fn nmse(exact: &[f64], found: &[f64]) -> f64 {
    let error: f64 = exact.iter().zip(found).map(|(a, b)| (a - b).powi(2)).sum();
    error / exact.iter().map(|x| x * x).sum::<f64>()
}

fn main() {
    println!(
        "| codec | bits/element | Gaussian | sum of {STEPS} | heavy-tailed | sum of {STEPS} | 9 of 10 zero | sum of {STEPS} |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for codec in Codec::ALL.into_iter().filter(|codec| codec.is_lossy()) {
        let bits = 8.0 * codec.payload_bytes(N) as f64 / N as f64;
        let (mut a, mut b, mut c) = (Random(1), Random(2), Random(3));
        let rows = [
            errors(codec, || a.gaussian()),
            errors(codec, || b.heavy()),
            errors(codec, || if c.unit() < 0.1 { c.gaussian() } else { 0.0 }),
        ];
        let columns: Vec<String> = rows.as_flattened().iter().map(|x| format!("{x:.1e}")).collect();
        println!("| `{codec}` | {bits} | {} |", columns.join(" | "));
    }
}
