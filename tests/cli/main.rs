//! What commands print and how they end: snapshots of the built binary, one module per command.

#[allow(dead_code, reason = "shared by tests that come one by one")]
mod harness;
mod manners;

use harness::Place;
