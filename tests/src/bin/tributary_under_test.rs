//! The command line of `tributary`, built in this package so that its tests can find it.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: trainer::allocator::MiMalloc = trainer::allocator::MiMalloc;

fn main() -> ExitCode {
    let faults = std::env::var("TRIBUTARY_FAULTS").unwrap_or_default();
    match trainer::tamper::Tamper::parse(&faults) {
        Ok(tamper) => trainer::cli::main_with(tamper),
        Err(error) => panic!("TRIBUTARY_FAULTS: {error}"),
    }
}
