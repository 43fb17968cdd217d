//! The binary `tributary`; everything is in the library, so that tests run the very same command line.

use std::process::ExitCode;

/// Blocks of many megabytes come and go with every step: this allocator keeps them.
#[global_allocator]
static ALLOCATOR: trainer::allocator::MiMalloc = trainer::allocator::MiMalloc;

fn main() -> ExitCode {
    trainer::cli::main()
}
