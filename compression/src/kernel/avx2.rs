//! AVX2 and FMA, which every x86-64 processor since Haswell (2013) and Zen (2017) has.

use std::arch::x86_64::*;

use super::simd::Simd;

/// The same for each of some rows. A closure would be compiled without the instructions, and might not be inlined.
macro_rules! rows {
    ($row:ident => $each:expr) => { rows!($row in [0, 1, 2, 3, 4, 5, 6, 7] => $each) };
    ($row:ident in [$($number:literal),*] => $each:expr) => {{
        macro_rules! at {
            ($which:literal) => {{
                let $row: usize = $which;
                $each
            }};
        }
        [$(at!($number)),*]
    }};
}

pub(super) struct Avx2;

const ABS: i32 = 0x7fff_ffff;

/// For each byte of a bitmap, where among the values of eight elements an element finds its own; 0x80 gives a zero.
static EXPAND: [[u8; 8]; 256] = expand();
/// For each byte of a bitmap, which of eight elements are kept: four places, as one number.
static COMPRESS: [u32; 256] = compress();

const fn expand() -> [[u8; 8]; 256] {
    let mut table = [[0x80; 8]; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut at, mut next) = (0, 0);
        while at < 8 {
            if byte >> at & 1 == 1 {
                table[byte][at] = next;
                next += 1;
            }
            at += 1;
        }
        byte += 1;
    }
    table
}

const fn compress() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut at, mut next) = (0, 0);
        while at < 8 && next < 32 {
            if byte >> at & 1 == 1 {
                table[byte] |= (at as u32) << next;
                next += 8;
            }
            at += 1;
        }
        byte += 1;
    }
    table
}

