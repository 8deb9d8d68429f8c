//! Tensors that an adapter brings along and that the base has not, or has in another size: a classification head, the embedding of a
//! resized vocabulary.
//!
//! They change where tensors lie, so they come and go out of place alone: [`arrange`] writes the shard that they belong to once more, when
//! everything else is done. `config.json` and the index are told ([`Texts`]). The ledger remembers what each text was before, and, of a
//! tensor that was replaced by one of another size, the original or its hash.

mod arrange;
mod texts;

pub(super) use self::{
    arrange::{arrange, layout_after},
    texts::Texts,
};
use super::{
    KeptOriginals, MergeError,
    change::Change,
    ledger::{LedgerAdded, LedgerReplaced, LedgerWriter},
    plan::{Added, AddedTensors, added_of_shard, same_added},
};
use crate::{
    checkpoint::{Checkpoint, Context, Printable, TensorInfo, TensorRef},
    tensor::{Dtype, dtype_name},
};

/// Whether a change adds tensors to a shard, or takes some away.
pub(super) fn rearranges(change: &Change<'_>, shard_index: usize) -> bool {
    let (before, after) = (&change.before.added, &change.after.added);
    let mut pairs = added_of_shard(before, shard_index).zip(added_of_shard(after, shard_index));
    added_of_shard(before, shard_index).count() != added_of_shard(after, shard_index).count()
        || pairs.any(|((a, before), (b, after))| a != b || !before.is_same_as(after))
}

/// The base's tensor that an added one took, or takes, the place of; `None` where it took no place. Of one that an earlier merge replaced
/// it lies in the ledger or in the base.
///
/// # Errors
/// [`MergeError::NeedsBase`], or a base that is another.
fn original_of<'a>(change: &Change<'a>, name: &str) -> Result<Option<TensorRef<'a>>, MergeError> {
    let Some(before) = change.before.added.get(name) else { return Ok(change.checkpoint.tensor(name)) };
    let Some((dtype, shape)) = &before.replaces else { return Ok(None) };
    if let Some((shard, info)) = change.before.ledger.and_then(|ledger| ledger.whole(name)) {
        return Ok(Some(TensorRef::of_file(shard, info)));
    }
    let like = TensorInfo { name: name.to_owned(), dtype: *dtype, shape: shape.clone(), data: 0..0 };
    change.in_base_like(&like).map(Some)
}

/// Records the tensors that are added after a change, with what undoing needs; originals are read once.
///
/// # Errors
/// As [`original_of`]; [`MergeError::Refused`] where the base is another than the one that was merged into.
pub(super) fn record(ctx: &Context<'_>, change: &Change<'_>, writer: &mut LedgerWriter) -> Result<(), MergeError> {
    for (name, added) in &change.after.added {
        let earlier = change.before.ledger.and_then(|ledger| ledger.document().added.get(name)?.replaced.clone());
        let is_hash_alone = earlier.as_ref().is_some_and(|earlier| !earlier.whole);
        let replaced = match (&added.replaces, earlier) {
            (None, _) => None,
            (Some(_), Some(earlier)) if is_hash_alone && change.base.is_none() => Some(earlier),
            (Some((dtype, shape)), earlier) => {
                let original = original_of(change, name)?.expect("it takes the place of one");
                let whole = earlier.as_ref().map_or(change.keep == KeptOriginals::Whole, |earlier| earlier.whole);
                let blake3 = keep(ctx, original, whole.then_some((name.as_str(), &mut *writer)))?;
                if let Some(earlier) = earlier.filter(|earlier| earlier.blake3 != blake3) {
                    return Err(wrong_original(name, original, &earlier));
                }
                Some(LedgerReplaced { dtype: dtype_name(*dtype).to_owned(), shape: shape.clone(), blake3, whole })
            }
        };
        let index = change.after.active.iter().position(|source| source.id == added.source.id);
        let recorded = LedgerAdded {
            adapter: index.expect("its adapter is active"),
            tensor: added.from.1.name.clone(),
            dtype: dtype_name(added.dtype).to_owned(),
            shape: added.shape().to_vec(),
            task: added.task.clone(),
            replaced,
        };
        writer.add(name.clone(), recorded);
    }
    Ok(())
}

fn wrong_original(name: &str, original: TensorRef<'_>, _recorded: &LedgerReplaced) -> MergeError {
    MergeError::Refused {
        path: original.shard.path().to_owned(),
        what: format!("\"{}\": its values differ from those of the base that was merged into", Printable(name)),
    }
}

/// Fails where an original that an added tensor took the place of is another than the one that was merged into.
fn prove_original(
    ctx: &Context<'_>,
    change: &Change<'_>,
    name: &str,
    original: TensorRef<'_>,
) -> Result<(), MergeError> {
    let recorded = change.before.ledger.and_then(|ledger| ledger.document().added.get(name)?.replaced.as_ref());
    match recorded {
        Some(recorded) if keep(ctx, original, None)? != recorded.blake3 => {
            Err(wrong_original(name, original, recorded))
        }
        _ => Ok(()),
    }
}

