//! The allocator of the binary, and how it is set up.

pub use mimalloc::MiMalloc;

/// `mi_option_purge_delay` of mimalloc's `mi_option_t`.
const PURGE_DELAY: i32 = 15;

/// Tells mimalloc to keep freed blocks. A step frees and asks for hundreds of megabytes again and again: giving them
/// back to the system meanwhile costs a quarter of the step of a 27 M-parameter model on two cores (the pages have to
/// be zeroed anew). Without mimalloc as the allocator this does nothing.
pub fn keep_blocks() {
    // SAFETY: sets one integer of mimalloc's table of options, which is there from the start of the process and may be
    // written at any time; the index is checked by mimalloc.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
}
