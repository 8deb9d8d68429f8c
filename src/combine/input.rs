//! What is combined.

use crate::adapter::Adapter;

/// An adapter to combine.
#[derive(Clone, Debug)]
pub struct CombineInput {
    /// The adapter, opened with its base where it takes that.
    pub adapter: Adapter,
    /// Its weight.
    pub weight: f64,
}
