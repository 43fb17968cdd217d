//! The command line of `tributary`, built in this package so that its tests can find it.

use std::process::ExitCode;

use tests::counting::{Counting, most};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() -> ExitCode {
    let faults = std::env::var("TRIBUTARY_FAULTS").unwrap_or_default();
    let code = match trainer::tamper::Tamper::parse(&faults) {
        Ok(tamper) => trainer::cli::main_with(tamper),
        Err(error) => panic!("TRIBUTARY_FAULTS: {error}"),
    };
    // Where a test wants to know it, the most memory of each process: a file of its command and its number.
    if let Some(folder) = std::env::var_os("TRIBUTARY_MEMORY") {
        let command = std::env::args().nth(1).unwrap_or_default();
        let file = std::path::Path::new(&folder).join(format!("{command}-{}", std::process::id()));
        std::fs::write(file, most().to_string()).expect("the test's folder");
    }
    code
}
