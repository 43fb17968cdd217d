//! What docs/ gives to Kubernetes and Slurm does what it says, as far as one machine can show it: the command of the
//! manifest and the batch script train two ranks, and go on after one of them was lost. Linux.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::dying::{RANKS, outcome, undisturbed};
use crate::joining::free_port;
use crate::processes::{Job, nobody_is_left};
use crate::support::{Place, Ran};

/// A folder with a recipe, a secret, and programs that stand in for those of a cluster.
struct Cluster {
    place: Place,
}

impl Cluster {
    fn new() -> Self {
        let place = Place::with(RANKS);
        std::fs::write(place.path("secret"), "a secret for all ranks of a test\n").expect("writable");
        std::fs::create_dir(place.path("bin")).expect("writable");
        let tributary = env!("CARGO_BIN_EXE_tributary-under-test");
        std::os::unix::fs::symlink(tributary, place.path("bin/tributary")).expect("writable");
        Self { place }
    }

    /// A program of the cluster.
    fn program(&self, name: &str, script: &str) {
        use std::os::unix::fs::PermissionsExt as _;
        let path = self.place.path(&format!("bin/{name}"));
        std::fs::write(&path, format!("#!/usr/bin/env bash\nset -eu\n{script}")).expect("writable");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("ours");
    }

    /// A shell in the folder, with those programs.
    fn shell(&self, shell: &str, args: &[&str]) -> Command {
        let mut command = Command::new(shell);
        let path = std::env::var("PATH").expect("a PATH");
        command.args(args).current_dir(self.place.path(""));
        command.env("PATH", format!("{}:{path}", self.place.path("bin").display()));
        command.env_remove("TRIBUTARY_JOIN_SECRET");
        command
    }
}

fn docs(file: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs")).join(file)
}

/// What the manifest says of its one container.
struct Container {
    script: String,
    env: Vec<(String, String)>,
}

/// Reads as much of YAML as the manifest uses: the block of `args`, and the names and values of `env`.
fn container() -> Container {
    let text = std::fs::read_to_string(docs("kubernetes/job.yaml")).expect("it is there");
    let below = |key: &str| {
        let (_, rest) = text.split_once(&format!("\n          {key}:\n")).expect(key);
        let deeper = rest.lines().take_while(|line| line.starts_with("            "));
        deeper.map(|line| line[12..].to_owned()).collect::<Vec<String>>()
    };
    let args = below("args");
    assert_eq!(args[0], "- |");
    let script: Vec<&str> = args[1..].iter().map(|line| line.trim_start_matches("  ")).collect();
    let env = below("env");
    let pair = |pair: &[String]| {
        let [name, value] = pair else { panic!("expected a name and a value, found {pair:?}") };
        let name = name.strip_prefix("- name: ").expect("a name");
        let value = value.strip_prefix("  value: ").expect("a value");
        (name.to_owned(), value.trim_matches('"').to_owned())
    };
    Container { script: script.join("\n"), env: env.chunks(2).map(pair).collect() }
}

