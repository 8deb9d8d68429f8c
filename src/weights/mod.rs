//! The map of weights: what a weight is, and which stored tensors hold it.
//!
//! An adapter names a weight as a model has it in memory; a checkpoint names tensors as they were saved. A model may share one
//! weight under several names, hold experts as a stack that lie apart on disk, or store a matrix the other way round. All of this
//! is decided here, from headers and `config.json`, and nowhere else: [`WeightMap::find`] finds the weight of a name,
//! [`WeightMap::place_linear`] and its kin say which stored rows an adapter's product belongs to and which way round,
//! [`WeightMap::tie`] what else changes with it, [`WeightMap::pairs`] which weights of two checkpoints are the same. An answer is
//! certain, or a refusal ([`Unplaced`]) that names the nearest candidates or the question to be answered ([`Answers`]).
//!
//! What is known about families of models is data, in `rules.rs`.

mod axes;
mod config;
mod map;
mod modules;
mod names;
mod pairs;
mod pattern;
mod place;
mod rename;
mod rules;
mod ties;

pub use axes::{Axes, KindAxes, Witness, Witnesses};
pub use map::{Answers, Unplaced, Weight, WeightMap};
pub use modules::{family_axes, is_embedding};
pub use pairs::{Pairing, Pairs};
pub use pattern::{ALL_LINEAR, TargetPattern};
pub use place::{Columns, Part, Placement, Reading, StoredRows};
pub use rename::Rename;
pub use ties::TiedWeight;
