//! AVX-512 with VBMI and VBMI2, which Ice Lake (2019) and Zen 4 brought. Processors with less of it use AVX2.

use std::arch::x86_64::*;

use super::simd::Simd;

/// The same for each of four rows. A closure would be compiled without the instructions, and might not be inlined.
macro_rules! rows {
    ($row:ident => $each:expr) => { rows!($row in [0, 1, 2, 3] => $each) };
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

pub(super) struct Avx512;

const ABS: i32 = 0x7fff_ffff;

// SAFETY of every block below: the trait asks the caller for the instructions, and for pointers that can be read or
// written.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx512 {
    type Floats = [__m512; 4];
    type Bytes = __m512i;
    type Half = __m256i;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [__m512; 4] {
        unsafe { rows!(row => _mm512_loadu_ps(from.add(16 * row))) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, values: [__m512; 4]) {
        unsafe { rows!(row => _mm512_storeu_ps(to.add(16 * row), values[row])) };
    }

    #[inline(always)]
    unsafe fn stream(to: *mut f32, values: [__m512; 4]) {
        unsafe { rows!(row => _mm512_stream_ps(to.add(16 * row), values[row])) };
    }

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store_bytes(to: *mut u8, bytes: __m512i) {
        unsafe { _mm512_storeu_si512(to.cast(), bytes) }
    }

    #[inline(always)]
    unsafe fn stream_bytes(to: *mut u8, bytes: __m512i) {
        unsafe { _mm512_stream_si512(to.cast(), bytes) }
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
    unsafe fn zero() -> [__m512; 4] {
        unsafe { [_mm512_setzero_ps(); 4] }
    }

    #[inline(always)]
    unsafe fn add(a: [__m512; 4], b: [__m512; 4]) -> [__m512; 4] {
        unsafe { rows!(row => _mm512_add_ps(a[row], b[row])) }
    }

    #[inline(always)]
    unsafe fn subtract(a: [__m512; 4], b: [__m512; 4]) -> [__m512; 4] {
        unsafe { rows!(row => _mm512_sub_ps(a[row], b[row])) }
    }

    #[inline(always)]
    unsafe fn times(a: [__m512; 4], factor: f32) -> [__m512; 4] {
        unsafe { rows!(row => _mm512_mul_ps(a[row], _mm512_set1_ps(factor))) }
    }

    #[inline(always)]
    unsafe fn largest(a: [__m512; 4], b: [__m512; 4]) -> u32 {
        unsafe {
            let (a, b) = (absolute(a), absolute(b));
            let pairs = rows!(row => _mm512_max_epi32(a[row], b[row]));
            let both = _mm512_max_epi32(_mm512_max_epi32(pairs[0], pairs[1]), _mm512_max_epi32(pairs[2], pairs[3]));
            _mm512_reduce_max_epi32(both).cast_unsigned()
        }
    }

    #[inline(always)]
    unsafe fn two_largest(y: [__m512; 4]) -> u64 {
        unsafe {
            // Four rows of four groups become four vectors, one for each place in a group.
            let rows = absolute(y);
            let pairs = [
                _mm512_unpacklo_epi32(rows[0], rows[1]),
                _mm512_unpackhi_epi32(rows[0], rows[1]),
                _mm512_unpacklo_epi32(rows[2], rows[3]),
                _mm512_unpackhi_epi32(rows[2], rows[3]),
            ];
            let [a, b, c, d] = [
                _mm512_unpacklo_epi64(pairs[0], pairs[2]),
                _mm512_unpackhi_epi64(pairs[0], pairs[2]),
                _mm512_unpacklo_epi64(pairs[1], pairs[3]),
                _mm512_unpackhi_epi64(pairs[1], pairs[3]),
            ];
            // Of equal ones the first beats the other.
            let (ab, ac, ad) =
                (_mm512_cmpge_epi32_mask(a, b), _mm512_cmpge_epi32_mask(a, c), _mm512_cmpge_epi32_mask(a, d));
            let (bc, bd, cd) =
                (_mm512_cmpge_epi32_mask(b, c), _mm512_cmpge_epi32_mask(b, d), _mm512_cmpge_epi32_mask(c, d));
            let kept = _pdep_u64(two_of(ab, ac, ad), 0x1111_1111_1111_1111)
                | _pdep_u64(two_of(!ab, bc, bd), 0x2222_2222_2222_2222)
                | _pdep_u64(two_of(!ac, !bc, cd), 0x4444_4444_4444_4444)
                | _pdep_u64(two_of(!ad, !bd, !cd), 0x8888_8888_8888_8888);
            // Group 4 i + j of the 64 elements stands at place 4 j + i: a matrix of nibbles to be transposed.
            let swap = (kept ^ (kept >> 12)) & 0x0000_f0f0_0000_f0f0;
            let kept = kept ^ swap ^ (swap << 12);
            let swap = (kept ^ (kept >> 24)) & 0x0000_0000_ff00_ff00;
            kept ^ swap ^ (swap << 24)
        }
    }

    #[inline(always)]
    unsafe fn quantise(y: [__m512; 4], kept: u64, inverse: f32, scale: f32) -> (__m512i, [__m512; 4]) {
        unsafe {
            let (inverse, scale) = (_mm512_set1_ps(inverse), _mm512_set1_ps(scale));
            let q = rows!(row => _mm512_cvtps_epi32(_mm512_mul_ps(y[row], inverse)));
            let left = rows!(row => {
                let kept = (kept >> (16 * row)) as u16;
                _mm512_mask3_fnmadd_ps(_mm512_cvtepi32_ps(q[row]), scale, y[row], kept)
            });
            let words = [_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3])];
            let bytes = _mm512_packs_epi16(words[0], words[1]);
            // Packing works within 128 bits: four bytes of each row in turn.
            let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            (_mm512_permutexvar_epi32(order, bytes), left)
        }
    }

    #[inline(always)]
    unsafe fn compress(low: __m512i, kept_low: u64, high: __m512i, kept_high: u64) -> __m512i {
        unsafe {
            let low = _mm512_maskz_compress_epi8(kept_low, low);
            let high = _mm512_maskz_compress_epi8(kept_high, high);
            _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1)
        }
    }

    #[inline(always)]
    unsafe fn expand(bytes: __m256i, kept: u64) -> __m512i {
        unsafe { _mm512_maskz_expand_epi8(kept, _mm512_castsi256_si512(bytes)) }
    }

    #[inline(always)]
    unsafe fn halves(bytes: __m512i) -> (__m256i, __m256i) {
        unsafe { (_mm512_castsi512_si256(bytes), _mm512_extracti64x4_epi64(bytes, 1)) }
    }

    #[inline(always)]
    unsafe fn nibbles(bytes: __m512i) -> __m256i {
        unsafe {
            let low = _mm512_and_si512(bytes, _mm512_set1_epi16(0x000f));
            let high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi16(0x00f0));
            _mm512_cvtepi16_epi8(_mm512_or_si512(low, high))
        }
    }

    #[inline(always)]
    unsafe fn unnibble(bytes: __m256i) -> __m512i {
        unsafe {
            let words = _mm512_cvtepu8_epi16(bytes);
            let low = _mm512_and_si512(words, _mm512_set1_epi16(0x000f));
            let high = _mm512_and_si512(_mm512_slli_epi16(words, 4), _mm512_set1_epi16(0x0f00));
            // Extends the sign from the fourth bit: (x ^ 8) - 8.
            let eight = _mm512_set1_epi8(8);
            _mm512_sub_epi8(_mm512_xor_si512(_mm512_or_si512(low, high), eight), eight)
        }
    }

    #[inline(always)]
    unsafe fn scaled(bytes: __m512i, scale: f32) -> [__m512; 4] {
        unsafe {
            let q = wide(bytes);
            rows!(row => _mm512_mul_ps(q[row], _mm512_set1_ps(scale)))
        }
    }

    #[inline(always)]
    unsafe fn scaled_add(bytes: __m512i, scale: f32, sum: [__m512; 4]) -> [__m512; 4] {
        unsafe {
            let q = wide(bytes);
            rows!(row => _mm512_fmadd_ps(q[row], _mm512_set1_ps(scale), sum[row]))
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

#[inline(always)]
unsafe fn absolute(y: [__m512; 4]) -> [__m512i; 4] {
    // SAFETY: as above.
    unsafe { rows!(row => _mm512_and_si512(_mm512_castps_si512(y[row]), _mm512_set1_epi32(ABS))) }
}

#[inline(always)]
unsafe fn wide(bytes: __m512i) -> [__m512; 4] {
    // SAFETY: as above.
    unsafe {
        let sixteens = [
            _mm512_castsi512_si128(bytes),
            _mm512_extracti32x4_epi32(bytes, 1),
            _mm512_extracti32x4_epi32(bytes, 2),
            _mm512_extracti32x4_epi32(bytes, 3),
        ];
        rows!(row => _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteens[row])))
    }
}

/// Where at least two of three are 1: whoever beats two of its three neighbours is kept.
#[inline(always)]
fn two_of(x: u16, y: u16, z: u16) -> u64 {
    u64::from((x & y) | ((x | y) & z))
}
