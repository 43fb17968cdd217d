//! From the recipe's `[device]` to a burn device.

use burn::Tensor;
use burn::tensor::Device;

use crate::error::{Error, Result};
use crate::recipe::keys::BACKENDS;
use crate::recipe::resolved::DeviceKeys;

/// Whether this build has the backend of that name.
///
/// # Errors
/// The feature that builds it.
pub fn available(backend: &str) -> std::result::Result<(), String> {
    let (built, feature) = match backend {
        "libtorch" | "libtorch-cuda" => (cfg!(feature = "libtorch"), "libtorch"),
        "vulkan" => (cfg!(feature = "vulkan"), "vulkan"),
        "metal" => (cfg!(feature = "metal"), "metal"),
        "cuda" => (cfg!(feature = "cuda"), "cuda"),
        "rocm" => (cfg!(feature = "rocm"), "rocm"),
        "cpu" => (cfg!(feature = "cpu"), "cpu"),
        "flex" => (true, ""),
        _ => return Err(format!("expected one of {}, found {backend:?}", BACKENDS.join(", "))),
    };
    if built { Ok(()) } else { Err(format!("this build has no {backend}: build with `--features {feature}`")) }
}

/// Whether that backend computes on the processor's own cores.
#[must_use]
pub fn is_host(backend: &str) -> bool {
    matches!(backend, "flex" | "libtorch" | "cpu")
}

/// Of a thread that computes: what the main thread of a process has.
const STACK_BYTES: usize = 8 << 20;

/// Does the work on one of so many threads that compute, 0 being one for each core, and the others help. Whoever computes
/// is one of them, and not beside them: handing over operation by operation to a pool and waiting for it costs time. Must be
/// called before anything computes.
pub fn compute<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    let builder = || rayon::ThreadPoolBuilder::new().num_threads(threads);
    let pool = builder().thread_name(|index| format!("compute-{index}")).stack_size(STACK_BYTES).build();
    if threads > 0 {
        // For what other threads do, as those that write checkpoints. It fails only when their pool is already running.
        if let Err(error) = builder().build_global() {
            tracing::debug!("device.threads = {threads} is not for threads that do not compute: {error}");
        }
    }
    let work = move || {
        #[cfg(feature = "libtorch")]
        if threads > 0 {
            tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
        }
        work()
    };
    match pool {
        Ok(pool) => pool.install(work),
        Err(error) => {
            tracing::warn!("no threads of its own for what computes, so it shares those of everything else: {error}");
            work()
        }
    }
}

/// The device that the recipe asks for, without autodiff, after it has computed something.
///
/// # Errors
/// The backend is built in but does not run here.
pub fn open(keys: &DeviceKeys) -> Result<Device> {
    // Backends panic when their hardware or driver is missing.
    let probe = || {
        let device = find(keys);
        Tensor::<1>::ones([2], &device).sum().into_data();
        device
    };
    std::panic::catch_unwind(probe).map_err(|_| {
        Error::Usage(format!("device.backend: {} {} does not work on this machine", keys.backend, keys.index))
    })
}

fn find(keys: &DeviceKeys) -> Device {
    #[allow(unused_variables, reason = "only some backends have more than one device")]
    let index = keys.index;
    match keys.backend.as_str() {
        #[cfg(feature = "libtorch")]
        "libtorch" => Device::libtorch(),
        #[cfg(feature = "libtorch")]
        "libtorch-cuda" => Device::libtorch_cuda(index),
        #[cfg(feature = "vulkan")]
        "vulkan" => Device::vulkan(kind(index)),
        #[cfg(feature = "metal")]
        "metal" => Device::metal(kind(index)),
        #[cfg(feature = "cuda")]
        "cuda" => Device::cuda(index),
        #[cfg(feature = "rocm")]
        "rocm" => Device::rocm(index),
        #[cfg(feature = "cpu")]
        "cpu" => Device::cpu(),
        // `available` has refused every other name.
        _ => Device::flex(),
    }
}

#[cfg(any(feature = "vulkan", feature = "metal"))]
fn kind(index: usize) -> burn::tensor::DeviceKind {
    match index {
        0 => burn::tensor::DeviceKind::default(),
        _ => burn::tensor::DeviceKind::DiscreteGpu(index),
    }
}
