//! The proof of a merge: every touched weight is what it should be, and every other byte equals the base.
//!
//! Without the base: each touched weight is compared with what originals and adapters make of it, and each adapter's anchor
//! with the hash of the originals at its positions, so the originals are the base's. With the base, besides: its values
//! have the same anchors, its headers are the same bytes, and in each tensor as many elements differ as the adapters
//! change. All touched weights being right, no other element can differ.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{
    AdapterEntry, MergeError, MergeInput,
    change::Change,
    examine::Findings,
    ledger::LedgerWriter,
    report::entries,
    stack::{Active, Stack},
    state::state_of,
};
use crate::{
    adapter::Adapter,
    checkpoint::{
        Checkpoint, CheckpointError, Context, Layout, Printable, Shard, StateFolder, TensorRef, n_readers,
        read_and_map_ordered, window_cost,
    },
};

/// What to hold a merged checkpoint against.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct VerifyOptions {
    /// The checkpoint it was made from, never merged into.
    pub base: Option<PathBuf>,
    /// The adapters that were merged, for a checkpoint without a ledger; the base is needed then.
    pub adapters: Vec<MergeInput>,
}

/// How the originals compare with what an adapter was made from.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct AnchorReport {
    /// The adapter's id.
    pub id: String,
    /// Tensors it touches.
    pub n_tensors: usize,
    /// Of those, tensors whose original values have the adapter's anchor.
    pub n_matching: usize,
}

/// The result of [`verify`].
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct VerifyReport {
    /// Whether everything that was checked is right.
    pub ok: bool,
    /// The adapters that the checkpoint should hold.
    pub active: Vec<AdapterEntry>,
    /// Touched weights, all of which were compared.
    pub n_touched: u64,
    /// Touched weights that are wrong.
    pub n_wrong: u64,
    /// The originals' anchors, by adapter.
    pub anchors: Vec<AnchorReport>,
    /// Whether every other byte was compared with a base.
    pub base_compared: bool,
    /// Bytes compared with the base.
    pub bytes_compared: u64,
    /// What is wrong, one line each; at most the first 20 of each kind.
    pub problems: Vec<String>,
}

/// Proves that a checkpoint is what the merges recorded in its ledger made of its base.
///
/// Reads the touched rows, and with a base every byte of both checkpoints, once. Memory: a few blocks per thread.
///
/// # Errors
/// [`MergeError`] where it cannot be checked; a checkpoint that is wrong is a report whose `ok` is false.
pub fn verify(ctx: &Context<'_>, path: &Path, options: &VerifyOptions) -> Result<VerifyReport, MergeError> {
    let checkpoint = Checkpoint::open(path)?;
    let state = state_of(&checkpoint)?;
    let base = options.base.as_deref().map(open_base).transpose()?;
    let mut stack = Stack::open(ctx, &state)?;
    // Holds the ledger of a checkpoint that has none.
    let mut scratch = None;
    if stack.ledger.is_none() {
        let Some(base) = base.as_ref().filter(|_| !options.adapters.is_empty()) else {
            let what = "has no ledger: give its base and the adapters that were merged".to_owned();
            return Err(MergeError::Refused { path: path.to_owned(), what });
        };
        let folder = tempfile::tempdir().map_err(|e| CheckpointError::io("create", &std::env::temp_dir(), e))?;
        stack = expected_stack(ctx, base, &options.adapters, folder.path())?;
        scratch = Some(folder);
    } else if !options.adapters.is_empty() {
        return Err(MergeError::Usage("a checkpoint with a ledger knows its adapters; leave them out".to_owned()));
    }

    let change = Change { checkpoint: &checkpoint, before: &stack, after: &stack };
    let touched = change.touched()?;
    let findings = change.examine(ctx, &touched, None)?;
    let mut problems: Vec<String> = findings.changed.clone();
    let anchors = anchor_reports(&stack, &findings, "the ledger's originals", &mut problems);
    let mut bytes_compared = 0;
    if let Some(base) = &base {
        let nothing = Stack::default();
        let change = Change { checkpoint: base, before: &nothing, after: &stack };
        let on_base = change.examine(ctx, &change.touched()?, None)?;
        anchor_reports(&stack, &on_base, "the base's values", &mut problems);
        bytes_compared = compare_rest(ctx, &checkpoint, base, &findings, &mut problems)?;
        base.unchanged()?;
    }
    checkpoint.unchanged()?;
    drop(scratch);
    Ok(VerifyReport {
        ok: problems.is_empty(),
        active: entries(&stack),
        n_touched: findings.n_touched,
        n_wrong: findings.n_changed,
        anchors,
        base_compared: base.is_some(),
        bytes_compared,
        problems,
    })
}

/// Opens a checkpoint that nothing was merged into.
pub(super) fn open_base(path: &Path) -> Result<Checkpoint, MergeError> {
    let base = Checkpoint::open(path)?;
    if state_of(&base)?.remembers()? {
        let what = "has a ledger: it is a merged checkpoint, not a base".to_owned();
        return Err(MergeError::Refused { path: path.to_owned(), what });
    }
    Ok(base)
}

