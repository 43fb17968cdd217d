//! What a stranger may send, tried by libFuzzer. `docs/testing.md` has the commands.
//!
//! - [`targets`]: what must hold whatever the bytes are. Ordinary tests run the same functions.
//! - [`frame`]: the frames of the crate `parallel`, from its source, without what else that crate needs.

#[path = "../../../parallel/src/frame.rs"]
pub mod frame;
pub mod targets;
