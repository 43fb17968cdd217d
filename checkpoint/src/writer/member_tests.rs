use std::path::Path;

use serde_json::json;

use super::tests::{check_content, specs};
use super::*;
use crate::{Checkpoint, SimulatedDisk, layout, list};

pub(super) const FOLDER: &str = "/checkpoints";

/// The part of the tensors of `specs` that each of several ranks stores: even flat cuts, some of them empty.
pub(super) fn cut(rank: usize, ranks: usize) -> Vec<PieceSpec> {
    let piece = |spec: TensorSpec| {
        let count: usize = spec.shape.iter().product();
        PieceSpec::interval(spec.name, &spec.shape, count * rank / ranks..count * (rank + 1) / ranks)
    };
    specs().into_iter().map(piece).collect()
}

/// The writers of `ranks` ranks that share a folder, the first of which leads.
pub(super) fn members(disk: &Arc<dyn Disk>, folder: &Path, ranks: usize, keep_last: usize) -> Vec<Writer> {
    try_members(disk, folder, ranks, keep_last).unwrap()
}

pub(super) fn try_members(
    disk: &Arc<dyn Disk>,
    folder: &Path,
    ranks: usize,
    keep_last: usize,
) -> Result<Vec<Writer>, CheckpointError> {
    let member = |rank| {
        let (member, retention) = (Member { rank, lead: rank == 0 }, Retention::last(keep_last));
        Writer::member(Arc::clone(disk), folder.to_path_buf(), cut(rank, ranks), member, retention)
    };
    (0..ranks).map(member).collect()
}

/// Offers this rank's part of what `check_content` expects.
pub(super) fn offer(writer: &mut Writer, step: u64, seed: f32) -> Offer {
    let attachment = Attachment { name: "recipe.toml".into(), bytes: Arc::from(format!("seed = {seed}").as_bytes()) };
    let pieces = writer.target.pieces.clone();
    writer.offer(step, json!({ "seed": seed }), vec![attachment], |snapshot| {
        for (index, piece) in pieces.iter().enumerate() {
            let values = snapshot.tensor(index).iter_mut();
            for (offset, value) in values.enumerate() {
                *value = seed + (10 * index + piece.region.flat_start + offset) as f32;
            }
        }
    })
}

/// Waits for this rank's part, if it can be written.
pub(super) fn part(writer: &mut Writer) -> Option<Part> {
    match writer.flush().pop() {
        Some(Outcome::Written { part, .. }) => Some(part),
        _ => None,
    }
}

/// Offers to all, and returns the parts.
pub(super) fn parts(writers: &mut [Writer], step: u64, seed: f32) -> Vec<Part> {
    let one = |writer: &mut Writer| {
        assert!(matches!(offer(writer, step, seed), Offer::Taken { .. }));
        part(writer).expect("it is written")
    };
    writers.iter_mut().map(one).collect()
}

pub(super) fn commit(lead: &mut Writer, step: u64, id: &str, parts: Vec<Part>) -> Outcome {
    lead.commit(step, id.into(), parts);
    lead.flush().pop().expect("one outcome")
}

pub(super) fn settle(writers: &mut [Writer], step: u64, kept: bool) -> Vec<Outcome> {
    let settled = writers.iter_mut().flat_map(|writer| {
        writer.settle(step, kept);
        writer.flush()
    });
    settled.collect()
}

pub(super) fn failure(outcome: &Outcome) -> String {
    let Outcome::Failed { error, .. } = outcome else { panic!("expected a failure, found {outcome:?}") };
    error.to_string()
}

pub(super) fn save(writers: &mut [Writer], step: u64, seed: f32, id: &str) {
    let parts = parts(writers, step, seed);
    let outcome = commit(&mut writers[0], step, id, parts);
    assert!(matches!(outcome, Outcome::Committed { .. }), "{outcome:?}");
    settle(writers, step, true);
}

/// What the disk holds in `FOLDER`, on a real one.
pub(super) fn dumped(disk: &SimulatedDisk) -> (tempfile::TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    disk.dump(root.path()).unwrap();
    let folder = root.path().join(&FOLDER[1..]);
    (root, folder)
}

pub(super) fn names(disk: &SimulatedDisk) -> Vec<String> {
    disk.list(Path::new(FOLDER)).unwrap()
}

