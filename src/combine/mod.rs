//! One adapter out of several, without a base in memory: linear sums, TIES, DARE, or the first that has a say.
//!
//! First all adapters are read once and compared, position by position: where they overlap, where their signs
//! disagree, and whether they can be of one base. Then every position that any of them has gets one delta ([`Method`]). All passes
//! go over the deltas alone, a run of rows at a time, and give the same bytes for any number of threads.
//!
//! How do we know that two adapters are of one base? Each has a hash of the base's values at its positions. Where two have the same
//! positions the hashes must be equal. Where positions differ nothing can be compared, nor can the hash of the combined
//! positions be made: then the base is needed, and every adapter is proven against it.

mod error;
mod input;
mod method;
mod run;
mod survey;
mod trim;

pub use error::CombineError;
pub use input::CombineInput;
pub use method::Method;
pub use run::{CombineOptions, CombineReport, combine};
pub use survey::{InputReport, PairReport};
