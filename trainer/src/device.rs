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

/// Sets the number of threads that compute. Must be called before anything computes; 0 leaves the choice to the
/// backend, which takes every core.
pub fn set_threads(threads: usize) {
    if threads == 0 {
        return;
    }
    // It fails only when the pool is already running, which leaves the number of threads as it was.
    if let Err(error) = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global() {
        tracing::warn!("device.threads = {threads} has no effect: {error}");
    }
    #[cfg(feature = "libtorch")]
    {
        let threads = i32::try_from(threads).unwrap_or(i32::MAX);
        tch::set_num_threads(threads);
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
