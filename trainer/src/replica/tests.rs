//! The same model, batches and optimiser on every mesh give the losses and parameters of one rank. Ranks are threads, which
//! run the whole step: slices, stages, sums over replicas, votes, clipping, AdamW.

use std::sync::Arc;

use burn::Tensor;
use burn::tensor::Device;
use parallel::collective::{Mailbox, Place};
use parallel::data::engine::{Engine, Inbox, Members};
use parallel::data::exchange::{Exchange, Group};
use parallel::data::{Parameter, Plan};
use parallel::mesh::Mesh;
use parallel::pipeline::Kind;
use parallel::progress::Progress;
use parallel::transport::channel::{ChannelTransport, network};

use super::*;
use crate::cut;
use crate::recipe::{self, Recipe};
use crate::state::State;
use crate::step::{Batch, Stepper, Word, untouched};
use crate::tensor::{Wrong, parts};

const STEPS: usize = 20;
const V: usize = 37;
const T: usize = 8;
/// Sequences a step, of all ranks.
const ROWS: usize = 4;
/// Layers.
const L: usize = 2;

/// A tiny decoder.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Model {
    width: usize,
    inner: usize,
    heads: usize,
    shared: usize,
    tied: bool,
    layers: usize,
}

/// Ranks, and how they share the work.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Case {
    model: Model,
    data: usize,
    stages: usize,
    tensor: usize,
    sequence: bool,
    /// How gradients travel.
    codec: Codec,
    schedule: Kind,
    virtual_stages: usize,
    /// Sequences of a micro-batch.
    rows: usize,
    /// How activations travel.
    activations: Codec,
}

impl Case {
    fn mesh(self) -> Mesh {
        Mesh::new(self.data, self.stages, self.tensor).expect("a mesh")
    }
}

/// What is left out, or wrong.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Slice(Wrong),
    /// Both ends keep their gradients of the tied table to themselves.
    WithoutTie,
}

fn text(model: Model) -> String {
    let Model { width, inner, heads, shared, tied, layers } = model;
    format!(
        "[model]\nhidden_size = {width}\nintermediate_size = {inner}\nnum_hidden_layers = {layers}\nnum_attention_heads = {heads}\n\
         num_key_value_heads = {shared}\ntie_word_embeddings = {tied}\ninitializer_range = 0.08\n\
         [tokenizer]\nvocab_size = 257\n[data]\nsource = 'text'\ntrain = ['x']\n\
         [train]\nsteps = {STEPS}\nseq_len = {T}\nmicro_batch_size = 2\nclip_norm = 0.5\n\
         [optimizer]\neps = 1e-6\n[schedule]\nlearning_rate = 3e-3\nwarmup_steps = 3\n"
    )
}

fn recipe(model: Model, data: usize) -> Recipe {
    recipe_of(model, data, 2)
}

fn recipe_of(model: Model, data: usize, rows: usize) -> Recipe {
    let sets = [format!("parallel.data={data}"), format!("train.micro_batches={}", ROWS / rows / data)];
    recipe::read("test", &text(model), &sets).expect("a good recipe").1
}

fn config(model: Model) -> Config {
    Config::from_keys(&recipe(model, 1).model, V, T, None).expect("complete")
}

/// The micro-batches of a step, two sequences each.
fn batches(step: usize) -> Vec<Batch> {
    batches_of(step, 2)
}

/// The same sequences in micro-batches of so many.
fn batches_of(step: usize, rows: usize) -> Vec<Batch> {
    let all = two_each(step);
    let join = |take: fn(&Batch) -> &Vec<i32>| -> Vec<i32> { all.iter().flat_map(take).copied().collect() };
    let (inputs, targets) = (join(|batch| &batch.inputs), join(|batch| &batch.targets));
    let each = inputs.chunks(rows * T).zip(targets.chunks(rows * T));
    each.map(|(inputs, targets)| Batch { inputs: inputs.to_vec(), targets: targets.to_vec(), rows }).collect()
}

