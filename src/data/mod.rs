//! Training data: from a file of rows to packed batches of token ids.
//!
//! A [`Dataset`] holds the examples of a file, in file order: their tokens, and which of them the model is to learn. An
//! epoch is a list of [`Batches`]: examples laid end to end, without padding, in an order that a seed decides, each found
//! by its number, so that an interrupted epoch goes on where it stopped. The trainer sees [`Batch`]es alone; nothing here
//! knows of a model's weights.

mod batch;
mod dataset;

pub use batch::{Batch, BatchLimits, Batches, IGNORE};
pub use dataset::{Dataset, Example};
