//! `tributary plan` says what runs take.

use std::path::Path;
use std::sync::OnceLock;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{Place, Ran};

/// Tokens are made once for all recipes with the same vocabulary.
fn cache() -> &'static Path {
    static CACHE: OnceLock<TempDir> = OnceLock::new();
    CACHE.get_or_init(|| tempfile::tempdir().expect("a folder")).path()
}

/// One recipe of the comparison.
struct Case {
    name: &'static str,
    model: &'static str,
    vocabulary: usize,
    train: &'static str,
    parallel: &'static str,
    compression: &'static str,
}

const CASES: [Case; 10] = [
    Case {
        name: "the quickstart's shape, two ranks",
        model: "hidden_size = 256\nintermediate_size = 688\nnum_hidden_layers = 4\nnum_attention_heads = 4\n\
                num_key_value_heads = 2",
        vocabulary: 2048,
        train: "seq_len = 256\nmicro_batch_size = 2",
        parallel: "data = 2",
        compression: "codec = \"int8\"",
    },
    Case {
        name: "long sequences and many heads",
        model: "hidden_size = 128\nintermediate_size = 352\nnum_hidden_layers = 2\nnum_attention_heads = 8\n\
                num_key_value_heads = 2\ntie_word_embeddings = false",
        vocabulary: 600,
        train: "seq_len = 512\nmicro_batch_size = 2",
        parallel: "",
        compression: "",
    },
    Case {
        name: "a wide feed-forward layer, two micro-batches",
        model: "hidden_size = 256\nintermediate_size = 3000\nnum_hidden_layers = 2\nnum_attention_heads = 4",
        vocabulary: 600,
        train: "seq_len = 128\nmicro_batch_size = 4\nmicro_batches = 2",
        parallel: "",
        compression: "",
    },
    Case {
        name: "the two hosts' shape with fewer layers, in a sparse codec",
        model: "hidden_size = 512\nintermediate_size = 1376\nnum_hidden_layers = 3\nnum_attention_heads = 8\n\
                tie_word_embeddings = false",
        vocabulary: 2048,
        train: "seq_len = 256\nmicro_batch_size = 2",
        parallel: "data = 2",
        compression: "codec = \"sparse24-int8\"\nwarmup_steps = 0",
    },
    Case {
        name: "two machines of two ranks and a large vocabulary",
        model: "hidden_size = 256\nintermediate_size = 512\nnum_hidden_layers = 1\nnum_attention_heads = 4",
        vocabulary: 4000,
        train: "seq_len = 64\nmicro_batch_size = 1",
        parallel: "data = 4\ngroup = 2",
        compression: "codec = \"int8\"",
    },
    Case {
        name: "two ranks that hold one model together",
        model: "hidden_size = 256\nintermediate_size = 688\nnum_hidden_layers = 3\nnum_attention_heads = 4",
        vocabulary: 2048,
        train: "seq_len = 256\nmicro_batch_size = 2",
        parallel: "tensor = 2",
        compression: "",
    },
    Case {
        name: "two replicas of two ranks each, whose parts of what travels compressed are small",
        model: "hidden_size = 256\nintermediate_size = 400\nnum_hidden_layers = 3\nnum_attention_heads = 4",
        vocabulary: 2048,
        train: "seq_len = 128\nmicro_batch_size = 2",
        parallel: "data = 2\ntensor = 2",
        compression: "codec = \"int8\"\nparameter_codec = \"int8\"\n[optimizer]\nsharded = true\n\
                      [export]\nat_end = false",
    },
    Case {
        name: "two stages with a tied table between them",
        model: "hidden_size = 256\nintermediate_size = 688\nnum_hidden_layers = 4\nnum_attention_heads = 4",
        vocabulary: 2048,
        train: "seq_len = 256\nmicro_batch_size = 1\nmicro_batches = 4",
        parallel: "pipeline = 2",
        compression: "",
    },
    Case {
        name: "two ranks that share out the optimiser, and send parameters as int8 differences",
        model: "hidden_size = 256\nintermediate_size = 688\nnum_hidden_layers = 3\nnum_attention_heads = 4",
        vocabulary: 2048,
        train: "seq_len = 128\nmicro_batch_size = 2",
        parallel: "data = 2",
        compression: "codec = \"int8\"\nparameter_codec = \"int8\"\n[optimizer]\nsharded = true",
    },
    Case {
        name: "one machine whose two ranks share out the optimiser, inside which everything travels as it is",
        model: "hidden_size = 256\nintermediate_size = 688\nnum_hidden_layers = 3\nnum_attention_heads = 4",
        vocabulary: 2048,
        train: "seq_len = 128\nmicro_batch_size = 2",
        parallel: "data = 2\ngroup = 2",
        compression: "codec = \"int8\"\nparameter_codec = \"int8\"\n[optimizer]\nsharded = true",
    },
];

