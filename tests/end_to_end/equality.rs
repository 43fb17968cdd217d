//! Every mesh of 1, 2, 4 and 8 processes gives the losses and the parameters of one rank. A few rows of the table, which cover it,
//! are in every test run; the command at [`meshes`](a_covering_subset_or_all_meshes_of_up_to_eight_ranks_give_one_ranks_run) runs
//! all.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::ranks::same;
use crate::support::Place;
use crate::tensor::{RECIPE, apart, distance};

/// Sequences of a step: one for each of eight replicas.
const SEQUENCES: usize = 8;

/// What makes [`RECIPE`] one of this table: every layer can be cut for eight ranks, and no tensor is large enough to be compressed. AdamW
/// divides by the size of gradients: a larger `eps` than the usual one keeps the rounding of those that are next to nothing small too.
const SMALL: [&str; 5] = [
    "model.num_attention_heads=8",
    "train.micro_batch_size=1",
    "optimizer.eps=1e-5",
    "eval.files=[]",
    "device.threads=1",
];

/// The feed-forward layers are large enough to be compressed, also where a rank has an eighth of them.
const WIDE: [&str; 3] = ["model.hidden_size=128", "model.intermediate_size=520", "train.seq_len=16"];

/// What the losses of runs that compress may be apart from those of one rank, in nats.
const BAND: f64 = 0.002;

/// What a model looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Model {
    Small {
        tied: bool,
        key_value_heads: usize,
    },
    /// A layer for each of eight stages.
    Deep {
        tied: bool,
    },
    Wide,
}

/// How gradients travel, and what comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Travel {
    /// As they are.
    Exact,
    /// In `int8` with error feedback.
    Int8,
    /// And owners send parameters as `int8` differences.
    Int8BothWays,
}

/// One run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Row {
    model: Model,
    /// Ranks on the axes data, pipeline and tensor.
    mesh: [usize; 3],
    /// Whether tensor ranks cut sequences too.
    sequence: bool,
    sharded: bool,
    travel: Travel,
    /// Pieces of each stage; several are interleaved.
    pieces: usize,
}

const DEEP: Model = Model::Deep { tied: true };
const DEEP_UNTIED: Model = Model::Deep { tied: false };
const TIED: Model = Model::Small { tied: true, key_value_heads: 8 };
const TIED_GROUPED: Model = Model::Small { tied: true, key_value_heads: 2 };
const UNTIED: Model = Model::Small { tied: false, key_value_heads: 8 };
const UNTIED_GROUPED: Model = Model::Small { tied: false, key_value_heads: 2 };

const fn exact(model: Model, mesh: [usize; 3], sequence: bool, sharded: bool) -> Row {
    Row { model, mesh, sequence, sharded, travel: Travel::Exact, pieces: 1 }
}

const fn int8(mesh: [usize; 3], sharded: bool, travel: Travel) -> Row {
    Row { model: Model::Wide, mesh, sequence: mesh[2] > 1 && sharded, sharded, travel, pieces: 1 }
}

const fn interleaved(model: Model, mesh: [usize; 3]) -> Row {
    Row { pieces: 2, ..exact(model, mesh, false, false) }
}

/// What is in every test run: eight ranks on each axis and on both, all models, all ways to travel.
const COVERING: [Row; 12] = [
    exact(TIED, [8, 1, 1], false, false),
    exact(TIED_GROUPED, [1, 1, 8], false, false),
    exact(UNTIED_GROUPED, [4, 1, 2], true, false),
    exact(UNTIED, [2, 1, 4], true, true),
    exact(TIED, [8, 1, 1], false, true),
    int8([4, 1, 2], true, Travel::Int8),
    int8([8, 1, 1], true, Travel::Int8BothWays),
    int8([2, 1, 4], true, Travel::Int8BothWays),
    exact(DEEP, [1, 8, 1], false, false),
    exact(DEEP, [2, 2, 2], true, true),
    interleaved(DEEP_UNTIED, [1, 4, 2]),
    int8([2, 2, 2], true, Travel::Int8BothWays),
];