// SAFETY of every block below: the trait asks the caller for the instructions, and for pointers that can be read or
// written.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    type Floats = [__m256; 8];
    type Bytes = [__m256i; 2];
    type Half = __m256i;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [__m256; 8] {
        unsafe { rows!(row => _mm256_loadu_ps(from.add(8 * row))) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, values: [__m256; 8]) {
        unsafe { rows!(row => _mm256_storeu_ps(to.add(8 * row), values[row])) };
    }

    #[inline(always)]
    unsafe fn stream(to: *mut f32, values: [__m256; 8]) {
        unsafe { rows!(row => _mm256_stream_ps(to.add(8 * row), values[row])) };
    }

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> [__m256i; 2] {
        unsafe { [Self::load_half(from), Self::load_half(from.add(32))] }
    }

    #[inline(always)]
    unsafe fn store_bytes(to: *mut u8, bytes: [__m256i; 2]) {
        unsafe {
            Self::store_half(to, bytes[0]);
            Self::store_half(to.add(32), bytes[1]);
        }
    }

    #[inline(always)]
    unsafe fn stream_bytes(to: *mut u8, bytes: [__m256i; 2]) {
        unsafe {
            Self::stream_half(to, bytes[0]);
            Self::stream_half(to.add(32), bytes[1]);
        }
    }

    #[inline(always)]
    unsafe fn load_half(from: *const u8) -> __m256i {
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store_half(to: *mut u8, bytes: __m256i) {
        unsafe { _mm256_storeu_si256(to.cast(), bytes) }
    }

    #[inline(always)]
    unsafe fn stream_half(to: *mut u8, bytes: __m256i) {
        unsafe { _mm256_stream_si256(to.cast(), bytes) }
    }

    #[inline(always)]
    unsafe fn zero() -> [__m256; 8] {
        unsafe { [_mm256_setzero_ps(); 8] }
    }

    #[inline(always)]
    unsafe fn add(a: [__m256; 8], b: [__m256; 8]) -> [__m256; 8] {
        unsafe { rows!(row => _mm256_add_ps(a[row], b[row])) }
    }

    #[inline(always)]
    unsafe fn subtract(a: [__m256; 8], b: [__m256; 8]) -> [__m256; 8] {
        unsafe { rows!(row => _mm256_sub_ps(a[row], b[row])) }
    }

    #[inline(always)]
    unsafe fn times(a: [__m256; 8], factor: f32) -> [__m256; 8] {
        unsafe { rows!(row => _mm256_mul_ps(a[row], _mm256_set1_ps(factor))) }
    }

    #[inline(always)]
    unsafe fn largest(a: [__m256; 8], b: [__m256; 8]) -> u32 {
        unsafe {
            let eight = rows!(row => _mm256_max_epi32(absolute(a[row]), absolute(b[row])));
            let four = rows!(row in [0, 1, 2, 3] => _mm256_max_epi32(eight[row], eight[row + 4]));
            let row = _mm256_max_epi32(_mm256_max_epi32(four[0], four[1]), _mm256_max_epi32(four[2], four[3]));
            let row = _mm_max_epi32(_mm256_castsi256_si128(row), _mm256_extracti128_si256(row, 1));
            let row = _mm_max_epi32(row, _mm_shuffle_epi32(row, 0b0100_1110));
            let row = _mm_max_epi32(row, _mm_shuffle_epi32(row, 0b1011_0001));
            _mm_cvtsi128_si32(row).cast_unsigned()
        }
    }

    #[inline(always)]
    unsafe fn two_largest(y: [__m256; 8]) -> u64 {
        unsafe {
            // Each element is compared with the next ones of its group, in a circle. One of a lower index wins a tie,
            // so it wins against one less.
            let ties = [
                _mm256_setr_epi32(0, 0, 0, 1, 0, 0, 0, 1),
                _mm256_setr_epi32(0, 0, 1, 1, 0, 0, 1, 1),
                _mm256_setr_epi32(0, 1, 1, 1, 0, 1, 1, 1),
            ];
            let kept = rows!(row => {
                let y = absolute(y[row]);
                let others = [
                    _mm256_shuffle_epi32(y, 0b0011_1001),
                    _mm256_shuffle_epi32(y, 0b0100_1110),
                    _mm256_shuffle_epi32(y, 0b1001_0011),
                ];
                let lost = rows!(k in [0, 1, 2] => _mm256_cmpgt_epi32(others[k], _mm256_sub_epi32(y, ties[k])));
                let losses = _mm256_add_epi32(_mm256_add_epi32(lost[0], lost[1]), lost[2]);
                let kept = _mm256_cmpgt_epi32(losses, _mm256_set1_epi32(-2));
                _mm256_movemask_ps(_mm256_castsi256_ps(kept)) as u8
            });
            u64::from_le_bytes(kept)
        }
    }

    #[inline(always)]
    unsafe fn quantise(y: [__m256; 8], kept: u64, inverse: f32, scale: f32) -> ([__m256i; 2], [__m256; 8]) {
        unsafe {
            let (inverse, scale) = (_mm256_set1_ps(inverse), _mm256_set1_ps(scale));
            let q = rows!(row => _mm256_cvtps_epi32(_mm256_mul_ps(y[row], inverse)));
            let left = rows!(row => {
                let less = _mm256_mul_ps(_mm256_cvtepi32_ps(q[row]), scale);
                _mm256_sub_ps(y[row], if kept == u64::MAX { less } else { select(less, kept >> (8 * row)) })
            });
            // Packing works within 128 bits: four bytes of each row in turn.
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            let bytes = rows!(row in [0, 4] => {
                let words = [_mm256_packs_epi32(q[row], q[row + 1]), _mm256_packs_epi32(q[row + 2], q[row + 3])];
                _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words[0], words[1]), order)
            });
            (bytes, left)
        }
    }

    #[inline(always)]
    unsafe fn compress(low: [__m256i; 2], kept_low: u64, high: [__m256i; 2], kept_high: u64) -> [__m256i; 2] {
        unsafe { [squeeze(low, kept_low), squeeze(high, kept_high)] }
    }

    #[inline(always)]
    unsafe fn expand(bytes: __m256i, kept: u64) -> [__m256i; 2] {
        unsafe {
            let halves = [_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)];
            let kept = kept.to_le_bytes();
            // Eight values for sixteen elements: four for the first eight, four for the rest.
            let sixteens = rows!(part in [0, 1, 2, 3] => {
                let low = u64::from_le_bytes(EXPAND[usize::from(kept[2 * part])]);
                let high = u64::from_le_bytes(EXPAND[usize::from(kept[2 * part + 1])]);
                let start = 8 * (part as u64 % 2) * 0x0101_0101_0101_0101;
                // 0x80 stays above 0x7f whatever is added here.
                let (low, high) = (low + start, high + start + 0x0404_0404_0404_0404);
                _mm_shuffle_epi8(halves[part / 2], _mm_set_epi64x(high.cast_signed(), low.cast_signed()))
            });
            [_mm256_set_m128i(sixteens[1], sixteens[0]), _mm256_set_m128i(sixteens[3], sixteens[2])]
        }
    }

    #[inline(always)]
    unsafe fn halves(bytes: [__m256i; 2]) -> (__m256i, __m256i) {
        (bytes[0], bytes[1])
    }

    #[inline(always)]
    unsafe fn nibbles(bytes: [__m256i; 2]) -> __m256i {
        unsafe {
            let words = rows!(half in [0, 1] => {
                let low = _mm256_and_si256(bytes[half], _mm256_set1_epi16(0x000f));
                let high = _mm256_and_si256(_mm256_srli_epi16(bytes[half], 4), _mm256_set1_epi16(0x00f0));
                _mm256_or_si256(low, high)
            });
            _mm256_permute4x64_epi64(_mm256_packus_epi16(words[0], words[1]), 0b1101_1000)
        }
    }

    #[inline(always)]
    unsafe fn unnibble(bytes: __m256i) -> [__m256i; 2] {
        unsafe {
            let halves = [_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)];
            rows!(half in [0, 1] => {
                let words = _mm256_cvtepu8_epi16(halves[half]);
                let low = _mm256_and_si256(words, _mm256_set1_epi16(0x000f));
                let high = _mm256_and_si256(_mm256_slli_epi16(words, 4), _mm256_set1_epi16(0x0f00));
                // Extends the sign from the fourth bit: (x ^ 8) - 8.
                let eight = _mm256_set1_epi8(8);
                _mm256_sub_epi8(_mm256_xor_si256(_mm256_or_si256(low, high), eight), eight)
            })
        }
    }

    #[inline(always)]
    unsafe fn scaled(bytes: [__m256i; 2], scale: f32) -> [__m256; 8] {
        unsafe {
            let q = wide(bytes);
            rows!(row => _mm256_mul_ps(q[row], _mm256_set1_ps(scale)))
        }
    }

    #[inline(always)]
    unsafe fn scaled_add(bytes: [__m256i; 2], scale: f32, sum: [__m256; 8]) -> [__m256; 8] {
        unsafe {
            let q = wide(bytes);
            rows!(row => _mm256_fmadd_ps(q[row], _mm256_set1_ps(scale), sum[row]))
        }
    }

    #[inline(always)]
    unsafe fn prefetch(from: *const f32) {
        unsafe {
            rows!(row in [0, 1, 2, 3, 4, 5, 6, 7] => _mm_prefetch(from.wrapping_add(16 * row).cast(), _MM_HINT_T0))
        };
    }

    #[inline(always)]
    unsafe fn fence() {
        unsafe { _mm_sfence() }
    }
}

