//! From other tools' adapters to this program's and back.
//!
//! [`convert`] does all of it: [`foreign`](crate::foreign) reads other tools' files, [`import`](crate::adapter::import) makes adapters of
//! them, and [`export`] writes an adapter's deltas in a foreign format. The report says for each tensor whether anything was
//! rounded.

mod deltas;
mod error;
mod export;
mod npz;
mod peft_write;
mod pickle_writer;
mod published;
mod run;

pub use error::ConvertError;
pub use export::export;
pub use run::convert;

use crate::adapter::{ConvertReport, ConvertedTensor};
