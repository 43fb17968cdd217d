//! What the others hold for a rank that stands still.

use parallel::frame::HEADER_BYTES;

use crate::support::{Place, Ran};

const CHUNK: usize = 16384;

/// What rank 0 sends rank 2 of its gradient is 17 MB: more than the sockets of a process that stands still take in.
const MODEL: &str = r#"
[model]
hidden_size = 1024
intermediate_size = 2752
num_hidden_layers = 1
num_attention_heads = 8

[tokenizer]
vocab_size = 299

[data]
source = "text"
train = ["TEXT/train.txt"]
cache_dir = "TEXT/cache"

[train]
steps = 6
seq_len = 16
micro_batch_size = 1

[schedule]
learning_rate = 1e-3

[parallel]
data = 3
peer_timeout_s = 4
chunk_elements = 16384

[compression]
codec = "fp32"

[checkpoint]
every = 0

[export]
at_end = false
"#;

/// What a rank that waits for one that stands still has allocated all that time, where so many frames may be under way.
fn waiting_with(window: usize) -> usize {
    let place = Place::with(MODEL);
    let folder = place.path("memory");
    std::fs::create_dir(&folder).expect("a folder");
    let window = format!("parallel.window_chunks={window}");
    let mut command = place.command(&["train", "small.toml", "--name", "a", "--restarts", "0", "--set", &window]);
    command.envs([("TRIBUTARY_FAULTS", "halt:2:4")]).env("TRIBUTARY_MEMORY", &folder);
    let ran = Ran::from(command.output().expect("it starts"));
    ran.failed(75, &["error: rank 2 (host ", ") has been silent for "]);
    let of_worker = |name: &String| name.starts_with("longest-worker");
    let read = |name| std::fs::read_to_string(folder.join(name)).expect("readable").parse().expect("a number");
    place.names("memory").into_iter().filter(of_worker).map(read).max().expect("two that wait")
}

#[test]
fn for_a_rank_that_stands_still_the_others_hold_a_window_of_frames_and_no_more() {
    const WINDOW: usize = 16;
    let [one, some, all] = [1, WINDOW, 1 << 20].map(waiting_with);
    let stated = (WINDOW - 1) * (4 * CHUNK + HEADER_BYTES);
    println!("{one} bytes with a window of one frame, {some} with {WINDOW}, {all} without");
    // Heartbeats and what is looked at make a few pages of difference.
    assert!(some.saturating_sub(one) <= stated + (256 << 10), "{one}, {some}: expected {stated} more at most");
    // The control: without a window all of the gradient is encoded that the sockets do not take.
    assert!(all.saturating_sub(one) > 2 * stated, "{one}, {all}");
}