#[test]
fn the_variables_of_the_manifest_and_of_the_batch_script_are_read() {
    let cli = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../trainer/src"));
    let read = |file: &str| std::fs::read_to_string(cli.join(file)).expect("it is there");
    let source = format!("{}{}", read("cli.rs"), read("cli/secret.rs"));
    let Container { script, env } = container();
    let batch = std::fs::read_to_string(docs("slurm/train.sbatch")).expect("it is there");
    let exported = |text: &str| {
        let lines = text.lines().filter_map(|line| line.trim().strip_prefix("export ").map(str::to_owned));
        lines.map(|line| line.split('=').next().expect("a name").to_owned()).collect::<Vec<String>>()
    };
    let mut names: Vec<String> = env.into_iter().map(|(name, _)| name).collect();
    names.extend(exported(&script));
    assert_eq!(names, ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TRIBUTARY_JOIN_SECRET_FILE", "RANK"]);
    let exported = exported(&batch);
    assert_eq!(exported, ["TRIBUTARY_JOIN_SECRET_FILE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]);
    for name in names.iter().chain(&exported) {
        assert!(source.contains(&format!("\"{name}\"")), "{name} is read nowhere");
    }
    // The control.
    assert!(!source.contains("\"NODE_RANK\""));
}

/// The manifest's command as each of its pods runs it.
fn pods(cluster: &Cluster, faults: &str) -> Vec<Ran> {
    let Container { script, env } = container();
    let script = script.replace("/recipe/recipe.toml", "small.toml");
    let port = free_port();
    let start = |index: usize| {
        let mut command = cluster.shell("/bin/sh", &["-ec", &script]);
        command.envs(env.iter().map(|(name, value)| (name, value))).env("JOB_COMPLETION_INDEX", index.to_string());
        command.env("MASTER_ADDR", "localhost").env("MASTER_PORT", &port).env("TRIBUTARY_FAULTS", faults);
        command.env("TRIBUTARY_JOIN_SECRET_FILE", cluster.place.path("secret"));
        Job::spawn(&cluster.place, command)
    };
    let pods: Vec<Job> = (0..2).map(start).collect();
    let rans = pods.into_iter().map(Job::end).collect();
    nobody_is_left(&cluster.place.path(""));
    rans
}

#[test]
fn the_manifests_command_trains_and_goes_on_after_a_rank_was_lost() {
    let cluster = Cluster::new();
    let [zero, one] = <[Ran; 2]>::try_from(pods(&cluster, "die:1:30")).expect("two pods");
    zero.failed(75, &["error: rank 1 (host "]);
    one.failed(75, &["was killed by SIGABRT"]);
    for ran in pods(&cluster, "") {
        ran.ok();
    }
    assert_eq!(outcome(&cluster.place, "train"), undisturbed(2));
    assert!(cluster.place.events("train").iter().any(|event| event["event"] == "resumed"), "it went on");
}

/// The batch script as Slurm runs it on two nodes.
fn batch(cluster: &Cluster, recipe: &str, faults: &str, restarts: &str) -> Ran {
    // Tasks side by side, and the largest exit code of all.
    cluster.program(
        "srun",
        "[ \"$1\" = --kill-on-bad-exit=0 ]; shift\n\
         pids=(); code=0\n\
         for task in 0 1; do SLURM_PROCID=$task \"$@\" & pids+=($!); done\n\
         for pid in \"${pids[@]}\"; do own=0; wait \"$pid\" || own=$?; ((own <= code)) || code=$own; done\n\
         exit $code\n",
    );
    cluster.program(
        "scontrol",
        "case \"$*\" in\n\
         'show hostnames one,two') printf 'localhost\\ntwo\\n' ;;\n\
         'requeue 4711') echo requeued >> requeues ;;\n\
         *) echo \"scontrol $*\"; exit 1 ;;\n\
         esac\n",
    );
    let script = docs("slurm/train.sbatch").display().to_string();
    let mut command = cluster.shell("bash", &[&script, recipe]);
    command.envs([("SLURM_JOB_ID", "4711"), ("SLURM_NTASKS", "2"), ("SLURM_JOB_NODELIST", "one,two")]);
    command.env("SLURM_RESTART_COUNT", restarts).env("MASTER_PORT", free_port()).env("TRIBUTARY_FAULTS", faults);
    command.env("TRIBUTARY_JOIN_SECRET_FILE", cluster.place.path("secret"));
    let ran = Job::spawn(&cluster.place, command).end();
    nobody_is_left(&cluster.place.path(""));
    ran
}

#[test]
fn the_batch_script_trains_and_is_queued_again_when_that_helps() {
    let cluster = Cluster::new();
    let requeues = || std::fs::read_to_string(cluster.place.path("requeues")).unwrap_or_default().lines().count();
    batch(&cluster, "nothing.toml", "", "0").failed(2, &["nothing.toml: expected a recipe"]);
    assert_eq!(requeues(), 0, "that would come to the same");
    batch(&cluster, "small.toml", "die:1:30", "0").failed(75, &["rank 1 (host "]);
    assert_eq!(requeues(), 1);
    batch(&cluster, "small.toml", "die:1:40", "10").failed(75, &["rank 1 (host "]);
    assert_eq!(requeues(), 1, "often enough");
    batch(&cluster, "small.toml", "", "1").ok();
    assert_eq!(requeues(), 1);
    assert_eq!(outcome(&cluster.place, "job-4711"), undisturbed(2));
}
