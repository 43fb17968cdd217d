//! What the build makes of `proto/control.proto`, and the service of the data plane.

#![allow(missing_docs, clippy::all, clippy::pedantic, unused_qualifications, reason = "generated code")]

/// The control plane.
pub mod control {
    tonic::include_proto!("tributary.control.v1");
}
