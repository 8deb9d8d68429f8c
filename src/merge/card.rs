//! The model card of a merged checkpoint, written beside its weights and taken away again.
//!
//! `card` in the state folder remembers it: two lines of text ([`checksummed`]), the BLAKE3 of the card as it was written, and the
//! base's own card, whose place it took. A card that somebody changed since is theirs and stays.

use serde::{Deserialize, Serialize};

use super::{
    MergeError,
    change::Change,
    model_card::{CardAdapter, CardFacts, model_card},
    stack::Stack,
};
use crate::checkpoint::{Checkpoint, Layout, OwnFolder, StateFolder, checksummed, write_own};

/// The card's file name.
pub(super) const CARD_NAME: &str = "README.md";

/// Larger cards are nobody's that this program wrote, and are not kept.
const MAX_CARD_BYTES: u64 = 4 << 20;
/// JSON escapes take up to six bytes for one.
const MAX_RECORD_BYTES: u64 = 6 * MAX_CARD_BYTES + (1 << 10);

/// What the state folder remembers of a card.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CardRecord {
    version: u32,
    /// BLAKE3 of the card.
    written: String,
    /// The base's own card.
    original: Option<String>,
    /// What the base is called.
    base: String,
}

/// What lies in a card's place.
#[derive(Default)]
pub(super) struct OldCard {
    /// Whether this program wrote it, for a merge that the checkpoint remembers.
    pub(super) is_own: bool,
    /// The base's own card.
    original: Option<String>,
    /// What the base is called.
    base: String,
}

impl OldCard {
    /// Looks at a checkpoint.
    ///
    /// # Errors
    /// A file that cannot be read; [`MergeError::BadLedger`] where the record is not what was written.
    pub(super) fn of(checkpoint: &Checkpoint, state: &StateFolder) -> Result<Self, MergeError> {
        let base = checkpoint.name();
        if checkpoint.layout() == Layout::File {
            return Ok(Self { base, ..Self::default() });
        }
        let found = match OwnFolder::at(checkpoint.root())?.open_file(CARD_NAME)? {
            Some((_, meta)) if meta.len() <= MAX_CARD_BYTES => {
                OwnFolder::at(checkpoint.root())?.read(CARD_NAME, MAX_CARD_BYTES)?
            }
            _ => None,
        };
        let Some(bytes) = state.folder().read(StateFolder::CARD, MAX_RECORD_BYTES)? else {
            let original = found.and_then(|found| String::from_utf8(found).ok());
            return Ok(Self { is_own: false, original, base });
        };
        let record: Option<CardRecord> =
            checksummed::document_of(&bytes).and_then(|document| serde_json::from_str(document).ok());
        let Some(record) = record.filter(|record| record.version == 1) else {
            let what = "the record of the model card is damaged, or a newer program wrote it".to_owned();
            return Err(MergeError::BadLedger { path: state.path().join(StateFolder::CARD), what });
        };
        let is_own = found.is_some_and(|found| blake3::hash(&found).to_hex().as_str() == record.written);
        Ok(Self { is_own, original: record.original, base: record.base })
    }
}

/// Writes what becomes of the card into the checkpoint at `root`, whose state is in `state`: that of the adapters after the change, or the
/// base's own where none is left. `remembers` says whether the result can be undone by itself. In place a card that is not this program's
/// stays.
///
/// # Errors
/// A failure to write.
pub(super) fn write_card(
    change: &Change<'_>,
    root: &OwnFolder,
    (state, is_kept): (&StateFolder, bool),
    old: &OldCard,
    remembers: bool,
) -> Result<(), MergeError> {
    if change.after.active.is_empty() {
        state.folder().remove(StateFolder::CARD)?;
        return match &old.original {
            Some(original) if old.is_own => Ok(write_own(root, CARD_NAME, original.as_bytes())?),
            None if old.is_own => Ok(root.remove(CARD_NAME)?),
            _ => Ok(()),
        };
    }
    let card = model_card(&facts(change.after, old, remembers));
    write_own(root, CARD_NAME, card.as_bytes())?;
    if is_kept {
        let written = blake3::hash(card.as_bytes()).to_hex().to_string();
        let record = CardRecord { version: 1, written, original: old.original.clone(), base: old.base.clone() };
        write_own(state.folder(), StateFolder::CARD, &checksummed::to_bytes(&record))?;
    }
    Ok(())
}

/// Brings the card of a checkpoint that was changed in place up to date, where it is this program's.
///
/// # Errors
/// As [`write_card`].
pub(super) fn update_card(change: &Change<'_>, state: &StateFolder, remembers: bool) -> Result<(), MergeError> {
    let old = OldCard::of(change.checkpoint, state)?;
    match old.is_own {
        true => write_card(change, &OwnFolder::at(change.checkpoint.root())?, (state, true), &old, remembers),
        false => Ok(()),
    }
}

fn facts(after: &Stack<'_>, old: &OldCard, remembers: bool) -> CardFacts {
    let adapters: Vec<CardAdapter> = (after.active.iter())
        .map(|source| CardAdapter {
            id: source.id.to_string(),
            kind: source.kind().to_owned(),
            scale: source.scale,
            base: source.full_base_name(),
            name: None,
        })
        .collect();
    // A repository is what some adapter says that the base is one of.
    let is_this = |name: &&String| name.rsplit_once('/').is_some_and(|(_, last)| last == old.base);
    let repository = adapters.iter().filter_map(|adapter| adapter.base.as_ref()).find(is_this).cloned();
    let base = repository.unwrap_or_else(|| old.base.clone());
    CardFacts { base, base_readme: old.original.clone(), adapters, remembers }
}
