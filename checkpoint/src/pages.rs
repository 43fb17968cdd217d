//! Large memory in large pages.
//!
//! A state is gigabytes. In pages of 4 KiB a copy of it into new memory waits for the system at every page, and any copy
//! misses the processor's table of pages all the time. Linux hands out pages of 2 MiB, on most systems only if it is asked.

/// Bytes below which nobody asks.
#[cfg(target_os = "linux")]
const WORTH: usize = 4 << 20;

/// Asks for large pages where `memory` lies. Whether there are any is the system's matter, and changes nothing else.
#[cfg(target_os = "linux")]
pub(crate) fn prefer_large<T>(memory: &mut [T]) {
    use rustix::mm::{Advice, madvise};

    let (start, bytes) = (memory.as_mut_ptr().cast::<u8>(), size_of_val(memory));
    if bytes < WORTH {
        return;
    }
    let page = rustix::param::page_size();
    // Whole pages inside, so that nobody else's memory is spoken of.
    let before = start.align_offset(page);
    let inside = bytes.saturating_sub(before) / page * page;
    // SAFETY: the range lies in `memory`, which is borrowed for writing; the advice changes how its pages are laid out, and
    // neither what they hold nor whether they are there.
    let asked = unsafe { madvise(start.wrapping_add(before).cast(), inside, Advice::LinuxHugepage) };
    if let Err(error) = asked {
        tracing::debug!(%error, "no large pages");
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn prefer_large<T>(_memory: &mut [T]) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_memory_holds_stays() {
        for (elements, from) in [(0, 0), (1000, 3), (3 << 20, 0), (3 << 20, 1), ((3 << 20) + 77, 5)] {
            let mut values: Vec<u32> = (0..elements).collect();
            prefer_large(&mut values[from..]);
            assert!(values.into_iter().eq(0..elements));
        }
    }
}
