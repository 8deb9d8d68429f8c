//! From adapters and a checkpoint to what becomes of each stored tensor: [`MergeTarget`]s with their [`Term`]s.
//!
//! The planner finds the place of everything that an adapter holds, once, when the adapter is merged; the ledger records it
//! (`ledger::term`), and undoing reads it from there. [`combine`] brings the targets of several adapters together.

mod added;
mod combine;
mod planner;
mod recorded;
mod term;
mod tied;

use std::collections::BTreeMap;

pub(super) use added::{Added, AddedTensors, added_of_shard, resolve_added, same_added};
pub(super) use combine::combine;
pub(super) use planner::same_bytes;
pub(super) use recorded::{record, resolve};
pub(super) use term::{Does, Magnitude, MergeTarget, Product, ReplacedRows, Term};

use self::planner::{IsOriginal, Planner};
use super::{AdapterReading, MergeError, source::Source};
use crate::weights::WeightMap;

/// Tensors that adapters change, by name.
pub(super) type Targets<'a> = BTreeMap<&'a str, MergeTarget<'a>>;

/// What adapters do to a checkpoint.
pub(super) struct MergePlan<'a> {
    pub(super) targets: Targets<'a>,
    pub(super) added: AddedTensors<'a>,
    /// What had to be decided on the way, in words.
    pub(super) notes: Vec<String>,
}

/// Finds the places of adapters in the checkpoint of `map`.
///
/// # Errors
/// [`MergeError::Unmatched`] lists everything of an adapter that the checkpoint does not have as the adapter needs it;
/// [`MergeError::Undecided`] and [`MergeError::Refused`] where the files leave something open.
pub(super) fn plan<'a>(
    map: &WeightMap<'a>,
    sources: impl Iterator<Item = &'a Source>,
    reading: &AdapterReading,
    is_original: &IsOriginal<'_, 'a>,
) -> Result<MergePlan<'a>, MergeError> {
    let mut planner = Planner::new(map, reading, is_original);
    for source in sources {
        planner.add(source)?;
    }
    Ok(MergePlan { targets: planner.targets, added: planner.added, notes: planner.notes })
}
