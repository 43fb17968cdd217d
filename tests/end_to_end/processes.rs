//! The processes of a run, as Linux shows them in `/proc`: found by the folder that they work in, watched, and ended.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{Place, Ran};

/// Longer than anything here takes on a busy machine: what is not there by then hangs.
pub const HANG: Duration = Duration::from_secs(120);

/// A process that was started in a folder, with its words in a file: nobody's pipe keeps anybody waiting.
pub struct Job {
    folder: PathBuf,
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Job {
    pub fn start(place: &Place, args: &[&str]) -> Self {
        Self::spawn(place, place.command(args))
    }

    pub fn spawn(place: &Place, mut command: Command) -> Self {
        let out = tempfile::Builder::new().prefix("said-").tempdir_in(place.path("")).expect("writable").keep();
        let (stdout, stderr) = (out.join("stdout"), out.join("stderr"));
        command.stdout(File::create(&stdout).expect("writable")).stderr(File::create(&stderr).expect("writable"));
        let child = command.spawn().expect("it starts");
        Self { folder: place.path(""), child, stdout, stderr }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.stderr).expect("readable")).into_owned()
    }

    /// Its worker of that rank, if there is one.
    pub fn worker(&self, rank: usize) -> Option<u32> {
        let all = processes(&self.folder).into_iter();
        let mut own = all.filter(|process| process.parent == self.pid() && process.rank() == Some(rank));
        own.next().map(|process| process.pid)
    }

    /// Waits for a condition; false when this process ended first.
    #[track_caller]
    pub fn wait(&mut self, what: &str, mut condition: impl FnMut(&Self) -> bool) -> bool {
        let until = Instant::now() + HANG;
        loop {
            if condition(self) {
                return true;
            }
            if self.child.try_wait().expect("our child").is_some() {
                return condition(self);
            }
            assert!(Instant::now() < until, "{what}: not after {HANG:?}\n{}", self.stderr());
            // The run should have the core; this decides nothing but how soon we look again.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for its end.
    #[track_caller]
    pub fn end(mut self) -> Ran {
        self.wait("the end", |_| false);
        let code = self.child.wait().expect("our child").code();
        let read = |path: &Path| String::from_utf8_lossy(&std::fs::read(path).expect("readable")).into_owned();
        Ran { code, stdout: read(&self.stdout), stderr: read(&self.stderr) }
    }
}

/// A living process.
#[derive(Debug)]
pub struct Process {
    pub pid: u32,
    parent: u32,
    args: Vec<String>,
}

impl Process {
    /// The rank that a worker was started as.
    pub fn rank(&self) -> Option<usize> {
        let at = self.args.iter().position(|arg| arg == "--rank")?;
        (self.args.get(1)? == "worker").then(|| self.args.get(at + 1)?.parse().ok()).flatten()
    }
}

/// Everybody who works in this folder. A process that is dead and was not waited for works nowhere.
pub fn processes(folder: &Path) -> Vec<Process> {
    let Ok(folder) = folder.canonicalize() else { return Vec::new() };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let here = pids.filter(|pid| std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == folder));
    let look = |pid| {
        let args = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let args = args.split(|&byte| byte == 0).map(|arg| String::from_utf8_lossy(arg).into_owned()).collect();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
        Some(Process { pid, parent, args })
    };
    here.filter_map(look).collect()
}

/// Whether anybody still works in this folder, or does so again and again until the hang is certain.
#[track_caller]
pub fn nobody_is_left(folder: &Path) {
    let until = Instant::now() + HANG;
    while let left = processes(folder)
        && !left.is_empty()
    {
        assert!(Instant::now() < until, "these are left: {left:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Sends a signal. The process may have ended already.
pub fn send(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// A port that somebody listens on, with the number of the socket, which nobody else will have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listening {
    pub port: u16,
    inode: u64,
}

/// All ports that are listened on.
pub fn listening() -> BTreeSet<Listening> {
    const LISTEN: &str = "0A";
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| std::fs::read_to_string(table).unwrap_or_default());
    let row = |row: &str| {
        let fields: Vec<&str> = row.split_whitespace().collect();
        let (_, port) = fields.get(1)?.rsplit_once(':')?;
        let is = Listening { port: u16::from_str_radix(port, 16).ok()?, inode: fields.get(9)?.parse().ok()? };
        (*fields.get(3)? == LISTEN).then_some(is)
    };
    tables.iter().flat_map(|table| table.lines().skip(1).filter_map(row)).collect()
}

/// The ports that a process listens on.
pub fn ports(pid: u32) -> BTreeSet<Listening> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let inode = |entry: std::fs::DirEntry| {
        let target = std::fs::read_link(entry.path()).ok()?;
        target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok()
    };
    let own: BTreeSet<u64> = entries.filter_map(inode).collect();
    listening().into_iter().filter(|listening| own.contains(&listening.inode)).collect()
}
