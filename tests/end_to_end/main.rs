//! Real runs of the real command line, each in a folder of its own.

mod bad_input;
mod documents;
mod export;
mod recipes;
mod resume;
mod support;
