//! Prints what this crate makes of inputs of many lengths, a JSON object a line, for an independent reader of
//! `docs/payload-format.md` to compare with:
//!
//! ```text
//! cargo run -p compression --example payload_vectors | python3 tests/peers/decode_payload.py
//! ```
//!
//! - `{"codec", "gradient", "residual", "payload", "next"}`: they are encoded as `payload` (hexadecimal), and `next` is the
//!   new residual.
//! - `{"codec", "gradient", "residual", "payload": null}`: they cannot be sent.
//! - `{"codec", "elements", "bytes", "decoded"}`: what bytes decode to, or `null` where they are refused.
//!
//! Floats are numbers: their 32 bits.

use compression::{Codec, Found, Payload};

/// What stands in the worked examples of `docs/payload-format.md`.
const WORKED: [f32; 5] = [1.0, -3.0, 3.0, 3.0, -2.0];
/// Damaged copies of each payload.
const DAMAGED: usize = 3;

fn main() {
    let mut random = Random(0x7472_6962);
    let lengths =
        (0..=20).chain(60..=68).chain(121..=136).chain([191, 192, 255, 256, 257, 258, 259, 383, 385, 509, 1000]);
    let lengths: Vec<usize> = lengths.collect();
    for codec in Codec::ALL {
        vectors(codec, &WORKED, &[0.0; 5], &mut random);
        for value in edges() {
            vectors(codec, &[value; 5], &[0.0; 5], &mut random);
            vectors(codec, &[0.0, -value, 0.0], &[0.0; 3], &mut random);
        }
        for &n in &lengths {
            for kind in 0..Random::KINDS {
                let values: Vec<f32> = (0..n).map(|at| random.value(kind, at)).collect();
                let residual: Vec<f32> = match kind % 3 {
                    0 => (0..n).map(|at| random.value(kind, at) / 64.0).collect(),
                    1 => (0..n).map(|at| random.value(kind, at)).collect(),
                    _ => vec![0.0; n],
                };
                vectors(codec, &values, &residual, &mut random);
            }
        }
    }
}

