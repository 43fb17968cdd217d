//! Bad input gets a clear error, the exit code that belongs to it, and leaves nothing half-made.

use std::process::Command;

use crate::support::{Place, RECIPE, Ran, text};

#[test]
fn five_faults_in_a_recipe_are_named_at_once_with_their_lines() {
    let recipe = r#"[model]
hidden_size = 32
intermediate_size = 64
num_hiden_layers = 2
num_attention_heads = 5
[tokenizer]
vocab_size = "many"
[data]
source = "texts"
train = ["a"]
[train]
steps = 0
seq_len = 8
micro_batch_size = 1
[shedule]
learning_rate = 1e-3
"#;
    let place = Place::with(recipe);
    let said = [
        "small.toml:4: model.num_hiden_layers: no such key",
        "did you mean model.num_hidden_layers?",
        "small.toml:5: model.num_attention_heads: expected an even number of elements a head",
        "small.toml:7: tokenizer.vocab_size: expected an integer from 257 to 16777216, found \"many\"",
        "small.toml:9: data.source: expected one of crates, text, jsonl, found \"texts\"",
        "did you mean text?",
        "small.toml:12: train.steps: expected an integer from 1 to 2147483648, found 0",
        "small.toml:15: [shedule]: no such section",
        "did you mean schedule?",
        "schedule.learning_rate: missing",
    ];
    place.train("a", &[]).failed(2, &said);
    assert!(!place.path("runs").exists());
}

#[test]
fn a_recipe_that_is_no_toml_and_one_that_is_not_there() {
    let place = Place::with("[model\nhidden_size = 3");
    place.train("a", &[]).failed(2, &["small.toml:1: not valid TOML"]);
    place.run(&["train", "missing.toml"]).failed(2, &["missing.toml: expected a recipe"]);
    place.run(&["trian"]).failed(2, &["train"]);
}

#[test]
fn a_missing_text_a_changed_text_and_a_missing_crate() {
    let place = Place::new();
    let said = ["data.train: expected files, there is none of this name: no.txt, nor.txt"];
    place.train("a", &["--set", "data.train=['no.txt', 'nor.txt']"]).failed(1, &said);
    let zeros = format!("data.blake3={}", "0".repeat(64));
    place.train("a", &["--set", &zeros]).failed(1, &["the recipe's data.blake3 expects 0000", "restore it"]);
    let crates = ["--set", "data.source=crates", "--set", "data.train=['none@9.9.9']", "--set", "eval.files=[]"];
    place.train("a", &[&crates[..], &["--set", &zeros]].concat()).failed(1, &["none@9.9.9", "cargo fetch --locked"]);
    assert!(!place.path("runs/a").exists());
}

#[test]
fn a_run_folder_that_cannot_be_written() {
    let place = Place::new();
    std::fs::write(place.path("file"), "").expect("writable");
    place
        .train("a", &["--set", "metrics.runs_dir=file/runs"])
        .failed(1, &["metrics.runs_dir: could not create file/runs", "name a folder that can be made"]);
    let said = ["data.cache_dir: could not create file/cache"];
    place.train("a", &["--set", "data.cache_dir=file/cache"]).failed(1, &said);
    assert!(!place.path("runs/a").exists());
}

#[test]
fn a_run_name_that_exists_and_a_resume_of_another_folder() {
    let place = Place::new();
    place.train("a", &["--set", "train.stop_at_step=1"]).ok();
    let before = place.curve("a");
    place.train("a", &[]).failed(2, &["runs/a exists", "--resume", "--name OTHER"]);
    assert_eq!(place.curve("a"), before);
    std::fs::create_dir_all(place.path("runs/mine")).expect("writable");
    std::fs::write(place.path("runs/mine/diary"), "").expect("writable");
    place.train("mine", &["--resume"]).failed(2, &["runs/mine has no recipe.toml"]);
    assert_eq!(place.names("runs/mine"), ["diary"]);
    let said = ["train.steps: expected at least 5, the step of its newest checkpoint, found 3"];
    place.train("b", &["--set", "train.stop_at_step=5"]).ok();
    place.train("b", &["--resume", "--set", "train.steps=3", "--set", "schedule.warmup_steps=0"]).failed(2, &said);
    place.train("../b", &[]).failed(2, &["--name: expected letters"]);
}

#[test]
fn a_device_that_this_build_lacks() {
    let place = Place::new();
    let said = ["device.backend: this build has no rocm: build with `--features rocm`"];
    place.train("a", &["--set", "device.backend=rocm"]).failed(2, &said);
    place.run(&["generate", ".", "--prompt", "a", "--backend", "rocm"]).failed(2, &["--features rocm"]);
}