// SAFETY of what follows: as above.

#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn absolute(y: __m256) -> __m256i {
    unsafe { _mm256_and_si256(_mm256_castps_si256(y), _mm256_set1_epi32(ABS)) }
}

/// `x` where the bit of the lowest eight of `kept` is 1, zero elsewhere.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn select(x: __m256, kept: u64) -> __m256 {
    unsafe {
        let bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        let kept = _mm256_and_si256(_mm256_set1_epi32(kept as i32), bits);
        _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(kept, bits)))
    }
}

/// The 32 of 64 bytes whose bits are 1.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn squeeze(bytes: [__m256i; 2], kept: u64) -> __m256i {
    unsafe {
        let sixteens = [
            _mm256_castsi256_si128(bytes[0]),
            _mm256_extracti128_si256(bytes[0], 1),
            _mm256_castsi256_si128(bytes[1]),
            _mm256_extracti128_si256(bytes[1], 1),
        ];
        let kept = kept.to_le_bytes();
        let eights = rows!(part in [0, 1, 2, 3] => {
            let low = u64::from(COMPRESS[usize::from(kept[2 * part])]);
            let high = u64::from(COMPRESS[usize::from(kept[2 * part + 1])]) + 0x0808_0808;
            let places = _mm_cvtsi64_si128((low | high << 32).cast_signed());
            _mm_cvtsi128_si64(_mm_shuffle_epi8(sixteens[part], places))
        });
        _mm256_setr_epi64x(eights[0], eights[1], eights[2], eights[3])
    }
}

#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn wide(bytes: [__m256i; 2]) -> [__m256; 8] {
    unsafe {
        let sixteens = [
            _mm256_castsi256_si128(bytes[0]),
            _mm256_extracti128_si256(bytes[0], 1),
            _mm256_castsi256_si128(bytes[1]),
            _mm256_extracti128_si256(bytes[1], 1),
        ];
        rows!(row => {
            let sixteen = sixteens[row / 2];
            let eight = if row % 2 == 0 { sixteen } else { _mm_srli_si128(sixteen, 8) };
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight))
        })
    }
}