impl Case {
    /// What two ranks send each of a table in `int8`: half of it as a gradient and half of it as a sum.
    fn table_bytes(&self) -> f64 {
        let hidden = self.model.split("hidden_size = ").nth(1).and_then(|rest| rest.lines().next()).expect("a width");
        self.vocabulary as f64 * hidden.parse::<f64>().expect("a number") * 8.125 / 8.0
    }

    fn place(&self) -> Place {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        let texts =
            ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "docs/testing.md", "docs/recipe.md", "docs/benchmarks.md"];
        let texts: Vec<String> =
            texts.iter().map(|name| format!("{:?}", root.join(name).display().to_string())).collect();
        let Self { model, vocabulary, train, parallel, compression, .. } = self;
        Place::with(&format!(
            "[model]\n{model}\n[tokenizer]\nvocab_size = {vocabulary}\n[data]\nsource = \"text\"\ntrain = [{}]\n\
             cache_dir = {:?}\n[train]\nsteps = 6\n{train}\n[schedule]\nlearning_rate = 1e-3\n\
             [parallel]\n{parallel}\n[compression]\n{compression}\n[checkpoint]\nevery = 0\n",
            texts.join(", "),
            cache().display().to_string()
        ))
    }
}

fn plan(place: &Place, more: &[&str]) -> Value {
    let ran = place.run(&[&["plan", "small.toml", "--json"], more].concat()).ok();
    serde_json::from_str(&ran.stdout).expect("JSON")
}

/// The most memory of each process that trained.
fn measured(place: &Place) -> Vec<usize> {
    let folder = place.path("memory");
    std::fs::create_dir(&folder).expect("a folder");
    let mut command = place.command(&["train", "small.toml", "--name", "a"]);
    Ran::from(command.env("TRIBUTARY_MEMORY", &folder).output().expect("it starts")).ok();
    let mut names = place.names("memory");
    names.retain(|name| !name.starts_with("longest-"));
    let workers = names.iter().filter(|name| name.starts_with("worker"));
    let found: Vec<usize> = match workers.clone().count() {
        0 => names.iter().collect::<Vec<_>>(),
        _ => workers.collect(),
    }
    .into_iter()
    .map(|name| std::fs::read_to_string(folder.join(name)).expect("readable").parse().expect("a number"))
    .collect();
    found
}

/// Bytes that rank 0 sent in a step: all of the run's, for metrics count what leaves at the end of a step with it or with
/// the next, or not at all.
fn sent(place: &Place) -> f64 {
    let log = std::fs::read_to_string(place.path("runs/a/logs/rank-0.log")).expect("a log");
    let line = log.lines().find(|line| line.contains("bytes at the sockets in all")).expect("it is said at the end");
    let sent = line.split("sent=").nth(1).and_then(|rest| rest.split_whitespace().next()).expect("a number");
    sent.parse::<f64>().expect("a number") / place.lines("a") as f64
}

