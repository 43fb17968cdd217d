//! Copies of f32, to measure kernels against: what a machine's memory allows.

use super::Level;

/// Copies past the caches where the processor can and `to` is a multiple of 64 bytes; otherwise as the standard library
/// does.
///
/// # Panics
/// When the lengths differ.
pub fn stream(level: Level, from: &[f32], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "a copy has the length of what is copied");
    #[cfg(target_arch = "x86_64")]
    if level != Level::PORTABLE && to.as_ptr().addr().is_multiple_of(64) {
        // SAFETY: only a level with AVX is not the portable one, and the address is a multiple of 64 bytes.
        unsafe { stream_avx(from, to) };
        return;
    }
    let _ = level;
    to.copy_from_slice(from);
}

/// As [`stream`], by all threads of rayon's pool.
pub fn par_stream(level: Level, from: &[f32], to: &mut [f32]) {
    match super::middle(to.len()) {
        None => stream(level, from, to),
        Some(middle) => {
            let ((from, from_rest), (to, to_rest)) = (from.split_at(middle), to.split_at_mut(middle));
            rayon::join(|| par_stream(level, from, to), || par_stream(level, from_rest, to_rest));
        }
    }
}

/// Copies as the standard library does, by all threads of rayon's pool.
///
/// # Panics
/// When the lengths differ.
pub fn par_cached(from: &[f32], to: &mut [f32]) {
    match super::middle(to.len()) {
        None => to.copy_from_slice(from),
        Some(middle) => {
            let ((from, from_rest), (to, to_rest)) = (from.split_at(middle), to.split_at_mut(middle));
            rayon::join(|| par_cached(from, to), || par_cached(from_rest, to_rest));
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
fn stream_avx(from: &[f32], to: &mut [f32]) {
    use std::arch::x86_64::{_mm_sfence, _mm256_loadu_ps, _mm256_stream_ps};
    let whole = to.len() / 16 * 16;
    for at in (0..whole).step_by(16) {
        // SAFETY: both slices have sixteen elements more, and the caller has checked the address.
        unsafe {
            let (from, to) = (from.as_ptr().add(at), to.as_mut_ptr().add(at));
            let (low, high) = (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8)));
            _mm256_stream_ps(to, low);
            _mm256_stream_ps(to.add(8), high);
        }
    }
    to[whole..].copy_from_slice(&from[whole..]);
    _mm_sfence();
}
