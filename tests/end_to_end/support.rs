//! A small text, a small recipe, and a way to run the command line.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// The recipe of most tests: it takes a second.
pub const RECIPE: &str = r#"
[model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2

[tokenizer]
vocab_size = 300

[data]
source = "text"
train = ["TEXT/train.txt"]
cache_dir = "TEXT/cache"

[train]
steps = 60
seq_len = 48
micro_batch_size = 2
micro_batches = 2

[eval]
files = ["TEXT/held_out.txt"]
every = 20
windows = 4

[schedule]
learning_rate = 1e-2
warmup_steps = 5

[checkpoint]
every = 8

[export]
prompt = "fn f"
sample_tokens = 8
"#;

/// Text and cache, made once for all tests of this process.
pub fn text() -> &'static Path {
    static TEXT: OnceLock<TempDir> = OnceLock::new();
    let folder = TEXT.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let lines = |from: usize, to: usize| -> String {
            (from..to).map(|i| format!("fn f{}(x: u32) -> u32 {{ x * {} + {} }}\n", i % 89, i % 7, i % 13)).collect()
        };
        std::fs::write(folder.path().join("train.txt"), lines(0, 3000)).expect("writable");
        std::fs::write(folder.path().join("held_out.txt"), lines(3000, 3300)).expect("writable");
        folder
    });
    folder.path()
}

/// A folder with a recipe in it, and the runs that it makes.
pub struct Place {
    folder: TempDir,
}

impl Place {
    pub fn new() -> Self {
        Self::with(RECIPE)
    }

    pub fn with(recipe: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let recipe = recipe.replace("TEXT", &text().display().to_string());
        std::fs::write(folder.path().join("small.toml"), recipe).expect("writable");
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn command(&self, args: &[&str]) -> Command {
        command(self.folder.path(), args)
    }

    /// Runs to the end.
    pub fn run(&self, args: &[&str]) -> Ran {
        Ran::from(self.command(args).output().expect("it starts"))
    }

    pub fn train(&self, name: &str, more: &[&str]) -> Ran {
        self.run(&[&["train", "small.toml", "--name", name], more].concat())
    }

    /// Trains with faults put into the run, as `trainer/src/tamper.rs` reads them.
    pub fn train_with(&self, faults: &str, name: &str, more: &[&str]) -> Ran {
        let args = [&["train", "small.toml", "--name", name], more].concat();
        Ran::from(self.command(&args).env("TRIBUTARY_FAULTS", faults).output().expect("it starts"))
    }

    /// Starts and does not wait.
    pub fn start(&self, name: &str, more: &[&str]) -> Child {
        let args = [&["train", "small.toml", "--name", name], more].concat();
        self.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts")
    }

    /// What is in a file up to its last end of a line: a run that goes on may be writing the next.
    fn whole_lines(&self, file: &str) -> String {
        let mut text = std::fs::read_to_string(self.path(file)).unwrap_or_default();
        text.truncate(text.rfind('\n').map_or(0, |end| end + 1));
        text
    }

    pub fn summary(&self, run: &str) -> Value {
        let text = std::fs::read(self.path(&format!("runs/{run}/run.json"))).expect("run.json");
        serde_json::from_slice(&text).expect("JSON")
    }

    /// `(step, loss, eval_loss, grad_norm)` of every line, as they are written.
    pub fn curve(&self, run: &str) -> Vec<[String; 4]> {
        let text = self.whole_lines(&format!("runs/{run}/metrics.jsonl"));
        let line = |line: &str| {
            let value: Value = serde_json::from_str(line).expect("JSON");
            ["step", "loss", "eval_loss", "grad_norm"].map(|key| value[key].to_string())
        };
        text.lines().map(line).collect()
    }

    /// The lines of its metrics.
    pub fn metrics(&self, run: &str) -> Vec<Value> {
        let text = self.whole_lines(&format!("runs/{run}/metrics.jsonl"));
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    pub fn events(&self, run: &str) -> Vec<Value> {
        let text = self.whole_lines(&format!("runs/{run}/events.jsonl"));
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    pub fn lines(&self, run: &str) -> usize {
        let text = self.whole_lines(&format!("runs/{run}/metrics.jsonl"));
        text.lines().count()
    }

    /// Names in a folder of the run.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(folder)).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

impl Drop for Place {
    /// A test that failed leaves no process behind either.
    fn drop(&mut self) {
        crate::processes::processes(self.folder.path())
            .iter()
            .for_each(|left| crate::processes::send(left.pid, Signal::KILL));
    }
}

/// The command line in a folder.
pub fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tributary-under-test"));
    command.args(args).current_dir(folder);
    for name in ["TRIBUTARY_LOG", "TRIBUTARY_JOIN_SECRET", "TRIBUTARY_JOIN_SECRET_FILE"] {
        command.env_remove(name);
    }
    command
}

/// What a process left behind.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

impl Ran {
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{}\n{}", self.stdout, self.stderr);
        self
    }

    /// Ended with this code, and said all of this on stderr, without a panic.
    #[track_caller]
    pub fn failed(self, code: i32, said: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{}\n{}", self.stdout, self.stderr);
        for text in said {
            assert!(self.stderr.contains(text), "expected {text:?} in:\n{}", self.stderr);
        }
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }
}

/// Waits for a condition that a process brings about; false when the process ended first.
pub fn wait_until(child: &mut Child, condition: impl Fn() -> bool) -> bool {
    loop {
        if condition() {
            return true;
        }
        if child.try_wait().expect("our child").is_some() {
            return condition();
        }
        // The child should have the core; this decides nothing but how soon we look again.
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Sends a signal and waits for the end.
pub fn end(child: Child, signal: Signal) -> Ran {
    let pid = Pid::from_child(&child);
    // The process may have ended already; its exit code tells.
    let _ = kill_process(pid, signal);
    Ran::from(child.wait_with_output().expect("our child"))
}