fn two_each(step: usize) -> Vec<Batch> {
    let ids = |first: usize| {
        (0..2 * T).map(|i| ((step % 2 * 31 + first * 17 + i * i * 7 + i * 3) % V) as i32).collect::<Vec<_>>()
    };
    let of = |number: usize| {
        let (inputs, mut targets) = (ids(number), ids(number)[1..].to_vec());
        targets.push(5);
        Batch { inputs, targets, rows: 2 }
    };
    (0..ROWS / 2).map(of).collect()
}

/// Losses, norms, and the parameters put together at the end.
#[derive(Clone, Debug)]
struct Found {
    losses: Vec<f64>,
    norms: Vec<f64>,
    weights: Vec<Vec<f32>>,
}

fn one_rank(model: Model) -> Found {
    let (config, recipe) = (config(model), recipe(model, 1));
    let stepper = Stepper::new(&config, &Device::flex(), 1 << 12).expect("small");
    let mut state = State::initial(&config, 5);
    let (losses, norms) = steps(&stepper, &mut state, &recipe, batches);
    Found { losses, norms, weights: state.weights }
}

fn steps(
    stepper: &Stepper,
    state: &mut State,
    recipe: &Recipe,
    batches: impl Fn(usize) -> Vec<Batch>,
) -> (Vec<f64>, Vec<f64>) {
    let step = |step| {
        // As a run does: sums travel while the next forward pass computes.
        let report = stepper.step_ahead(state, recipe, &batches(step), Word::default(), untouched);
        let report = report.expect("all are there");
        assert!(!report.skipped);
        (report.loss, report.grad_norm)
    };
    let found = (0..STEPS).map(step).unzip();
    stepper.settle(state).expect("all are there");
    found
}

/// Everything that one rank needs.
struct Rank {
    stepper: Stepper,
    state: State,
}

fn ranks(case: Case, wrong: Option<Fault>) -> Vec<Rank> {
    let mesh = case.mesh();
    let count = mesh.ranks();
    let config = config(case.model);
    let pieces = cut::pieces(&config, T, case.stages * case.virtual_stages, None).expect("enough layers");
    let open = |(rank, end)| {
        let end: Arc<ChannelTransport> = Arc::new(end);
        let (inbox, progress) = (Inbox::default(), Arc::<Progress>::default());
        let mailbox = Mailbox::new(Place { rank, ranks: count, epoch: 1 }, progress.clone());
        end.open(mailbox.sink(inbox.sink()));
        (rank, end, inbox, mailbox, progress)
    };
    // All of them are open before the first sends something.
    let opened: Vec<_> = network(count).into_iter().enumerate().map(open).collect();
    let rank =
        |(rank, end, inbox, mailbox, progress): (usize, Arc<ChannelTransport>, Inbox, Mailbox, Arc<Progress>)| {
            let collectives = Collectives::new(mailbox, end.clone());
            let cut = Cut::of(mesh, case.schedule, pieces.clone());
            let parts = cut.parts(&config, rank).expect("small");
            let keys = (case.sequence, case.activations);
            let replica = Replica::new(&collectives, (cut, rank), &config, keys).expect("a rank of it");
            let replica = replica.map(|replica| match wrong {
                None => replica,
                Some(Fault::Slice(wrong)) => replica.with(Some(wrong), false),
                Some(Fault::WithoutTie) => replica.with(None, true),
            });
            let state = State::initial_parts(&config, &parts, 5);
            let plan = Arc::new(Plan::of_parts(parts, 1 << 12).expect("small"));
            let members = mesh.group(Axis::Data, rank);
            let data = mesh.coordinates(rank).on(Axis::Data);
            let group = Group { rank: data, ranks: case.data, members: 1, window: 3, epoch: 1, chunk_blocks: 1 };
            let exchange = Exchange::new(plan, group, case.codec);
            let engine = Engine::start_among((exchange, Members::new(rank, count, &members)), end, inbox, progress);
            let stepper = Stepper::across(&config, &Device::flex(), engine.expect("a thread"), replica);
            Rank { stepper, state }
        };
    opened.into_iter().map(rank).collect()
}

