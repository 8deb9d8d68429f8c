//! Adding adapters to checkpoints, taking them out again bit for bit, and proving both.
//!
//! A merged weight is a pure function of its original and the set of active adapters, whatever their kinds. The ledger keeps the
//! originals ([`LedgerDocument`]), so unmerging recomputes the weights with a smaller set, in any order; nothing is ever subtracted. Every
//! change takes the same steps: open the stack of active adapters, form the new stack, check the checkpoint against both
//! (all tensors match, anchors match, nothing changed in the meantime), record the originals, then patch. Out of place the
//! patches go to new copies. In place they are journaled ([`Journal`]), and [`recover`] completes or rolls back an interrupted
//! change. [`verify`] proves the result.
//!
//! `source` opens adapters. `plan` finds the terms: what each adapter does to which stored tensor. A tensor whose terms are single elements
//! is patched at those positions. If a term changes the whole tensor, `compute` recomputes its rows.

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
