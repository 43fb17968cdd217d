//! Real runs of the real command line, each in a folder of its own.

mod bad_input;
mod balance;
mod benches;
mod checkpoints;
mod codecs;
mod documents;
mod dying;
mod export;
mod fuzzing;
mod joining;
mod ledger;
mod nodes;
mod packed;
mod processes;
mod prometheus;
mod ranks;
mod recipes;
mod resharding;
mod resume;
mod saving;
mod schedulers;
mod secured;
mod sharded;
mod siege;
mod support;
mod traces;