/// All rows: every mesh, and what can be switched on it.
fn table() -> BTreeSet<Row> {
    let powers = [1, 2, 4, 8];
    let meshes = powers.into_iter().flat_map(|data| powers.map(|tensor| [data, 1, tensor]));
    let meshes: Vec<[usize; 3]> = meshes.filter(|mesh| (2..=8).contains(&mesh.iter().product::<usize>())).collect();
    let mut rows = BTreeSet::from(COVERING);
    for &mesh in &meshes {
        let (several, cut) = (mesh[0] > 1, mesh[2] > 1);
        for model in [TIED, TIED_GROUPED, UNTIED, UNTIED_GROUPED] {
            rows.insert(exact(model, mesh, false, false));
            rows.extend(cut.then(|| exact(model, mesh, true, false)));
        }
        if several {
            rows.extend([TIED_GROUPED, UNTIED].map(|model| exact(model, mesh, cut, true)));
            rows.extend([false, true].map(|sharded| int8(mesh, sharded, Travel::Int8)));
            rows.insert(int8(mesh, true, Travel::Int8BothWays));
        }
    }
    for stages in [2, 4, 8] {
        let meshes = powers.into_iter().flat_map(|data| powers.map(|tensor| [data, stages, tensor]));
        for mesh in meshes.filter(|mesh| mesh.iter().product::<usize>() <= 8) {
            let (several, cut) = (mesh[0] > 1, mesh[2] > 1);
            for model in [DEEP, DEEP_UNTIED] {
                rows.insert(exact(model, mesh, false, false));
                rows.extend(cut.then(|| exact(model, mesh, true, false)));
                rows.extend(several.then(|| exact(model, mesh, cut, true)));
                // Micro-batches in groups of as many as there are stages, and a layer for each piece.
                let goes = (SEQUENCES / mesh[0]).is_multiple_of(stages) && 2 * stages <= 8;
                rows.extend(goes.then(|| interleaved(model, mesh)));
            }
            if several && stages == 2 {
                rows.extend([false, true].map(|sharded| int8(mesh, sharded, Travel::Int8)));
                rows.insert(int8(mesh, true, Travel::Int8BothWays));
            }
        }
    }
    rows
}

impl Model {
    fn sets(self) -> Vec<String> {
        match self {
            Self::Small { tied, key_value_heads } => vec![
                format!("model.tie_word_embeddings={tied}"),
                format!("model.num_key_value_heads={key_value_heads}"),
            ],
            Self::Deep { tied } => vec![
                format!("model.tie_word_embeddings={tied}"),
                "model.num_key_value_heads=2".into(),
                "model.num_hidden_layers=8".into(),
            ],
            Self::Wide => WIDE.into_iter().chain(["model.num_key_value_heads=2"]).map(String::from).collect(),
        }
    }
}

impl Row {
    fn sets(self) -> Vec<String> {
        let [data, pipeline, tensor] = self.mesh;
        let mut sets = [SMALL.map(String::from).to_vec(), self.model.sets()].concat();
        sets.extend([
            format!("parallel.data={data}"),
            format!("parallel.tensor={tensor}"),
            format!("parallel.sequence={}", self.sequence),
            format!("train.micro_batches={}", SEQUENCES / data),
            format!("optimizer.sharded={}", self.sharded),
            format!("compression.codec={}", if self.travel == Travel::Exact { "fp32" } else { "int8" }),
        ]);
        sets.extend((pipeline > 1).then(|| format!("parallel.pipeline={pipeline}")));
        if self.pieces > 1 {
            sets.push("parallel.schedule=interleaved".into());
            sets.push(format!("parallel.virtual_stages={}", self.pieces));
        }
        sets.extend((self.travel == Travel::Int8BothWays).then(|| "compression.parameter_codec=int8".into()));
        sets
    }

    fn is_one_ranks_bit_for_bit(self) -> bool {
        // Every rank has one micro-batch, and sums are in the order in which one rank adds them.
        self.travel == Travel::Exact && self.mesh == [SEQUENCES, 1, 1]
    }
}

