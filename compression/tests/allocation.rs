//! Nothing is allocated per call: all memory is the caller's. A binary of its own, for its allocator counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use compression::codec::{par_reduce, reduce};
use compression::{Codec, Found, Level, Part, Payload, Stores};
use rayon::{ThreadPool, ThreadPoolBuilder};

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
/// One test at a time, for they count together.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

thread_local! {
    /// The test harness has threads of its own, which are none of ours.
    static IS_WATCHED: Cell<bool> = const { Cell::new(false) };
}

struct Counting;

impl Counting {
    fn count() {
        if IS_WATCHED.try_with(Cell::get).unwrap_or(false) {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
    }
}

// SAFETY: the system's allocator does the work; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::count();
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::count();
        // SAFETY: the caller's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::count();
        // SAFETY: the caller's.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Unwatch;

impl Drop for Unwatch {
    fn drop(&mut self) {
        IS_WATCHED.set(false);
    }
}

/// Runs a test alone, with its thread watched until it ends: what the harness allocates afterwards is not the test's.
fn watched(test: impl FnOnce()) {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    // The first question what the processor can do allocates, and no later one.
    let _ = Level::best();
    let _unwatched_later = Unwatch;
    IS_WATCHED.set(true);
    test();
}

fn watched_pool(threads: usize) -> ThreadPool {
    let pool = ThreadPoolBuilder::new().num_threads(threads);
    pool.start_handler(|_| IS_WATCHED.set(true)).exit_handler(|_| IS_WATCHED.set(false)).build().expect("threads")
}

/// How often watched threads allocate while `work` runs.
fn allocations(work: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    work();
    ALLOCATIONS.load(Ordering::Relaxed) - before
}

/// Enough to be cut between threads, and a tail.
const N: usize = 300_077;

struct Buffers {
    values: Vec<f32>,
    residual: Vec<f32>,
    payload: Vec<u8>,
    sum: Vec<f32>,
}

impl Buffers {
    fn new(codec: Codec) -> Self {
        let values = (0..N).map(|i| ((i * 7919 % 1009) as f32 - 504.0) / 100.0).collect();
        Self { values, residual: vec![0.01; N], payload: vec![0; codec.payload_bytes(N)], sum: vec![0.0; N] }
    }

    fn by_one_thread(&mut self, codec: Codec, level: Level, stores: Stores) {
        let Self { values, residual, payload, sum } = self;
        assert_eq!(codec.encode_with(level, stores, values, residual, payload), Found::Finite);
        let payload = Payload::new(codec, N, &payload[..]).expect("our own");
        payload.decode_with(level, stores, sum);
        payload.decode_add_with(level, sum);
        reduce(&[Part::Encoded(&payload), Part::Values(residual), Part::Encoded(&payload)], sum);
    }

    fn by_all_threads(&mut self, codec: Codec) {
        let Self { values, residual, payload, sum } = self;
        assert_eq!(codec.par_encode(values, residual, payload), Found::Finite);
        let payload = Payload::new(codec, N, &payload[..]).expect("our own");
        payload.par_decode(sum);
        payload.par_decode_add(sum);
        par_reduce(&[Part::Encoded(&payload), Part::Values(residual), Part::Encoded(&payload)], sum);
    }
}

#[test]
fn no_codec_allocates_at_any_level() {
    watched(|| {
        for codec in Codec::ALL {
            let mut buffers = Buffers::new(codec);
            for level in Level::available() {
                for stores in [Stores::Cached, Stores::Stream] {
                    assert_eq!(allocations(|| buffers.by_one_thread(codec, level, stores)), 0, "{codec} at {level}");
                }
            }
        }
    });
}

#[test]
fn no_codec_allocates_in_the_threads_of_a_pool() {
    watched(|| {
        watched_pool(2).install(|| {
            for codec in Codec::ALL {
                let mut buffers = Buffers::new(codec);
                // Each of the pool's threads allocates once, when it first looks for work: in any of the first calls.
                // What a codec allocates would be allocated in all.
                let calls = (0..20).map(|_| allocations(|| buffers.by_all_threads(codec)));
                assert_eq!(calls.min(), Some(0), "{codec}");
            }
        });
    });
}

/// The control: one allocation is counted, in a thread of a pool too.
#[test]
fn an_allocation_is_counted() {
    watched(|| {
        assert_eq!(allocations(|| drop(black_box(vec![1u8; 10]))), 1);
        assert_eq!(allocations(|| drop(black_box(vec![0u8; 10]))), 1);
        assert_eq!(allocations(|| black_box(vec![1u8; 10]).reserve(1000)), 2);
        watched_pool(1).install(|| assert_eq!(allocations(|| drop(black_box(vec![1u8; 10]))), 1));
    });
}