/// The BLAKE3 of a tensor; a ledger that is to keep it gets it on the way.
fn keep(
    ctx: &Context<'_>,
    tensor: TensorRef<'_>,
    mut ledger: Option<(&str, &mut LedgerWriter)>,
) -> Result<String, MergeError> {
    let mut hasher = blake3::Hasher::new();
    if let Some((name, ledger)) = &mut ledger {
        ledger.begin_replaced(name, tensor.info);
    }
    let n_bytes = tensor.info.n_bytes();
    for start in (0..n_bytes).step_by(ctx.window_bytes() as usize) {
        ctx.check()?;
        let bytes = tensor.read(ctx, start..n_bytes.min(start + ctx.window_bytes()))?;
        hasher.update(&bytes);
        if let Some((_, ledger)) = &mut ledger {
            ledger.push_whole(&bytes)?;
        }
    }
    if let Some((_, ledger)) = &mut ledger {
        ledger.end_replaced(tensor.info);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Bytes that the originals of replaced tensors take in the ledger.
pub(super) fn kept_bytes(change: &Change<'_>) -> u64 {
    let replaced = change.after.added.values().filter_map(|added| added.replaces.as_ref());
    let n_bytes = |(dtype, shape): &(Dtype, Vec<u64>)| shape.iter().product::<u64>() * dtype.bitsize() as u64 / 8;
    match change.keep {
        KeptOriginals::Whole => replaced.map(n_bytes).sum(),
        KeptOriginals::Hashes => 0,
    }
}

/// Whether taking out an adapter after the change needs the base, since the hash alone is kept of a tensor that was replaced.
pub(super) fn needs_base(change: &Change<'_>) -> bool {
    let earlier = |name: &String| change.before.ledger?.document().added.get(name)?.replaced.as_ref();
    change
        .after
        .added
        .iter()
        .filter(|(_, added)| added.replaces.is_some())
        .any(|(name, _)| !earlier(name).map_or(change.keep == KeptOriginals::Whole, |earlier| earlier.whole))
}

/// Fails where a change in place would add tensors or take some away: then the shard's other tensors would move.
///
/// # Errors
/// [`MergeError::NewTensorsInPlace`].
pub(super) fn refuse_in_place(change: &Change<'_>) -> Result<(), MergeError> {
    let (before, after) = (&change.before.added, &change.after.added);
    if same_added(before, after) {
        return Ok(());
    }
    let differs = |(name, added): &(&String, &Added<'_>), other: &AddedTensors<'_>| {
        !other.get(*name).is_some_and(|other| other.is_same_as(added))
    };
    let new = after.iter().find(|one| differs(one, before)).map(|(name, _)| name);
    let name = new.or_else(|| before.iter().find(|one| differs(one, after)).map(|(name, _)| name));
    let (path, tensor) = (change.checkpoint.root().to_owned(), name.cloned().unwrap_or_default());
    Err(MergeError::NewTensorsInPlace { path, tensor })
}

/// The tensors that a change adds.
fn new<'c, 'a>(change: &'c Change<'a>) -> impl Iterator<Item = (&'c String, &'c Added<'a>)> {
    change
        .after
        .added
        .iter()
        .filter(|(name, added)| !change.before.added.get(*name).is_some_and(|before| before.is_same_as(added)))
}

/// The same, one line each.
pub(super) fn lines(change: &Change<'_>) -> Vec<String> {
    new(change).map(|(name, added)| added.line(name)).collect()
}

/// Fails where a value of a tensor that a change adds is not one that its type holds. Reads them once.
///
/// # Errors
/// [`MergeError::Overflow`].
pub(super) fn check(ctx: &Context<'_>, change: &Change<'_>) -> Result<(), MergeError> {
    new(change).try_for_each(|(name, added)| added.for_each_run(ctx, name, |_| Ok(())))
}

/// Problems of tensors that should be in a checkpoint since adapters brought them: one line for each whose values are others.
///
/// # Errors
/// A failure to read.
pub(super) fn verify(
    ctx: &Context<'_>,
    checkpoint: &Checkpoint,
    added: &AddedTensors<'_>,
) -> Result<Vec<String>, MergeError> {
    let mut problems = Vec::new();
    for (name, added) in added {
        let tensor = checkpoint.tensor(name);
        let tensor = tensor.filter(|tensor| tensor.info.shape == added.shape() && tensor.info.dtype == added.dtype);
        let Some(tensor) = tensor else {
            problems.push(format!("\"{}\": the adapter's tensor is not there", Printable(name)));
            continue;
        };
        let (mut at, mut is_same) = (0, true);
        added.for_each_run(ctx, name, |bytes| {
            let end = at + bytes.len() as u64;
            is_same &= bytes == tensor.read(ctx, at..end)?;
            at = end;
            Ok(())
        })?;
        if !is_same {
            problems.push(format!("\"{}\": its values are not those of its adapter", Printable(name)));
        }
    }
    Ok(problems)
}
