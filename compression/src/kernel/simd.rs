//! What a set of vector instructions does to 64 elements, half a block. [`blocks`](super::blocks) makes the kernels of it.

/// One set of vector instructions. Its methods compile to single instructions or a few, and are only of use inlined into
/// a function that turns the instructions on.
///
/// # Safety
/// Every method may be called only where the processor has the instructions. Pointers need no alignment unless a method
/// says so; `load*` reads and `store*` writes as many elements as the type holds.
pub(super) trait Simd {
    /// 64 f32.
    type Floats: Copy;
    /// 64 bytes.
    type Bytes: Copy;
    /// 32 bytes.
    type Half: Copy;

    unsafe fn load(from: *const f32) -> Self::Floats;
    unsafe fn store(to: *mut f32, values: Self::Floats);
    /// Writes past the caches. `to` is a multiple of 64 bytes.
    unsafe fn stream(to: *mut f32, values: Self::Floats);
    unsafe fn load_bytes(from: *const u8) -> Self::Bytes;
    unsafe fn store_bytes(to: *mut u8, bytes: Self::Bytes);
    /// Writes past the caches. `to` is a multiple of 64 bytes.
    unsafe fn stream_bytes(to: *mut u8, bytes: Self::Bytes);
    unsafe fn load_half(from: *const u8) -> Self::Half;
    unsafe fn store_half(to: *mut u8, bytes: Self::Half);
    /// Writes past the caches. `to` is a multiple of 32 bytes.
    unsafe fn stream_half(to: *mut u8, bytes: Self::Half);

    unsafe fn zero() -> Self::Floats;
    unsafe fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    unsafe fn subtract(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    unsafe fn times(a: Self::Floats, factor: f32) -> Self::Floats;
    /// The bits of the largest absolute value of both.
    unsafe fn largest(a: Self::Floats, b: Self::Floats) -> u32;
    /// Which two of every four elements are the largest without their signs; ties go to the lower index.
    unsafe fn two_largest(y: Self::Floats) -> u64;
    /// The multiples of `scale` that are nearest to `y`, whose products with `inverse` are within -127 and 127 when
    /// rounded, and what is left of `y` where the bit of `kept` is 1; elsewhere `y` itself.
    unsafe fn quantise(y: Self::Floats, kept: u64, inverse: f32, scale: f32) -> (Self::Bytes, Self::Floats);
    /// The 32 bytes of each whose bits are 1, in order.
    unsafe fn compress(low: Self::Bytes, kept_low: u64, high: Self::Bytes, kept_high: u64) -> Self::Bytes;
    /// 32 bytes at the places whose bits are 1, in order, and zeros at the 32 others.
    unsafe fn expand(bytes: Self::Half, kept: u64) -> Self::Bytes;
    unsafe fn halves(bytes: Self::Bytes) -> (Self::Half, Self::Half);
    /// The low halves of every two bytes in one.
    unsafe fn nibbles(bytes: Self::Bytes) -> Self::Half;
    /// The two halves of every byte, with their signs.
    unsafe fn unnibble(bytes: Self::Half) -> Self::Bytes;
    /// Signed bytes times `scale`.
    unsafe fn scaled(bytes: Self::Bytes, scale: f32) -> Self::Floats;
    /// Signed bytes times `scale`, which is exact, added to `sum`.
    unsafe fn scaled_add(bytes: Self::Bytes, scale: f32, sum: Self::Floats) -> Self::Floats;
    /// Asks for the memory of a block. Any address will do.
    unsafe fn prefetch(from: *const f32);
    /// Makes what was written past the caches visible before whatever is written after it.
    unsafe fn fence();
}