pub(super) fn simulated() -> (SimulatedDisk, Arc<dyn Disk>) {
    let disk = SimulatedDisk::new();
    (disk.clone(), Arc::new(disk))
}

#[test]
fn packed_parts_and_plain_ones_make_one_checkpoint() {
    for (packing, version) in [(0b000, 1), (0b001, 2), (0b110, 2), (0b111, 2)] {
        let (disk, shared) = simulated();
        let mut writers = members(&shared, Path::new(FOLDER), 3, 0);
        for (rank, writer) in writers.iter().enumerate() {
            writer.pack(packing >> rank & 1 == 1);
        }
        let parts = parts(&mut writers, 7, 0.5);
        // They travel as JSON, and builds that pack nothing say what they ever said.
        let text = serde_json::to_string(&parts).unwrap();
        assert_eq!(text.contains("unpacked_bytes"), packing != 0);
        let outcome = commit(&mut writers[0], 7, "id", serde_json::from_str(&text).unwrap());
        let Outcome::Committed { path, .. } = outcome else { panic!("{outcome:?}") };
        settle(&mut writers, 7, true);
        let (_root, folder) = dumped(&disk);
        let checkpoint = Checkpoint::open(&folder.join(path.file_name().unwrap())).unwrap();
        check_content(&checkpoint, 7, 0.5).unwrap();
        assert_eq!(checkpoint.manifest().version, version);
        // One that is given up is taken back, whatever its name.
        parts_are_taken_back(&mut writers, &disk);
    }
}

fn parts_are_taken_back(writers: &mut [Writer], disk: &SimulatedDisk) {
    parts(writers, 8, 1.0);
    settle(writers, 8, false);
    assert_eq!(names(disk), ["step-00000007"]);
}