#[test]
fn a_damaged_cache_is_made_anew_and_said_so() {
    let cache = tempfile::tempdir().expect("a folder");
    let set = format!("data.cache_dir={}", cache.path().display());
    let place = Place::new();
    place.train("a", &["--set", &set]).ok();
    for entry in std::fs::read_dir(cache.path()).expect("a folder").flatten() {
        if entry.path().extension().is_none() {
            let mut bytes = std::fs::read(entry.path()).expect("readable");
            bytes.truncate(bytes.len() / 2);
            std::fs::write(entry.path(), bytes).expect("writable");
        }
    }
    let ran = place.train("b", &["--set", &set]).ok();
    for kind in ["tokenizer", "tokens", "zstd"] {
        assert!(ran.stderr.contains(&format!("the cached {kind} ")), "{}", ran.stderr);
    }
    assert!(ran.stderr.contains("is damaged: it is made anew"), "{}", ran.stderr);
    assert_eq!(place.summary("a")["parameter_hash"], place.summary("b")["parameter_hash"]);
    let third = place.train("c", &["--set", &set]).ok();
    assert!(!third.stderr.contains("made anew"), "{}", third.stderr);
}

#[test]
fn a_full_disk_while_training_costs_the_checkpoint_and_nothing_else() {
    let place = Place::new();
    place.train("whole", &[]).ok();
    // No file may grow beyond 64 KiB (in blocks of 512 bytes): metrics fit, checkpoints do not.
    let limited = |run: &str, more: &str| {
        let script = format!(
            "ulimit -f 128; exec {} train small.toml --name {run} {more}",
            env!("CARGO_BIN_EXE_tributary-under-test")
        );
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]).current_dir(place.path("")).env_remove("TRIBUTARY_LOG");
        Ran::from(shell.output().expect("a shell"))
    };
    let ran = limited("a", "");
    ran.failed(1, &["the checkpoint of step 8 was not written", "training goes on", "error: "]);
    assert_eq!(place.curve("a").len(), 60, "every step was taken");
    assert_eq!(place.summary("a")["status"], "failed");
    assert_eq!(place.names("runs/a/checkpoints"), [] as [&str; 0], "nothing half-made");
    assert!(place.events("a").iter().any(|event| event["event"] == "checkpoint_failed"));

    // There is room again: the run goes on from what it has, which is its beginning.
    place.train("a", &["--resume"]).ok();
    assert_eq!(place.summary("a")["parameter_hash"], place.summary("whole")["parameter_hash"]);

    // With a checkpoint before the disk fills, the run goes on from that one.
    place.train("b", &["--set", "train.stop_at_step=16"]).ok();
    limited("b", "--resume").failed(1, &["step 16's is kept"]);
    assert_eq!(place.names("runs/b/checkpoints").last().map(String::as_str), Some("step-00000016"));
    place.train("b", &["--resume"]).ok();
    assert_eq!(place.summary("b")["parameter_hash"], place.summary("whole")["parameter_hash"]);
}

#[test]
fn a_resume_with_changed_fixed_keys_names_each() {
    let place = Place::new();
    place.train("a", &["--set", "train.stop_at_step=9"]).ok();
    let said = ["train.seed: the run has 1, the recipe says 2", "train.seq_len: the run has 48, the recipe says 24"];
    place.train("a", &["--resume", "--set", "train.seed=2", "--set", "train.seq_len=24"]).failed(2, &said);
    place.train("a", &["--resume"]).ok();
}

#[test]
fn an_export_without_a_checkpoint_and_one_over_an_existing_folder() {
    let place = Place::new();
    place.train("a", &["--set", "train.stop_at_step=2"]).ok();
    std::fs::remove_dir_all(place.path("runs/a/checkpoints")).expect("ours");
    place.run(&["export", "a", "--out", "out"]).failed(2, &["it has no checkpoint yet"]);
    place.run(&["export", "nothing", "--out", "out"]).failed(2, &["there is no such folder"]);
    assert!(!place.path("out").exists());
    place.train("b", &["--set", "train.stop_at_step=2"]).ok();
    std::fs::create_dir(place.path("taken")).expect("writable");
    std::fs::write(place.path("taken/mine"), "").expect("writable");
    place.run(&["export", "b", "--out", "taken"]).failed(1, &["taken"]);
    assert_eq!(place.names("taken"), ["mine"]);
}

#[test]
fn a_prompt_with_characters_that_the_tokenizer_lacks() {
    let place = Place::new();
    place.train("a", &[]).ok();
    // Byte-level: nothing is unknown.
    place.run(&["generate", "runs/a/export", "--prompt", "żółć 🦀", "--max-tokens", "2"]).ok();
    // A tokenizer without bytes: the letters that it has, and no others.
    let export = place.path("runs/a/export");
    let vocab: Vec<String> = (0..300).map(|i| format!("\"t{i}\": {i}")).collect();
    let vocab = vocab.join(", ").replace("\"t1\"", "\"f\"").replace("\"t0\"", "\"<|endoftext|>\"");
    let json = format!(
        r#"{{"version":"1.0","added_tokens":[{{"id":0,"content":"<|endoftext|>","single_word":false,"lstrip":false,
        "rstrip":false,"normalized":false,"special":true}}],"model":{{"type":"BPE","vocab":{{{vocab}}},"merges":[]}}}}"#
    );
    std::fs::write(export.join("tokenizer.json"), json).expect("writable");
    place.run(&["generate", "runs/a/export", "--prompt", "f", "--max-tokens", "2"]).ok();
    let said = ["no token for '🦀' (character 2)", "byte-level"];
    place.run(&["generate", "runs/a/export", "--prompt", "f🦀", "--max-tokens", "2"]).failed(2, &said);
    place.run(&["generate", "runs", "--prompt", "f"]).failed(2, &["expected an exported folder"]);
}

