//! What commands print and how they end: snapshots of the built binary, one module per command.

#![allow(clippy::unwrap_used, reason = "all of this is a test")]

mod adapters;
mod cluster;
mod combine;
mod convert;
mod diff;
mod edges;
#[cfg(feature = "train")]
mod eval;
mod extract;
mod half_merged;
#[allow(dead_code, reason = "shared by tests that come one by one")]
mod harness;
mod help;
mod init;
mod inspect;
mod json;
mod low_rank;
mod manners;
mod mask;
mod mask_join;
mod merge;
mod mistakes;
mod overflow;
mod pack;
mod shells;
mod signals;
mod sync;
mod terminal;
#[cfg(feature = "train")]
mod train;
mod wrong_lines;

use harness::Workspace;
