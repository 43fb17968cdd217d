//! The command line of `tributary`, built in this package so that its tests can find it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tests::counting::{Counting, most, now};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Between two looks at what is allocated.
const LOOK: Duration = Duration::from_millis(20);
/// What is told of it is a multiple of this.
const GRAIN: usize = 16 << 10;

fn main() -> ExitCode {
    let faults = std::env::var("TRIBUTARY_FAULTS").unwrap_or_default();
    let folder = std::env::var_os("TRIBUTARY_MEMORY").map(PathBuf::from);
    let looks = folder.is_some().then(look);
    let code = match trainer::tamper::Tamper::parse(&faults) {
        Ok(tamper) => trainer::cli::main_with(tamper),
        Err(error) => panic!("TRIBUTARY_FAULTS: {error}"),
    };
    // Where a test wants to know it: the most memory of each process, and what it had for the longest time. A file of its
    // command and its number.
    if let (Some(folder), Some(looks)) = (folder, looks) {
        let name = format!("{}-{}", std::env::args().nth(1).unwrap_or_default(), std::process::id());
        let longest = looks.lock().expect("no panic").iter().max_by_key(|(_, looks)| **looks).map_or(0, |(at, _)| *at);
        let write =
            |name, bytes: usize| std::fs::write(folder.join(name), bytes.to_string()).expect("the test's folder");
        write(format!("longest-{name}"), longest);
        write(name, most());
    }
    code
}

/// How often so much was allocated when somebody looked.
fn look() -> Arc<Mutex<BTreeMap<usize, usize>>> {
    let looks: Arc<Mutex<BTreeMap<usize, usize>>> = Arc::default();
    let seen = Arc::clone(&looks);
    std::thread::spawn(move || {
        loop {
            *seen.lock().expect("no panic").entry(now() / GRAIN * GRAIN).or_default() += 1;
            std::thread::sleep(LOOK);
        }
    });
    looks
}