#[test]
fn an_export_prompt_that_is_too_long_is_refused_before_the_run_starts() {
    let place = Place::new();
    let prompt = format!("export.prompt={}", "x ".repeat(60));
    place.train("a", &["--set", &prompt]).failed(2, &["export.prompt: expected at most 47 tokens", "found "]);
    assert!(!place.path("runs/a").exists());
    // Text that spells the end of a text is text.
    let ran = place.train("b", &["--set", "export.prompt=a<|endoftext|>b", "--set", "train.steps=9"]).ok();
    assert!(ran.stdout.contains("---\na<|endoftext|>b"), "{}", ran.stdout);
}

#[test]
fn a_stderr_that_is_full_and_a_stdout_that_is_closed_cost_the_run_nothing() {
    let place = Place::new();
    let full = std::fs::File::options().write(true).open("/dev/full").expect("Linux");
    let status = place.command(&["train", "small.toml", "--name", "a"]).stderr(full).status().expect("it starts");
    assert!(status.success());
    assert_eq!(place.summary("a")["status"], "done");
    let mut child = place.start("b", &[]);
    drop(child.stdout.take());
    assert!(child.wait_with_output().expect("our child").status.success());
    assert_eq!(place.summary("b")["status"], "done");
}

#[test]
fn an_export_whose_files_belong_to_different_models_is_refused() {
    let place = Place::new();
    place.train("a", &[]).ok();
    let config = place.path("runs/a/export/config.json");
    let text = std::fs::read_to_string(&config).expect("readable");
    for (from, to, said) in [
        ("\"vocab_size\": 300", "\"vocab_size\": 299", "a tokenizer of 300 tokens and a model of 299"),
        ("\"vocab_size\": 300", "\"vocab_size\": 99999999999", "expected [99999999999, 32], found [300, 32]"),
        // Nothing is as long as that.
        (
            "_layers\": 2",
            "_layers\": 1000000000000000000",
            "config.json: expected num_hidden_layers of at most 20, the",
        ),
        ("\"hidden_size\": 32", "\"hidden_size\": 64", "expected heads of hidden_size / num_attention_heads"),
    ] {
        std::fs::write(&config, text.replace(from, to)).expect("writable");
        let ran = place.run(&["generate", "runs/a/export", "--prompt", "fn"]);
        assert!(ran.code == Some(1) || ran.code == Some(2), "{ran:?}");
        assert!(ran.stderr.contains(said) && !ran.stderr.contains("panicked"), "{}", ran.stderr);
    }
}

#[test]
fn weights_that_do_not_fit_are_listed_one_by_one() {
    let place = Place::new();
    place.train("a", &[]).ok();
    let recipe = RECIPE.replace("[tokenizer]\nvocab_size = 300\n", "").replace("TEXT", &text().display().to_string());
    std::fs::write(place.path("small.toml"), recipe.replace("hidden_size = 32", "hidden_size = 48\nfrom = 'a'"))
        .expect("writable");
    let said = [
        "model.embed_tokens.weight: expected [300, 48], found [300, 32]",
        "model.layers.1.mlp.down_proj.weight: expected [48, 64], found [32, 64]",
        "model.norm.weight: expected [48], found [32]",
    ];
    place.train("b", &[]).failed(2, &said);
}

#[test]
fn a_resume_over_another_text_or_another_tokenizer_is_refused() {
    let place = Place::new();
    std::fs::copy(text().join("train.txt"), place.path("mine.txt")).expect("writable");
    let mine = ["--set", "data.train=['mine.txt']"];
    place.train("a", &[&mine[..], &["--set", "train.stop_at_step=9"]].concat()).ok();
    let mut changed = std::fs::read(place.path("mine.txt")).expect("readable");
    changed.truncate(100_000);
    std::fs::write(place.path("mine.txt"), changed).expect("writable");
    let said = ["--resume cannot change what the run reads", "the text of [data] and [eval]", "restore it"];
    place.train("a", &[&mine[..], &["--resume"]].concat()).failed(2, &said);
    std::fs::copy(text().join("train.txt"), place.path("mine.txt")).expect("writable");
    place.train("a", &[&mine[..], &["--resume"]].concat()).ok();
}