/// What each rank finds.
fn run(case: Case, wrong: Option<Fault>) -> Vec<Found> {
    let recipe = recipe_of(case.model, case.data, case.rows);
    let (mesh, each) = (case.mesh(), ROWS / case.rows / case.data);
    let names: Vec<Parameter> = config(case.model).parameters();
    let work = |(number, Rank { stepper, mut state }): (usize, Rank)| {
        let data = mesh.coordinates(number).on(Axis::Data);
        let own = |step| batches_of(step, case.rows)[data * each..(data + 1) * each].to_vec();
        let (losses, norms) = steps(&stepper, &mut state, &recipe, own);
        let weights = match stepper.replica() {
            Some(replica) => {
                let held = |name: &str| stepper.plan().parameters().iter().position(|own| own.name == name);
                let own = |name: &str| held(name).map_or(&[][..], |place| &state.weights[place]);
                let whole = |whole: &Parameter| replica.whole(&whole.name, own(&whole.name)).expect("all are there");
                names.iter().map(whole).collect()
            }
            None => state.weights,
        };
        Found { losses, norms, weights }
    };
    // A rank that panics keeps others waiting for ever: without this nobody would read why.
    let work = |rank| {
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(rank)));
        found.unwrap_or_else(|_| std::process::abort())
    };
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> =
            ranks(case, wrong).into_iter().enumerate().map(|rank| scope.spawn(move || work(rank))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

/// The largest relative difference of two losses, and of two norms; and of parameters, beside the largest of each tensor.
fn differences(found: &Found, expected: &Found) -> (f64, f64, f64) {
    let relative = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs() / b.abs()).fold(0.0, f64::max);
    let tensors = found.weights.iter().zip(&expected.weights).map(|(a, b)| {
        assert_eq!(a.len(), b.len());
        let largest = b.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        f64::from(a.iter().zip(b).fold(0.0f32, |max, (a, b)| max.max((a - b).abs())) / largest)
    });
    (relative(&found.losses, &expected.losses), relative(&found.norms, &expected.norms), tensors.fold(0.0, f64::max))
}

/// A width that no number of ranks divides.
const TIED: Model = Model { width: 32, inner: 41, heads: 4, shared: 4, tied: true, layers: L };
const GROUPED: Model = Model { shared: 2, tied: false, ..TIED };
const ONE_SHARED: Model = Model { heads: 8, shared: 1, ..TIED };
/// Its feed-forward layers have as many elements as travel compressed, and their slices have fewer.
const WIDE: Model = Model { width: 256, inner: 264, ..GROUPED };
/// Layers for four stages, or for two of two pieces.
const DEEP: Model = Model { layers: 4, ..TIED };
const DEEP_UNTIED: Model = Model { layers: 5, ..GROUPED };

fn case(model: Model, data: usize, tensor: usize, sequence: bool) -> Case {
    let (codec, activations) = (Codec::Fp32, Codec::Fp32);
    let schedule = Kind::OneForwardOneBackward;
    Case { model, data, stages: 1, tensor, sequence, codec, schedule, virtual_stages: 1, rows: 2, activations }
}

fn staged(model: Model, [data, stages, tensor]: [usize; 3], rows: usize) -> Case {
    Case { stages, rows, ..case(model, data, tensor, false) }
}

fn every_rank_is_one(case: Case, expected: &Found) {
    let found = run(case, None);
    for (rank, found) in found.iter().enumerate() {
        let (loss, norm, weights) = differences(found, expected);
        assert!(
            loss <= 1e-6 && norm <= 1e-5 && weights <= 1e-5,
            "{case:?}, rank {rank}: {loss:e} {norm:e} {weights:e}"
        );
    }
    assert!(found.iter().all(|other| other.losses == found[0].losses && other.weights == found[0].weights));
}

