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
mod init;
mod inspect;
mod json;
mod low_rank;
mod manners;
mod mask;
mod mask_join;
mod merge;
mod overflow;
mod pack;
mod signals;
mod sync;
#[cfg(feature = "train")]
mod train;

use harness::Workspace;
