//! The command line of `tributary`, built in this package so that its tests can find it.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: trainer::allocator::MiMalloc = trainer::allocator::MiMalloc;

fn main() -> ExitCode {
    trainer::cli::main()
}
