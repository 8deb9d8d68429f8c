//! Adding adapters to checkpoints, taking them out again bit for bit, and proving both.
//!
//! A merged weight is a pure function of its original and the set of active adapters. The ledger keeps the originals
//! ([`LedgerDocument`]), so undoing is computing again with a smaller set, in any order; nothing is ever subtracted. Every
//! change goes the same way: open the stack of active adapters, form the new one, examine the checkpoint against both
//! (all tensors match, anchors match, nothing was changed meanwhile), record the originals, then patch. Out of place the
//! patches go to fresh copies; in place they are journaled ([`Journal`]), and [`recover`] makes an interrupted change whole
//! or undoes it. [`verify`] proves the result.
//!
//! Low-rank adapters change every weight they touch, and go another way: see [`merge_low_rank`].

mod apply;
mod change;
mod checksummed;
mod error;
mod examine;
mod in_place;
mod journal;
mod ledger;
mod low_rank;
mod new_checkpoint;
mod originals;
mod out_of_place;
mod plausible;
mod recover;
mod report;
mod resume;
mod stack;
mod state;
mod summary;
mod verify;

pub use apply::{MergeInput, MergeOptions, MergeOutput, Which, merge, unmerge};
pub use error::{MergeError, Undecided};
pub use journal::Journal;
pub use ledger::{ActiveAdapter, LedgerDocument, LedgerTarget};
pub use low_rank::{
    ExpertOrder, KeptOriginals, LowRankOptions, LowRankReading, LowRankRecord, RecordedAdapter, RecordedTarget,
    adapter_id, holds_low_rank, is_low_rank, merge_low_rank, undo_low_rank, verify_low_rank,
};
pub use originals::Originals;
pub use recover::{Recovered, recover};
pub use report::{AdapterEntry, KindReport, MergeReport};
pub use summary::{LedgerSummary, ledger_summary};
pub use verify::{AnchorReport, VerifyOptions, VerifyReport, verify};