#[test]
fn parts_of_several_ranks_in_any_order_come_back_whole() {
    for ranks in 1..=4 {
        let (disk, shared) = simulated();
        let mut writers = members(&shared, Path::new(FOLDER), ranks, 0);
        let mut parts = parts(&mut writers, 7, 0.5);
        parts.reverse();
        parts.rotate_left(ranks / 2);
        let outcome = commit(&mut writers[0], 7, "commit 3", parts);
        let Outcome::Committed { step: 7, bytes, removed, .. } = outcome else { panic!("{outcome:?}") };
        assert!(removed.is_empty());
        let (_root, folder) = dumped(&disk);
        let [(7, path)] = &list(&folder).unwrap()[..] else { panic!("one checkpoint") };
        let files = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len());
        assert_eq!(bytes, files.sum::<u64>());
        let checkpoint = Checkpoint::open(path).unwrap();
        check_content(&checkpoint, 7, 0.5).unwrap();
        assert_eq!(checkpoint.id(), "commit 3");
        assert_eq!(checkpoint.manifest().files.len(), ranks + 1);
        let first = std::fs::read(path.join("rank-0000.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&first).unwrap();
        let mut stored = file.names();
        stored.sort_unstable();
        let expected: &[&str] = if ranks < 4 { &["b", "w"] } else { &["w"] };
        assert_eq!(stored, expected, "what has no elements is not stored");
    }
}

#[test]
fn a_part_that_is_missing_is_a_gap_that_is_named_when_it_is_read() {
    let (disk, shared) = simulated();
    let mut writers = members(&shared, Path::new(FOLDER), 3, 0);
    let mut parts = parts(&mut writers, 7, 0.5);
    parts.remove(1);
    assert!(matches!(commit(&mut writers[0], 7, "", parts), Outcome::Committed { .. }));
    let (_root, folder) = dumped(&disk);
    let checkpoint = Checkpoint::open(&folder.join(layout::committed(7))).unwrap();
    checkpoint.verify().unwrap();
    let message = checkpoint.tensor("w", &[2, 3], &mut [0.0; 6]).unwrap_err().to_string();
    for words in ["step-00000007", "tensor w", "elements 2..4 of its 6", "copy it from the machine that holds it"] {
        assert!(message.contains(words), "{message}");
    }
    // The control: what is there is read.
    let mut out = [0.0; 2];
    checkpoint.region("w", &[2, 3], 4..6, &mut out).unwrap();
    assert_eq!(out, [4.5, 5.5]);
}

#[test]
fn parts_that_do_not_fit_fail_the_step_and_nothing_is_left() {
    let check = |change: &dyn Fn(&mut Vec<Part>), words: &[&str]| {
        let (disk, shared) = simulated();
        let mut writers = members(&shared, Path::new(FOLDER), 2, 1);
        save(&mut writers, 6, 6.0, "a");
        let mut parts = parts(&mut writers, 7, 7.0);
        let good = parts.clone();
        change(&mut parts);
        let message = failure(&commit(&mut writers[0], 7, "b", parts));
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
        settle(&mut writers, 7, false);
        assert_eq!(names(&disk), ["step-00000006"], "{message}");
        // The control: the step again, with its parts as they are.
        save(&mut writers, 7, 7.0, "b");
        assert_eq!(self::parts(&mut writers, 8, 7.0), good, "the same numbers make the same parts");
        assert_eq!(settle(&mut writers, 8, false).len(), 0);
        assert_eq!(names(&disk), ["step-00000007"]);
    };
    check(&|parts| parts[1].bytes += 1, &["step 7", "rank-0001.safetensors was reported with", "found"]);
    check(&|parts| parts[1].file = "rank-0002.safetensors".into(), &["rank-0002.safetensors", "it is not there"]);
    check(&|parts| parts[1].file = "../checkpoints/x".into(), &["plain name"]);
    check(&|parts| parts[1].pieces[0].region.flat_start -= 1, &["tensor w", "overlap", "0..3", "2..6"]);
    check(&|parts| parts[1] = parts[0].clone(), &["rank-0000.safetensors", "two parts have it"]);
    check(
        &|parts| parts[1].pieces[0] = PieceSpec::interval("w", &[6], 3..6),
        &["tensor w", "expected shape [2, 3], found [6]"],
    );
    check(&|parts| parts.truncate(0), &["rank-0000.safetensors, is not among the 0 parts"]);
}

#[test]
fn retention_waits_until_the_step_is_settled() {
    let (disk, shared) = simulated();
    let mut writers = members(&shared, Path::new(FOLDER), 3, 1);
    save(&mut writers, 1, 1.0, "a");
    let parts = parts(&mut writers, 2, 2.0);
    assert!(matches!(commit(&mut writers[0], 2, "b", parts), Outcome::Committed { .. }));
    assert_eq!(names(&disk), ["step-00000001", "step-00000002"], "another folder may fail yet");
    writers[1].settle(2, true);
    assert!(writers[1].flush().is_empty() && names(&disk).len() == 2, "only the lead removes");
    writers[0].settle(2, true);
    let outcomes = writers[0].flush();
    assert!(matches!(&outcomes[..], [Outcome::Retained { step: 2, removed }] if *removed == [1]), "{outcomes:?}");
    assert_eq!(names(&disk), ["step-00000002"]);
    // The control: a step that failed elsewhere removes nothing, and what is committed here stays.
    writers[2].settle(2, true);
    let parts = self::parts(&mut writers, 3, 3.0);
    assert!(matches!(commit(&mut writers[0], 3, "c", parts), Outcome::Committed { .. }));
    assert!(settle(&mut writers, 3, false).is_empty());
    assert_eq!(names(&disk), ["step-00000002", "step-00000003"]);
    // A lead that is told of a commit that it has not made does not follow.
    self::parts(&mut writers, 4, 4.0);
    assert!(settle(&mut writers, 4, true).is_empty());
    assert_eq!(names(&disk), ["step-00000002", "step-00000003"]);
}

#[test]
fn two_folders_hold_their_own_ranks_parts_under_one_id() {
    let (disk, shared) = simulated();
    let piece = |tensor: String, range| PieceSpec::interval(tensor, &[2, 4], range);
    let pieces = |rank: usize| {
        let shard = 2 * rank..2 * rank + 2;
        let sender = piece(format!("w.sender.{rank:04}"), 0..8);
        vec![piece("w".into(), shard.clone()), sender, piece("w.owner".into(), shard)]
    };
    let folder = |rank: usize| Path::new("/machines").join((rank / 2).to_string());
    let member = |rank: usize| {
        let (member, retention) = (Member { rank, lead: rank.is_multiple_of(2) }, Retention::last(0));
        Writer::member(Arc::clone(&shared), folder(rank), pieces(rank), member, retention).unwrap()
    };
    let mut writers: Vec<Writer> = (0..4).map(member).collect();
    let parts = parts(&mut writers, 5, 100.0);
    for lead in [0, 2] {
        let outcome = commit(&mut writers[lead], 5, "run 1, commit 1", parts[lead..lead + 2].to_vec());
        assert!(matches!(outcome, Outcome::Committed { .. }), "{outcome:?}");
    }
    settle(&mut writers, 5, true);
    let root = tempfile::tempdir().unwrap();
    disk.dump(root.path()).unwrap();
    for rank in 0..4 {
        let path = root.path().join("machines").join((rank / 2).to_string()).join("step-00000005");
        let checkpoint = Checkpoint::open(&path).unwrap();
        checkpoint.verify().unwrap();
        assert_eq!(checkpoint.id(), "run 1, commit 1");
        let (mut shard, mut whole) = ([0.0; 2], [0.0; 8]);
        let first = 2.0 * rank as f32;
        for (name, offset) in [("w", 100.0), ("w.owner", 120.0)] {
            checkpoint.region(name, &[2, 4], 2 * rank..2 * rank + 2, &mut shard).unwrap();
            assert_eq!(shard, [offset + first, offset + first + 1.0], "{name} of {rank}");
            let message = checkpoint.tensor(name, &[2, 4], &mut whole).unwrap_err().to_string();
            let other = if rank < 2 { "elements 4..8 of its 8" } else { "elements 0..4 of its 8" };
            assert!(message.contains(name) && message.contains(other), "{message}");
        }
        checkpoint.tensor(&format!("w.sender.{rank:04}"), &[2, 4], &mut whole).unwrap();
        assert_eq!(whole, std::array::from_fn(|element| 110.0 + element as f32));
        for other in 0..4 {
            assert_eq!(checkpoint.has(&format!("w.sender.{other:04}")), other / 2 == rank / 2);
        }
    }
}

#[test]
fn a_step_is_in_flight_until_it_is_settled() {
    let (disk, shared) = simulated();
    let mut writers = members(&shared, Path::new(FOLDER), 2, 0);
    let writer = &mut writers[1];
    for step in [1, 2] {
        assert!(writer.ready(step));
        offer(writer, step, 1.0);
        assert!(part(writer).is_some());
        assert!(!writer.ready(step), "this very step is in flight");
    }
    assert_eq!(writer.offer(3, Value::Null, Vec::new(), |_| panic!("nothing is copied")), Offer::Busy);
    assert!(writer.flush().is_empty(), "it does not wait for a settling that may not come");
    assert_eq!(writer.spare.len(), 1, "a buffer is free once it is written");
    writer.settle(9, true);
    writer.settle(1, true);
    writer.settle(1, false);
    assert!(writer.ready(3) && !writer.ready(2) && writer.ready(1));
    assert!(matches!(offer(writer, 3, 1.0), Offer::Taken { .. }));
    assert!(part(writer).is_some());
    assert_eq!(writer.spare.len(), 1);
    // A step that failed here is in flight too until then: others may be writing it.
    writer.settle(3, false);
    writer.flush();
    writer.offer(4, Value::Null, Vec::new(), |_| {});
    assert!(failure(&writer.flush().pop().unwrap()).contains("did not fill tensor w"));
    assert!(!writer.ready(5));
    settle(&mut writers, 4, false);
    assert!(writers[1].ready(5));
    assert!(writers[0].ready(2), "the other rank has nothing in flight");
    assert!(names(&disk).contains(&"step-00000001.partial".to_owned()), "one that is kept is the lead's");
}

#[test]
fn a_commit_that_makes_no_sense_is_refused() {
    let (disk, shared) = simulated();
    let mut writers = members(&shared, Path::new(FOLDER), 2, 0);
    let parts = parts(&mut writers, 1, 1.0);
    let check = |writer: &mut Writer, step, expected: &str| {
        let message = failure(&commit(writer, step, "a", parts.clone()));
        assert!(message.contains(FOLDER) && message.contains(expected), "{message}");
    };
    check(&mut writers[1], 1, "not the lead");
    check(&mut writers[0], 2, "not in flight");
    writers[0].offer(2, Value::Null, Vec::new(), |_| {});
    writers[0].flush();
    check(&mut writers[0], 2, "it has failed on this rank");
    assert!(matches!(commit(&mut writers[0], 1, "a", parts.clone()), Outcome::Committed { .. }));
    check(&mut writers[0], 1, "handed in before");
    settle(&mut writers, 1, true);
    check(&mut writers[0], 1, "not in flight");
    assert_eq!(names(&disk), ["step-00000001"]);
    let mut alone = tests::writer(shared, Path::new("/alone"), 0).unwrap();
    check_alone(&mut alone);
}

/// A writer alone takes none of the members' calls amiss.
fn check_alone(alone: &mut Writer) {
    tests::offer(alone, 1, 1.0);
    alone.settle(1, false);
    assert!(matches!(alone.abandon()[..], [Outcome::Committed { .. } | Outcome::Failed { .. }]));
    alone.commit(1, String::new(), Vec::new());
    assert!(failure(&alone.flush()[0]).contains("not the lead of several"));
    tests::offer(alone, 2, 1.0);
    assert!(matches!(alone.flush()[..], [Outcome::Committed { step: 2, .. }]));
}

#[test]
fn what_an_earlier_try_left_is_replaced() {
    let (disk, shared) = simulated();
    let mut writers = members(&shared, Path::new(FOLDER), 2, 0);
    let partial = Path::new(FOLDER).join("step-00000001.partial");
    disk.create_dir(&partial).unwrap();
    for name in ["rank-0000.safetensors", "rank-0001.safetensors", "recipe.toml", "manifest.json", "strange"] {
        disk.create(&partial.join(name)).unwrap().write_all(b"an earlier try's").unwrap();
    }
    save(&mut writers, 1, 1.0, "a");
    let (_root, folder) = dumped(&disk);
    check_content(&Checkpoint::open(&folder.join("step-00000001")).unwrap(), 1, 1.0).unwrap();
}

#[test]
fn the_same_step_again_is_kept_or_replaced_by_content_and_id() {
    let (disk, shared) = simulated();
    let mut writers = members(&shared, Path::new(FOLDER), 2, 0);
    let note = Path::new(FOLDER).join("step-00000001/note.txt");
    save(&mut writers, 1, 1.0, "a");
    for (seed, id, kept) in [(1.0, "a", true), (1.0, "b", false), (2.0, "b", false)] {
        if !disk.exists(&note).unwrap() {
            disk.create(&note).unwrap();
        }
        save(&mut writers, 1, seed, id);
        assert_eq!(disk.exists(&note).unwrap(), kept, "{seed} {id}");
        assert_eq!(names(&disk), ["step-00000001"]);
        let (_root, folder) = dumped(&disk);
        check_content(&Checkpoint::open(&folder.join("step-00000001")).unwrap(), 1, seed).unwrap();
    }
    // One that is replaced waits aside while the new one is not settled, and does not bar the way of the next.
    for id in ["c", "d"] {
        let parts = parts(&mut writers, 1, 3.0);
        assert!(matches!(commit(&mut writers[0], 1, id, parts), Outcome::Committed { .. }));
        settle(&mut writers, 1, false);
        assert_eq!(names(&disk), ["step-00000001", "step-00000001.replaced"]);
    }
    save(&mut writers, 1, 3.0, "e");
    assert_eq!(names(&disk), ["step-00000001"]);
}

#[test]
fn a_rank_that_is_late_to_settle_does_not_take_what_others_have_begun_anew() {
    for late in [0, 1] {
        let try_again = |late_tidies: &dyn Fn(&mut Writer)| {
            let (disk, shared) = simulated();
            let mut writers = members(&shared, Path::new(FOLDER), 2, 0);
            parts(&mut writers, 1, 1.0);
            settle(&mut writers[1 - late..][..1], 1, false);
            assert!(names(&disk).is_empty(), "one removes it for both");
            let mut again = parts(&mut writers[1 - late..][..1], 1, 2.0);
            late_tidies(&mut writers[late]);
            again.extend(parts(&mut writers[late..][..1], 1, 2.0));
            commit(&mut writers[0], 1, "a", again)
        };
        let settled = try_again(&|writer| drop(settle(std::slice::from_mut(writer), 1, false)));
        assert!(matches!(settled, Outcome::Committed { .. }), "{settled:?}");
        // The control: to abandon takes the folder whosever it is.
        let abandoned = try_again(&|writer| drop(writer.abandon()));
        assert!(failure(&abandoned).contains("it is not there"));
    }
}