/// Bytes of the elements of the run's last checkpoint.
fn stored(place: &Place) -> u64 {
    let inspected: Value = serde_json::from_str(&place.run(&["inspect", "a", "--json"]).ok().stdout).expect("JSON");
    let count = |tensor: &Value, key: &str| tensor[key].as_u64().expect("a count");
    let held = |tensor: &Value| 4 * (count(tensor, "elements") - count(tensor, "absent_elements"));
    inspected["tensors"].as_array().expect("tensors").iter().map(held).sum()
}

fn is_near(planned: f64, measured: f64, by: f64) -> bool {
    (planned / measured - 1.0).abs() <= by
}

#[test]
fn memory_is_within_a_tenth_and_bytes_within_a_hundredth_of_what_runs_take() {
    for case in CASES {
        let (place, name) = (case.place(), case.name);
        // The text is made ready first: tokenising it takes memory of its own, which is not planned.
        place.train("ready", &["--set", "train.stop_at_step=1"]).ok();
        let known = plan(&place, &[]);
        let ranks = known["ranks"].as_array().expect("ranks");
        let mut measured = measured(&place);
        assert_eq!(measured.len(), ranks.len(), "{name}");
        let bytes = |rank: &Value, name: &str| rank[name].as_f64().expect("bytes");
        // Which process was which rank is not known: stages differ, and the largest belongs to the largest.
        let mut planned: Vec<(f64, f64)> =
            ranks.iter().map(|rank| (bytes(rank, "peak_bytes"), bytes(rank, "activations_bytes"))).collect();
        planned.sort_by(|a, b| a.0.total_cmp(&b.0));
        measured.sort_unstable();
        let cut = known["mesh"]["tensor"] != 1 || known["mesh"]["pipeline"] != 1;
        for ((planned, activations), measured) in planned.into_iter().zip(measured) {
            println!("{name}: {planned} planned, {measured} measured, {:.3}", planned / measured as f64);
            assert!(is_near(planned, measured as f64, 0.1), "{name}: planned {planned}, measured {measured}");
            // The control: without activations it is not.
            let without = planned - activations;
            assert!(!is_near(without, measured as f64, 0.1), "{name}: {without} would do as well");
        }
        assert_eq!(known["checkpoint_bytes"].as_u64(), Some(stored(&place)), "{name}");
        if ranks.len() > 1 {
            let of = |plan: &Value| -> f64 {
                let axis = |name: &str| plan["ranks"][0][name].as_f64().expect("bytes");
                axis("sent_data_bytes") + axis("sent_tensor_bytes") + axis("sent_pipeline_bytes")
            };
            // At its end a run puts the model together once, of which each rank sends its part; weights are planned twice.
            let part = ranks[0]["parameters_bytes"].as_f64().expect("bytes") / 2.0;
            let once = if cut { part / place.lines("a") as f64 } else { 0.0 };
            let (planned, sent) = (of(&known), sent(&place) - once);
            // Of a table that is not the head too only the rows travel that a step has touched: once as gradients, once as sums.
            let table = if case.model.contains("tie_word_embeddings = false") { case.table_bytes() } else { 0.0 };
            let (least, most) = (0.99 * (planned - table), 1.01 * planned);
            assert!((least..most).contains(&sent), "{name}: {planned} bytes planned, {table} of a table, {sent} sent");
            println!("{name}: {planned} bytes planned, {sent} sent, {:.4}", planned / sent);
            // The control: another codec's are not; what tensor ranks send of activations has none, and neither has one machine.
            if cut || case.parallel == "data = 2\ngroup = 2" {
                continue;
            }
            let other = plan(&place, &["--set", "compression.codec=bf16"]);
            let other = other["ranks"][0]["sent_data_bytes"].as_f64().expect("bytes");
            assert!(!is_near(other, sent, 0.01), "{name}: bf16's {other} bytes would do as well");
        }
    }
}

