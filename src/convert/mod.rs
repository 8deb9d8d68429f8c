//! From other tools' files to adapters and back.
//!
//! Every foreign format comes down to lists of positions and deltas, one for each tensor ([`ForeignAdapter`]); only its files
//! are read differently. [`convert`] does all of it; [`import`] puts such lists into rows, a run at a time whatever their order, sums what has one position
//! and writes an adapter that knows its base; [`export`] writes an adapter's deltas in a foreign format. What strangers wrote is taken apart by small strict readers: pickles by a
//! machine that knows the opcodes of saved tensors and executes nothing, zip files only as torch and NumPy write them.
//! The report says for each tensor whether anything was rounded.
//!
//! Deltas of whole checkpoints, as inference servers fetch them, are another matter: [`export_weight_sync`].

mod elements;
mod error;
mod export;
mod foreign;
mod format;
mod import;
mod input;
mod npy;
mod npz;
mod peft_read;
mod peft_write;
mod pickle;
mod pickle_writer;
mod published;
mod report;
mod rows;
mod run;
mod torch;
mod weight_sync;
mod zip;

pub use error::ConvertError;
pub use export::export;
pub use foreign::ForeignAdapter;
pub use format::Format;
pub use import::import;
pub use report::{ConvertReport, ConvertedTensor};
pub use run::convert;
pub use weight_sync::{
    Checksum, Encoding, SyncedTensor, WeightSyncOptions, WeightSyncReport, apply_weight_sync, export_weight_sync,
};
