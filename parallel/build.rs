//! Compiles the .proto files, and the service of the data plane, whose messages are plain bytes.

use tonic_build::manual::{Builder, Method, Service};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/control.proto");
    let files = protox::compile(["control.proto"], ["proto"])?;
    tonic_prost_build::configure().build_transport(false).compile_fds(files)?;
    let stream = Method::builder()
        .name("stream")
        .route_name("Stream")
        .input_type("bytes::Bytes")
        .output_type("bytes::Bytes")
        .codec_path("crate::transport::raw::RawCodec")
        .client_streaming()
        .build();
    let data = Service::builder().name("Data").package("tributary.data.v1").method(stream).build();
    Builder::new().build_transport(false).compile(&[data]);
    Ok(())
}
