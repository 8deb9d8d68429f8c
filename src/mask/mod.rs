//! Policy: which weights of a checkpoint take part.

mod error;

pub use error::MaskError;