/// Prints the vector of one input, and what becomes of damaged copies of its payload.
fn vectors(codec: Codec, values: &[f32], residual: &[f32], random: &mut Random) {
    let mut next = values.to_vec();
    let mut payload = vec![0; codec.payload_bytes(values.len())];
    let found = codec.encode(&mut next, residual, &mut payload);
    let input = format!(r#""codec":"{codec}","gradient":{:?},"residual":{:?}"#, bits(values), bits(residual));
    if found == Found::NonFinite {
        println!(r#"{{{input},"payload":null}}"#);
        return;
    }
    println!(r#"{{{input},"payload":"{}","next":{:?}}}"#, hexadecimal(&payload), bits(&next));
    for _ in 0..DAMAGED {
        let mut bytes = payload.clone();
        random.damage(&mut bytes, codec, values.len());
        let decoded = Payload::new(codec, values.len(), &bytes).map(|payload| {
            let mut out = vec![f32::NAN; values.len()];
            payload.decode(&mut out);
            out
        });
        let decoded = decoded.map_or("null".to_owned(), |out| format!("{:?}", bits(&out)));
        println!(
            r#"{{"codec":"{codec}","elements":{},"bytes":"{}","decoded":{decoded}}}"#,
            values.len(),
            hexadecimal(&bytes)
        );
    }
}

/// Where rules begin and end, each with its neighbours; and what cannot be sent.
fn edges() -> impl Iterator<Item = f32> {
    let power = |exponent: i32| f32::from_bits(((127 + exponent) as u32) << 23);
    let edges = [power(-98), 127.0 * power(-100), 7.0 * power(-100), power(-126), power(126), 127.0 * power(-107)];
    let around = edges.into_iter().flat_map(|edge: f32| [edge.next_down(), edge, edge.next_up()]);
    around.chain([f32::from_bits(1), f32::MAX, f32::INFINITY, f32::NAN])
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `SplitMix64`: the same vectors in every run.
struct Random(u64);

impl Random {
    const KINDS: usize = 10;

    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    const fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// From -1 to 1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Any f32 whose power of two is from `low` to below `high`.
    fn power(&mut self, low: i32, high: i32) -> f32 {
        let exponent = low + self.below((high - low) as u64) as i32;
        let bits = self.next() as u32;
        f32::from_bits(bits & 0x807f_ffff | ((127 + exponent) as u32) << 23)
    }

    /// Element `at` of an input of this kind.
    fn value(&mut self, kind: usize, at: usize) -> f32 {
        let block = at / compression::BLOCK;
        match kind {
            0 => self.unit() * self.unit() * self.unit(),
            // Whole numbers and halves: ties in groups, in rounding, and zeros of both signs.
            1 => (self.below(9) as f32 - 4.0) / 2.0 * if self.below(2) == 0 { 1.0 } else { -1.0 },
            2 => [-0.0, 0.0][at % 2],
            // Equal but for their signs.
            3 => [0.7, -0.7][self.below(2) as usize],
            4 => self.power(-60, 60),
            // Around the smallest scale, and denormals.
            5 => self.power(-102, -90) * [1.0, f32::MIN_POSITIVE, 0.01][(at / 64 + block) % 3],
            // Around the largest magnitude, which is not always met.
            6 if self.below(200) == 0 => self.power(124, 127),
            6 => self.power(120, 126),
            // Blocks of zeros, of very small and of usual numbers in turn.
            7 => [0.0, self.power(-149 + 23, -100), self.unit()][block % 3],
            // One large element, so that most are rounded to zero.
            8 => {
                if at % 97 == 3 {
                    1000.0
                } else {
                    self.unit()
                }
            }
            // Multiples of halves of a scale that is a power of two.
            _ => {
                if at.is_multiple_of(128) {
                    127.0
                } else {
                    (self.below(255) as f32 - 127.0) / 2.0
                }
            }
        }
    }

    /// Changes what a check may be about: a bit, a byte, a scale, the bitmap, the end, the length.
    fn damage(&mut self, bytes: &mut Vec<u8>, codec: Codec, elements: usize) {
        let blocks = elements.div_ceil(compression::BLOCK);
        let is_sparse = matches!(codec, Codec::Sparse24Int8 | Codec::Sparse24Int4);
        let (kind, length) = (self.below(20), bytes.len());
        let mut any = |bytes: usize| self.below(bytes as u64) as usize;
        match kind {
            0 => bytes.push(0),
            1 => drop(bytes.pop()),
            _ if bytes.is_empty() => {}
            2..6 => {
                let edges =
                    [0, 1, 0x0d7f, 0x0d80, 0x7b02, 0x7b03, 0x7d13, 0x7d14, 0x7f80, 0x8000, 0xbf80, any(1 << 16) as u16];
                let (at, bits) = (2 * any(blocks), edges[any(edges.len())]);
                bytes[at..at + 2].copy_from_slice(&bits.to_le_bytes());
            }
            6..9 => *bytes.last_mut().expect("one byte at least") ^= 1 << any(8),
            9..11 if is_sparse => bytes[2 * blocks + any(elements.div_ceil(8))] ^= 1 << any(8),
            11..13 if is_sparse => {
                // Other elements, and as many.
                let byte = &mut bytes[2 * blocks + any(elements.div_ceil(8))];
                *byte = *byte & 0x99 | (*byte & 0x22) << 1 | (*byte & 0x44) >> 1;
            }
            13 if is_sparse => bytes[2 * blocks + elements.div_ceil(8) - 1] ^= 1 << any(8),
            14..16 => bytes[any(length)] = [0, 0x80, 0x88, 0x08, 0x7f, 0xff][any(6)],
            _ => bytes[any(length)] ^= 1 << any(8),
        }
    }
}
