//! Worker processes: how they start, how they end, and that none is left.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::error::{Error, Result};

/// What every worker of this launcher is told.
#[derive(Clone, Debug)]
pub struct Worker {
    /// Where the coordinator may be.
    pub join: Vec<String>,
    /// The launcher's recipe.
    pub recipe: String,
    /// Whether the launcher says how the run ended.
    pub quiet: bool,
    /// Whether connections are plain, also beyond loopback. Without it a worker finds the join secret as this process did.
    pub trusted_network: bool,
    /// How many steps are to be traced, if any.
    pub trace_steps: Option<u64>,
    /// Seconds in which the coordinator must answer.
    pub within_s: f64,
}

/// How a child ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Its process id.
    pub pid: u32,
    /// As in "was killed by SIGKILL".
    pub how: String,
    /// Its exit code, if it had one.
    pub code: Option<i32>,
}

/// Who wants to hear at once that a child has ended.
pub type Hears = Arc<dyn Fn(End) + Send + Sync>;

/// The worker processes of this launcher. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Children(Arc<Mutex<Vec<Running>>>);

#[derive(Debug)]
struct Running {
    child: Child,
    /// Since when it is stopped (SIGSTOP).
    stopped: Option<Instant>,
}

impl Children {
    /// Starts the worker of a rank, on its share of this process's cores: `(index, of)`. Whoever hears of its end does so on
    /// another thread and at once, unless a [`look`](Self::look) has seen it already.
    ///
    /// # Errors
    /// The system refuses the process.
    pub fn start(
        &self,
        worker: &Worker,
        rank: usize,
        cores: Option<(usize, usize)>,
        hears: Option<&Hears>,
    ) -> Result<()> {
        let program = std::env::current_exe().map_err(Error::io("find", "this program"))?;
        let mut command = Command::new(&program);
        command.args(["worker", "--supervised", "--rank", &rank.to_string()]);
        command.args(["--join-timeout-s", &worker.within_s.to_string()]);
        worker.join.iter().for_each(|address| _ = command.args(["--join", address]));
        command.args(worker.quiet.then_some("--quiet"));
        command.args(worker.trusted_network.then_some("--trusted-network"));
        if let Some(steps) = worker.trace_steps {
            command.args(["--trace", "--trace-steps", &steps.to_string()]);
        }
        // A terminal's Ctrl-C is the launcher's matter; the worker's end of the pipe tells it that the launcher lives.
        command.process_group(0).stdin(Stdio::piped());
        if rank > 0 {
            command.stdout(Stdio::null());
        }
        let spawn = move || {
            if let Some(cores) = cores {
                pin(cores);
            }
            command.spawn()
        };
        // A child inherits the cores of the thread that starts it, so that is a thread of its own.
        let spawned = std::thread::spawn(spawn).join().unwrap_or_else(|_| Err(std::io::ErrorKind::Other.into()));
        let child = spawned.map_err(Error::io("start", program))?;
        let pipe = child.stdin.as_ref().map(|pipe| pipe.as_fd().try_clone_to_owned());
        let pid = Pid::from_child(&child);
        self.lock().push(Running { child, stopped: None });
        if let Some(hears) = hears.cloned() {
            let family = self.clone();
            // Whoever is not there any more was seen by a look, or killed because nobody is to hear of it.
            let is_there = move |end: &End| family.pids().contains(&end.pid);
            let wait = move || end_of(pid).filter(is_there).into_iter().for_each(|end| hears(end));
            std::thread::Builder::new().name("child".into()).spawn(wait).map_err(Error::io("start", "a thread"))?;
        }
        if let Some(pipe) = pipe {
            let mut pipe = File::from(pipe.map_err(Error::io("open", "the pipe to a worker"))?);
            let recipe = worker.recipe.clone();
            // A child that does not read keeps this thread waiting, and nobody else.
            std::thread::spawn(move || {
                let length = recipe.len() as u64;
                // A child that is gone already is noticed when it is looked after.
                let _ = pipe.write_all(&length.to_le_bytes()).and_then(|()| pipe.write_all(recipe.as_bytes()));
            });
        }
        Ok(())
    }