/// The stack that merging `adapters` into `base` would make, with its ledger in `folder`.
fn expected_stack(
    ctx: &Context<'_>,
    base: &Checkpoint,
    adapters: &[MergeInput],
    folder: &Path,
) -> Result<Stack, MergeError> {
    let mut active = Vec::new();
    for input in adapters {
        let adapter = Adapter::open_with_base(ctx, &input.adapter, base)?;
        let scale = input.scale.unwrap_or(adapter.scale());
        active.push(Active { id: adapter.id(ctx)?, scale, adapter });
    }
    active.sort_by_key(|active| active.id);
    let (before, mut after) = (Stack::default(), Stack { active, ledger: None });
    after.targets().map_err(|what| MergeError::Refused { path: base.root().to_owned(), what })?;
    let change = Change { checkpoint: base, before: &before, after: &after };
    let state = StateFolder::at(folder, Layout::Folder)?;
    state.create()?;
    let mut writer = LedgerWriter::create(&state, StateFolder::LEDGER, &after.entries())?;
    let findings = change.examine(ctx, &change.touched()?, Some(&mut writer))?;
    super::apply::judge(&change, &findings)?;
    after.ledger = Some(writer.finish(ctx)?);
    Ok(after)
}

fn anchor_reports(stack: &Stack, findings: &Findings, whose: &str, problems: &mut Vec<String>) -> Vec<AnchorReport> {
    let mut reports = Vec::new();
    for (active, anchors) in stack.active.iter().zip(&findings.anchors) {
        if let Some(tensor) = &anchors.first_mismatch {
            let id = active.id.short();
            problems.push(format!("\"{}\": {whose} are not those that adapter {id} was made from", Printable(tensor)));
        }
        let n_tensors = active.adapter.targets().len();
        reports.push(AnchorReport { id: active.id.to_string(), n_tensors, n_matching: anchors.n_matching });
    }
    reports
}

/// Compares shards, headers and every tensor with the base; returns the bytes of tensor data compared.
fn compare_rest(
    ctx: &Context<'_>,
    checkpoint: &Checkpoint,
    base: &Checkpoint,
    findings: &Findings,
    problems: &mut Vec<String>,
) -> Result<u64, MergeError> {
    let expected = |name: &str| Some(findings.counts.get(name).map_or(0, |counts| counts.changed));
    compare_tensors(ctx, checkpoint, base, expected, problems)
}

/// Compares shards, headers and every tensor that is not touched; returns the bytes of tensor data compared.
pub(super) fn compare_other_tensors(
    ctx: &Context<'_>,
    checkpoint: &Checkpoint,
    base: &Checkpoint,
    is_touched: impl Fn(&str) -> bool,
    problems: &mut Vec<String>,
) -> Result<u64, MergeError> {
    compare_tensors(ctx, checkpoint, base, |name| (!is_touched(name)).then_some(0), problems)
}

/// The same; `expected` says how many elements of a tensor differ, or `None` for a tensor that is not compared.
fn compare_tensors(
    ctx: &Context<'_>,
    checkpoint: &Checkpoint,
    base: &Checkpoint,
    expected: impl Fn(&str) -> Option<u64>,
    problems: &mut Vec<String>,
) -> Result<u64, MergeError> {
    let by_name =
        |checkpoint: &'_ Checkpoint| -> Vec<String> { checkpoint.shards().iter().map(Shard::file_name).collect() };
    let single = checkpoint.shards().len() == 1 && base.shards().len() == 1;
    if !single && by_name(checkpoint) != by_name(base) {
        problems.push("its shards have other names than the base's".to_owned());
        return Ok(0);
    }
    for (merged, original) in checkpoint.shards().iter().zip(base.shards()) {
        if merged.header_json()? != original.header_json()? {
            problems.push(format!("{}: its header differs from the base's", Printable(&merged.file_name())));
        }
    }
    ctx.observer.begin("comparing", base.n_bytes());
    let mut pairs = Vec::new();
    for tensor in checkpoint.tensors() {
        let same = |found: &TensorRef<'_>| found.info.is_like(tensor.info);
        match base.tensor(&tensor.info.name).filter(same) {
            Some(_) if expected(&tensor.info.name).is_none() => {}
            Some(original) => pairs.push((tensor, original)),
            None => problems.push(format!("\"{}\": the base has no such tensor", Printable(&tensor.info.name))),
        }
    }
    let mut n_differing: BTreeMap<&str, u64> = BTreeMap::new();
    let step = ctx.window_bytes();
    let windows = pairs.iter().flat_map(|&(merged, original)| {
        let n_bytes = merged.info.n_bytes();
        (0..n_bytes).step_by(step as usize).map(move |start| (merged, original, start..n_bytes.min(start + step)))
    });
    let both: Vec<TensorRef<'_>> = pairs.iter().flat_map(|&(merged, original)| [merged, original]).collect();
    read_and_map_ordered(
        ctx,
        windows,
        |(.., range)| 2 * window_cost(range.end - range.start),
        n_readers(ctx, &both),
        |(merged, original, range)| Ok((merged.window(ctx, range.clone())?, original.window(ctx, range.clone())?)),
        |(merged, original, range), (found, expected)| {
            // Elements of less than a byte are compared by bytes; no adapter touches them.
            let n = count_differing(&found, &expected, (merged.info.dtype.bitsize() / 8).max(1));
            merged.shard.confirm(&found)?;
            original.shard.confirm(&expected)?;
            ctx.observer.advance(range.end - range.start);
            Ok(n)
        },
        |(merged, ..), n| {
            *n_differing.entry(&merged.info.name).or_default() += n;
            Ok::<_, MergeError>(())
        },
    )?;
    for (name, n) in n_differing {
        let expected = expected(name).unwrap_or(0);
        if n != expected {
            problems.push(format!(
                "\"{}\": {n} elements differ from the base, the adapters change {expected}",
                Printable(name)
            ));
        }
    }
    Ok(pairs.iter().map(|(merged, _)| merged.info.n_bytes()).sum())
}

/// Elements of `width` bytes in which `a` and `b` differ.
fn count_differing(a: &[u8], b: &[u8], width: usize) -> u64 {
    if a == b {
        return 0;
    }
    a.chunks_exact(width).zip(b.chunks_exact(width)).filter(|(a, b)| a != b).count() as u64
}