fn train(place: &Place, faults: &str, run: &str, sets: &[String]) {
    let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    place.train_with(faults, run, &args).ok();
}

/// The largest difference of two runs' losses, in nats.
fn nats(place: &Place, a: &str, b: &str) -> f64 {
    let losses = |run: &str| -> Vec<f64> {
        place.curve(run).iter().map(|line| line[1].parse().expect("a finite loss")).collect()
    };
    let (a, b) = (losses(a), losses(b));
    assert_eq!((a.len(), b.len()), (20, 20));
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// How far a run of this row is apart from one rank's, for people, and whether that is near enough.
fn compare(place: &Place, run: &str, one: &str, row: Row) -> (String, bool) {
    let [data, pipeline, tensor] = row.mesh;
    assert_eq!(place.summary(run)["mesh"], format!("{data} x {pipeline} x {tensor}"));
    if row.travel != Travel::Exact {
        let nats = nats(place, run, one);
        return (format!("loss {nats:.1e} nats"), nats > 0.0 && nats <= BAND);
    }
    if row.is_one_ranks_bit_for_bit() {
        same(place, [run, one]);
    }
    let (loss, weights) = (distance(place, run, one), apart(place, run, one));
    (format!("loss {loss:.1e}, parameters {weights:.1e}, both relative"), loss <= 1e-6 && weights <= 1e-5)
}

/// `TRIBUTARY_MESHES=all cargo test --workspace --test end_to_end equality -- --nocapture`
#[test]
fn a_covering_subset_or_all_meshes_of_up_to_eight_ranks_give_one_ranks_run() {
    let all = std::env::var("TRIBUTARY_MESHES").is_ok_and(|which| which == "all");
    let rows = if all { table() } else { BTreeSet::from(COVERING) };
    let (place, began) = (Place::with(RECIPE), Instant::now());
    let (mut ones, mut far) = (BTreeSet::new(), Vec::new());
    for (number, &row) in rows.iter().enumerate() {
        let (one, run) =
            (format!("one-{}", row.model.sets().join("-").replace(['.', '='], "-")), format!("run-{number}"));
        if ones.insert(one.clone()) {
            train(&place, "", &one, &exact(row.model, [1, 1, 1], false, false).sets());
        }
        train(&place, "", &run, &row.sets());
        let (apart, is_near) = compare(&place, &run, &one, row);
        println!("{row:?}: {apart}");
        far.extend((!is_near).then(|| format!("{row:?}: {apart}")));
        std::fs::remove_dir_all(place.path(&format!("runs/{run}"))).expect("ours");
    }
    println!("{} runs beside {} of one rank: {:.0} s", rows.len(), ones.len(), began.elapsed().as_secs_f64());
    assert!(far.is_empty(), "{far:#?}");
}

#[test]
fn another_order_of_the_text_a_sum_that_is_none_and_compression_without_feedback_are_noticed() {
    let place = Place::with(RECIPE);
    let one = exact(TIED, [1, 1, 1], false, false);
    train(&place, "", "one", &one.sets());
    train(&place, "", "other", &[exact(TIED, [2, 1, 1], false, false).sets(), vec!["train.seed=2".into()]].concat());
    assert!(distance(&place, "other", "one") > 1e-3 && apart(&place, "other", "one") > 1e-2);
    train(&place, "", "wide", &exact(Model::Wide, [1, 1, 1], false, false).sets());
    let runs = [("with", ""), ("without", "no-feedback"), ("twice", "scale:2:2,scale:3:2")];
    for (run, faults) in runs {
        train(&place, faults, run, &int8([4, 1, 2], false, Travel::Int8).sets());
    }
    let [with, without, twice] = runs.map(|(run, _)| nats(&place, run, "wide"));
    println!("with feedback {with:.1e} nats, without {without:.1e}, with a replica that counts twice {twice:.1e}");
    assert!(with <= BAND && without > with && twice > BAND);
}