    /// The children that have ended since the last look.
    pub fn look(&self) -> Vec<End> {
        let mut ends = Vec::new();
        self.lock().retain_mut(|running| match running.child.try_wait() {
            Ok(Some(status)) => {
                let (how, code) = how(status.code(), status.signal());
                ends.push(End { pid: running.child.id(), how, code });
                false
            }
            _ => {
                match stopped_or_continued(&running.child) {
                    Some(true) => _ = running.stopped.get_or_insert_with(Instant::now),
                    Some(false) => running.stopped = None,
                    None => {}
                }
                true
            }
        });
        ends
    }

    /// A child that has been stopped for longer than `limit`.
    #[must_use]
    pub fn stopped_for(&self, limit: Duration) -> Option<u32> {
        let list = self.lock();
        let long = |running: &&Running| running.stopped.is_some_and(|since| since.elapsed() > limit);
        list.iter().find(long).map(|running| running.child.id())
    }

    /// Asks all to stop in good order.
    pub fn terminate(&self) {
        for running in &*self.lock() {
            // It may have ended just now.
            let _ = kill_process(Pid::from_child(&running.child), Signal::TERM);
        }
    }

    /// The process ids of those that have not been seen to end.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        self.lock().iter().map(|running| running.child.id()).collect()
    }

    /// Waits for all to end, at most so long, and kills the rest.
    pub fn end(&self, within: Duration) {
        let until = Instant::now() + within;
        while !self.lock().is_empty() && Instant::now() < until {
            self.look();
            // Whoever is stopped will not end by itself.
            if self.lock().iter().all(|running| running.stopped.is_some()) {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.kill_all();
    }

    /// Kills all and waits until they are gone.
    pub fn kill_all(&self) {
        for mut running in self.lock().drain(..) {
            // It fails when the child has ended already.
            let _ = running.child.kill();
            let _ = running.child.wait();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Running>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for the end of a child, and leaves it to others to take it away; `None` if they have.
fn end_of(child: Pid) -> Option<End> {
    loop {
        return match waitid(WaitId::Pid(child), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
            Err(Errno::INTR) => continue,
            Err(_) | Ok(None) => None,
            Ok(Some(status)) => {
                let (how, code) = how(status.exit_status(), status.terminating_signal());
                Some(End { pid: child.as_raw_nonzero().get().cast_unsigned(), how, code })
            }
        };
    }
}

/// How a process ended, for people.
fn how(code: Option<i32>, signal: Option<i32>) -> (String, Option<i32>) {
    match (code, signal) {
        (Some(code), _) => (format!("ended with exit code {code}"), Some(code)),
        (None, Some(signal)) => (format!("was killed by {}", signal_name(signal)), None),
        (None, None) => ("ended".into(), None),
    }
}

fn signal_name(signal: i32) -> String {
    signal_hook::low_level::signal_name(signal).map_or_else(|| format!("signal {signal}"), str::to_owned)
}

/// Whether the child was stopped, or went on, since this was asked last; of several such changes the last. A system call
/// each, as this is asked ten times a second on a core that the model may be using; its end is for others to see.
fn stopped_or_continued(child: &Child) -> Option<bool> {
    let changes = WaitIdOptions::STOPPED | WaitIdOptions::CONTINUED | WaitIdOptions::NOHANG;
    let ask = || waitid(WaitId::Pid(Pid::from_child(child)), changes).ok().flatten();
    std::iter::from_fn(ask).last().map(|change| change.stopped())
}

/// Keeps this thread, and what it starts, to one part of the cores that it has.
fn pin((index, of): (usize, usize)) {
    let Ok(have) = sched_getaffinity(None) else { return };
    let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&core| have.is_set(core)).collect();
    let share = if cores.len() < of {
        cores.get(index % cores.len().max(1)..).map_or(&[][..], |rest| &rest[..1])
    } else {
        &cores[index * cores.len() / of..(index + 1) * cores.len() / of]
    };
    let mut set = CpuSet::new();
    share.iter().for_each(|&core| set.set(core));
    if let Err(error) = sched_setaffinity(None, &set) {
        tracing::warn!("rank {index} could not be kept to its cores: {error}");
    }
}
