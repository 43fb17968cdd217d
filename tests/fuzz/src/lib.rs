//! What a stranger may send, tried by libFuzzer. `docs/testing.md` has the commands.
//!
//! - [`targets`]: what must hold whatever the bytes are. Ordinary tests run the same functions.
//! - [`frame`], [`call`] and [`message`], [`note`]: frames, collective messages and what ranks tell each other, of the crate
//!   `parallel`, from its source, without what else that crate needs.

#[path = "../../../parallel/src/collective/call.rs"]
pub mod call;
pub mod data;
#[path = "../../../parallel/src/frame.rs"]
pub mod frame;
#[path = "../../../parallel/src/collective/message.rs"]
pub mod message;
#[expect(dead_code, reason = "what the rest of `parallel` calls")]
#[path = "../../../parallel/src/note.rs"]
pub mod note;
pub mod targets;