#[test]
fn every_mesh_gives_the_losses_and_the_parameters_of_one_rank() {
    for model in [TIED, GROUPED, ONE_SHARED] {
        let expected = one_rank(model);
        assert!(expected.losses[STEPS - 1] < 0.95 * expected.losses[0], "it learns: {:?}", expected.losses);
        // As many ranks as query heads, and more than key and value heads.
        let eight = [(1, 8, true), (2, 4, true)].into_iter().filter(|&(_, tensor, _)| tensor <= model.heads);
        let some =
            [(1, 2, false), (1, 2, true), (1, 4, false), (1, 4, true), (2, 2, false), (2, 2, true), (2, 1, false)];
        for (data, tensor, sequence) in some.into_iter().chain(eight) {
            every_rank_is_one(case(model, data, tensor, sequence), &expected);
        }
    }
}

#[test]
fn every_pipeline_gives_the_losses_and_the_parameters_of_one_rank() {
    for model in [DEEP, DEEP_UNTIED] {
        let expected = one_rank(model);
        assert!(expected.losses[STEPS - 1] < 0.95 * expected.losses[0], "it learns: {:?}", expected.losses);
        let plain = [([1, 2, 1], 2), ([1, 2, 1], 1), ([1, 4, 1], 1), ([2, 2, 1], 1), ([1, 2, 2], 1), ([2, 2, 2], 2)];
        let mut cases: Vec<Case> = plain.map(|(mesh, rows)| staged(model, mesh, rows)).to_vec();
        cases.push(Case { schedule: Kind::GPipe, ..staged(model, [1, 2, 1], 1) });
        cases.push(Case { schedule: Kind::GPipe, ..staged(model, [1, 4, 2], 1) });
        cases.push(Case { sequence: true, ..staged(model, [2, 2, 2], 2) });
        let interleaved = |mesh| Case { schedule: Kind::Interleaved, virtual_stages: 2, ..staged(model, mesh, 1) };
        cases.extend([interleaved([1, 2, 1]), interleaved([2, 2, 1])]);
        cases.into_iter().for_each(|case| every_rank_is_one(case, &expected));
    }
}

#[test]
fn a_pipeline_alone_has_the_bits_of_one_rank_but_for_a_tied_table() {
    // The same micro-batches in the same order; of two sequences or of one they are not the same products.
    let expected = one_rank(DEEP_UNTIED);
    for (stages, schedule) in [(2, Kind::OneForwardOneBackward), (2, Kind::GPipe), (4, Kind::OneForwardOneBackward)] {
        let found = run(Case { schedule, ..staged(DEEP_UNTIED, [1, stages, 1], 2) }, None);
        assert!(found.iter().all(|found| found.losses == expected.losses), "{stages} stages, {schedule:?}");
    }
}

#[test]
fn activations_in_fewer_bits_stay_near_and_are_no_longer_the_same() {
    let expected = one_rank(DEEP);
    let loss = |activations| {
        let found = run(Case { activations, ..staged(DEEP, [1, 2, 1], 2) }, None);
        assert_eq!(found[0].losses, found[1].losses);
        differences(&found[0], &expected).0
    };
    let [bf16, int8] = [Codec::Bf16, Codec::Int8].map(loss);
    assert!(bf16 > 1e-6 && bf16 < 1e-2 && int8 > 1e-6 && int8 < 2e-2, "{bf16:e} {int8:e}");
}

#[test]
fn data_parallel_ranks_alone_have_the_bits_of_one() {
    let (expected, found) = (one_rank(GROUPED), run(case(GROUPED, 2, 1, false), None));
    assert_eq!(found[1].weights, expected.weights);
}

