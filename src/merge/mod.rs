//! Adding adapters to checkpoints, taking them out again bit for bit, and proving both.
//!
//! A merged weight is a pure function of its original and the set of active adapters, whatever their kinds. The ledger keeps the
//! originals ([`LedgerDocument`]), so undoing is computing again with a smaller set, in any order; nothing is ever subtracted. Every
//! change goes the same way: open the stack of active adapters, form the new one, examine the checkpoint against both
//! (all tensors match, anchors match, nothing was changed meanwhile), record the originals, then patch. Out of place the
//! patches go to fresh copies; in place they are journaled ([`Journal`]), and [`recover`] makes an interrupted change whole
//! or undoes it. [`verify`] proves the result.
//!
//! `source` opens adapters, `plan` finds what each of them does to which stored tensor: its terms. Where terms are single elements alone,
//! a tensor is worked on at those positions; where some term changes it as a whole, `compute` makes its rows anew.

mod added;
mod card;
mod change;
mod compute;
mod door;
mod error;
mod examine;
mod examine_tensor;
mod factors;
mod findings;
mod frame;
mod in_place;
mod journal;
mod ledger;
mod mark;
mod model_card;
mod new_checkpoint;
mod options;
mod out_of_place;
mod patch;
mod plan;
mod plausible;
mod recover;
mod report;
mod source;
mod stack;
mod state;
mod summary;
mod verify;

pub use door::{merge, unmerge};
pub use error::{MergeError, Undecided};
pub use journal::Journal;
pub use ledger::{
    Kept, KeptHashes, KeptPositions, LedgerAdapter, LedgerAdded, LedgerDocument, LedgerReplaced, LedgerTarget,
    LowRankRecord, RecordedAdapter, RecordedTarget, RecordedTerm, TextEdit,
};
pub use options::{AdapterReading, ExpertOrder, KeptOriginals, MergeInput, MergeOptions, MergeOutput, Which};
pub use recover::{Recovered, recover};
pub use report::{KindReport, MergeReport};
pub use source::{AdapterEntry, adapter_id, changes_whole_tensors};
pub use summary::{ActiveAdapter, LedgerSummary, NamedAdapter, ledger_summary, named_adapters};
pub use verify::{AnchorReport, VerifyOptions, VerifyReport, verify};