#[test]
fn a_plan_touches_nothing_and_refuses_what_does_not_fit() {
    let place = Place::new();
    let ran = place.run(&["plan", "small.toml", "--set", "parallel.data=2"]).ok();
    for said in
        ["data 2 x pipeline 1 x tensor 1", "ranks 0 to 1, each: memory at the peak", "activations", "a checkpoint: "]
    {
        assert!(ran.stdout.contains(said), "expected {said:?} in:\n{}", ran.stdout);
    }
    let whole = plan(&place, &[]);
    let peak = whole["peak_bytes"].as_u64().expect("bytes");
    place.run(&["plan", "small.toml", "--memory", &peak.to_string()]).ok();
    place
        .run(&["plan", "small.toml", "--memory", &(peak - 1).to_string()])
        .failed(1, &["it does not fit: rank 0 would take", "bytes at the peak, expected at most"]);

    let cut = plan(&place, &["--tensor", "2", "--pipeline", "2", "--sharded"]);
    assert_eq!(cut["bubble"].as_f64(), Some(0.5));
    for axis in ["tensor", "pipeline"] {
        let [flag, set] = [format!("--{axis}"), format!("parallel.{axis}=2")];
        let (flag, key) = (plan(&place, &[&flag, "2"]), plan(&place, &["--set", &set]));
        assert_eq!(flag, key);
        assert_ne!(flag, whole);
    }
    place.run(&["plan", "small.toml", "--tensor", "3", "--pipeline", "3"]).failed(
        2,
        &["divide the 4 query heads, found 3; 1, 2, 4 would", "divide the 2 key-value heads", "for each of 3 stages"],
    );
    // A thousand steps are not taken first.
    place
        .run(&["plan", "small.toml", "--tensor", "3", "--calibrate", "1000"])
        .failed(2, &["divide the 4 query heads, found 3"]);
    assert_eq!(place.names(""), ["small.toml"], "nothing was made");
}

#[test]
fn a_search_lists_meshes_and_a_step_is_predicted_from_figures_or_from_real_steps() {
    let place = Place::new();
    let said = place.run(&["plan", "small.toml", "--search", "2", "--flops", "1e9", "--link", "1e8"]).ok().stdout;
    let lines: Vec<&str> = said.lines().filter(|line| line.contains(" a rank, sends ")).collect();
    assert_eq!(lines.len(), 3, "{said}");
    for line in lines {
        assert!(line.ends_with(" s a step"), "{line}");
    }
    place.run(&["plan", "small.toml", "--search", "2", "--memory", "1kB"]).failed(1, &["no mesh of 2 ranks serves"]);
    let step_s = |more: &[&str]| plan(&place, more)["time"]["step_s"].as_f64();
    assert_eq!(step_s(&[]), None);
    assert!(step_s(&["--calibrate", "1"]) > Some(0.0));
    let of_stages = plan(&place, &["--pipeline", "2", "--calibrate", "1"]);
    let layers = |value: &Value| -> Vec<u64> {
        let list = value.as_array().expect("a list");
        list.iter().map(|count| count.as_u64().expect("a number")).collect()
    };
    let (planned, measured) = (layers(&of_stages["layers"]), layers(&of_stages["measured"]["layers"]));
    assert!(planned == [1, 1] && measured == planned, "{of_stages}");
    assert!(of_stages["measured"]["layer_s"].as_f64() > Some(0.0), "{of_stages}");
    let (slow, fast) = (step_s(&["--flops", "1e9"]), step_s(&["--flops", "2e9"]));
    assert_eq!(slow.map(|s| s / 2.0), fast);
    place
        .run(&["plan", "small.toml", "--link", "1e8"])
        .failed(2, &["--link: expected --calibrate or --flops beside it"]);
    place.run(&["plan", "small.toml", "--memory", "lots"]).failed(2, &["as 16GiB, 500MB or 1073741824"]);
    assert_eq!(place.names(""), ["small.toml"], "nothing was made");
}