#[test]
fn what_is_left_out_or_wrong_is_noticed() {
    // The control of the test above: with each of these one mesh at least is found out, by far.
    for (wrong, case) in [
        (Fault::Slice(Wrong::WithoutF), case(TIED, 1, 2, false)),
        (Fault::Slice(Wrong::Mean), case(TIED, 1, 2, false)),
        (Fault::Slice(Wrong::ReplicasApart), case(ONE_SHARED, 1, 2, false)),
        (Fault::Slice(Wrong::NormsApart), case(TIED, 1, 2, true)),
        (Fault::Slice(Wrong::WithoutF), staged(DEEP, [1, 2, 2], 1)),
    ] {
        let found = run(case, Some(wrong));
        let (loss, _, weights) = differences(&found[0], &one_rank(case.model));
        assert!(loss > 1e-5 && weights > 1e-4, "{wrong:?}: {loss:e} {weights:e}");
    }
}

#[test]
fn stages_that_keep_their_gradients_of_the_tied_table_are_found_out() {
    let case = staged(DEEP, [1, 2, 1], 1);
    let recipe = recipe_of(DEEP, 1, 1);
    let work = |(_, Rank { stepper, mut state }): (usize, Rank)| {
        let (mut word, mut said) = (Word::default(), None);
        for step in 0..2 {
            word.parameters = Some(state.fingerprint(&config(DEEP), stepper.plan().parts()));
            said = stepper.step(&mut state, &recipe, &batches_of(step, 1), word, untouched).err();
        }
        said.map(|error| error.to_string())
    };
    let said = |wrong| -> Vec<Option<String>> {
        std::thread::scope(|scope| {
            let work = &work;
            let start = |rank| scope.spawn(move || work(rank));
            let threads: Vec<_> = ranks(case, wrong).into_iter().enumerate().map(start).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        })
    };
    let found = said(Some(Fault::WithoutTie));
    assert!(found.iter().all(|said| said.as_ref().is_some_and(|said| said.contains("rank 1"))), "{found:?}");
    assert_eq!(said(None), [None, None]);
}

#[test]
fn compressed_gradients_of_slices_stay_as_close_as_those_of_whole_tensors() {
    let expected = one_rank(WIDE);
    let loss = |data, tensor, sequence| {
        let found = run(Case { codec: Codec::Int8, ..case(WIDE, data, tensor, sequence) }, None);
        differences(&found[data * tensor - 1], &expected).0
    };
    let (whole, slices) = (loss(2, 1, false), loss(2, 2, true));
    // What is left out is there, though every slice is smaller than what travels as it is: its tensor is not.
    assert!(slices > 1e-5 && slices < 2.0 * whole, "{slices:e} {whole:e}");
}

#[test]
fn a_step_that_one_slice_finds_broken_all_skip() {
    let case = case(TIED, 2, 2, false);
    let recipe = recipe(TIED, 2);
    let work = |(number, Rank { stepper, mut state }): (usize, Rank)| {
        let before = state.clone();
        let own = &batches(0)[number / 2..][..1];
        let spoil = |_, loss: Tensor<1>| if number == 3 { loss.mul_scalar(f32::NAN) } else { loss };
        let report = stepper.step(&mut state, &recipe, own, Word::default(), spoil).expect("a skip is no error");
        assert!(report.skipped);
        assert_eq!(state, State { step: 1, skips: 1, ..before });
    };
    std::thread::scope(|scope| {
        let work = &work;
        ranks(case, None).into_iter().enumerate().for_each(|rank| _ = scope.spawn(move || work(rank)));
    });
}

#[test]
fn the_first_state_is_a_slice_of_one_ranks() {
    let config = config(GROUPED);
    let whole = State::initial(&config, 5);
    for rank in 0..4 {
        let parts = parts::parts(&config, rank, 4).expect("small");
        let own = State::initial_parts(&config, &parts, 5);
        for ((part, own), whole) in parts.iter().zip(&own.weights).zip(&whole.weights) {
            assert_eq!(own, &part.take(whole), "{}", part.whole.name);
        }
        let names: Vec<Parameter> = parts.into_iter().map(|part| part.whole).collect();
        assert_eq!(names, config.parameters());
    }
}
