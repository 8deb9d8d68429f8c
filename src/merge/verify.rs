//! The proof of a merge: every touched weight is what it should be, and every other byte equals the base.
//!
//! Without the base: each touched weight is compared with what originals and adapters make of it, and each adapter's anchor
//! with the hash of the originals at its positions, so the originals are the base's. With the base, besides: its values
//! have the same anchors, its headers are the same bytes, and in each tensor as many elements differ as the adapters
//! change. All touched weights being right, no other element can differ.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{
    AdapterEntry, AdapterReading, KeptOriginals, MergeError, MergeInput, added,
    change::{Change, Origin, Touched, Work},
    compute::{Computer, RowsHasher, merge_cost, merge_rows},
    examine::Examination,
    findings::{Findings, MAX_EXAMPLES},
    frame::Frame,
    ledger::Kept,
    plan::{Added, Targets, combine, plan, same_bytes},
    report::entries,
    source::Source,
    stack::{Remembered, Stack},
    state::state_of,
};
use crate::{
    adapter::AdapterId,
    backend::Merger,
    checkpoint::{
        Checkpoint, Context, Printable, Shard, TensorInfo, TensorRef, for_each_ordered, n_readers,
        read_and_map_ordered, window_cost,
    },
    weights::WeightMap,
};

/// What to hold a merged checkpoint against.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct VerifyOptions {
    /// The checkpoint it was made from, never merged into.
    pub base: Option<PathBuf>,
    /// The adapters that were merged, for a checkpoint without a ledger; the base is needed then.
    pub adapters: Vec<MergeInput>,
    /// How they were read, as for the merge.
    pub reading: AdapterReading,
}

/// How the originals compare with what an adapter was made from.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
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
#[non_exhaustive]
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
/// Every touched weight is computed again from its original and compared. Tensors of which the ledger has hashes alone are
/// compared by hash where no base is given. Reads the touched tensors, and with a base every byte of both checkpoints, once. Memory: a
/// few blocks per thread.
///
/// # Errors
/// [`MergeError`] where it cannot be checked; a checkpoint that is wrong is a report whose `ok` is false.
pub fn verify(ctx: &Context<'_>, path: &Path, options: &VerifyOptions) -> Result<VerifyReport, MergeError> {
    let checkpoint = Checkpoint::open(path)?;
    let base = options.base.as_deref().map(open_base).transpose()?;
    let remembered = Remembered::open(ctx, &state_of(&checkpoint)?)?;
    let given;
    let stack = match (&remembered.ledger, &base) {
        (Some(_), _) if !options.adapters.is_empty() => {
            return Err(MergeError::Usage("a checkpoint with a ledger knows its adapters; leave them out".to_owned()));
        }
        (Some(_), base) => Stack::of_or_unplaced(&remembered, &checkpoint, base.as_ref())?,
        (None, Some(base)) if !options.adapters.is_empty() => {
            let map = WeightMap::new(&checkpoint, options.reading.answers())?;
            let of_base = WeightMap::new(base, options.reading.answers())?;
            given = Source::open_all(ctx, &options.adapters, &of_base, base)?;
            expected_stack(&given, &map, base, &options.reading)?
        }
        (None, _) => {
            let what = "has no ledger: give its base and the adapters that were merged".to_owned();
            return Err(MergeError::Refused { path: path.to_owned(), what });
        }
    };
    let computer = Computer::new(Merger::cpu());
    let change = Change {
        checkpoint: &checkpoint,
        before: &stack,
        after: &stack,
        base: base.as_ref(),
        keep: KeptOriginals::default(),
        computer: &computer,
    };
    let touched = change.touched()?;
    let (whole, by_position): (Vec<Touched<'_>>, Vec<Touched<'_>>) =
        touched.iter().partition(|touched| !matches!(touched.work, Work::Positions(_)));
    let bounds = BTreeMap::new();
    let mut findings = change.examine(ctx, &by_position, &bounds, None)?;
    let mut problems: Vec<String> = findings.changed.clone();
    let mut n_wrong = findings.n_changed;
    for touched in &whole {
        n_wrong += verify_whole(ctx, &change, touched, &mut findings, &mut problems)?;
    }
    let frame = match stack.ledger {
        Some(ledger) => Frame::of(&checkpoint, Some(ledger)),
        None => Frame::without_ledger(&checkpoint),
    };
    problems.extend(frame.problems(&stack)?);
    problems.extend(added::verify(ctx, &checkpoint, &stack.added)?);
    let anchors = anchor_reports(&stack, &findings, "the ledger's originals", &mut problems);
    let mut bytes_compared = 0;
    if let Some(base) = &base {
        if stack.ledger.is_some() {
            let on_base = base_findings(ctx, &change, &by_position)?;
            anchor_reports(&stack, &on_base, "the base's values", &mut problems);
        }
        let compared: BTreeSet<&str> = whole.iter().map(Touched::name).collect();
        let expected = |name: &str| match compared.contains(name) || stack.added.contains_key(name) {
            // Compared already, every element.
            true => None,
            false => Some(findings.counts.get(name).map_or(0, |counts| counts.changed)),
        };
        bytes_compared = compare_tensors(ctx, &frame, (&checkpoint, base), expected, &mut problems)?;
        base.unchanged()?;
    }
    checkpoint.unchanged()?;
    Ok(VerifyReport {
        ok: problems.is_empty(),
        active: entries(&stack),
        n_touched: findings.n_touched,
        n_wrong,
        anchors,
        base_compared: base.is_some(),
        bytes_compared,
        problems,
    })
}

/// Computes a tensor again that adapters changed as a whole, and compares every element; or, where its original is nowhere, its
/// hash. Returns the elements that are wrong, where they were counted.
fn verify_whole(
    ctx: &Context<'_>,
    change: &Change<'_>,
    touched: &Touched<'_>,
    findings: &mut Findings,
    problems: &mut Vec<String>,
) -> Result<u64, MergeError> {
    let kept = change.before.kept(touched.name()).and_then(Kept::hashes);
    let name = Printable(touched.name());
    let originals = match touched.origin {
        Origin::Ledger(tensor) | Origin::Base(tensor) => Some(tensor),
        Origin::Here => None,
    };
    let target = touched.after.expect("a stack touches its targets");
    let prepared = match originals {
        Some(_) => Some(change.prepare(ctx, touched, target)?),
        None => None,
    };
    let row_bytes = touched.row_bytes();
    let width = touched.tensor.info.dtype.bitsize() / 8;
    let (mut n_wrong, mut found, mut beneath) = (0u64, RowsHasher::default(), RowsHasher::default());
    for_each_ordered(
        ctx,
        change.blocks(ctx, touched),
        |rows| 4 * window_cost((rows.end - rows.start) * row_bytes) + merge_cost(ctx, target, rows),
        |rows| {
            let window = touched.tensor.window(ctx, rows.start * row_bytes..rows.end * row_bytes)?;
            let mut block = (0, RowsHasher::groups(&window, row_bytes), Vec::new());
            if let Some(prepared) = &prepared {
                let mut expected = change.original_rows(ctx, touched, rows)?;
                block.2 = RowsHasher::groups(&expected, row_bytes);
                merge_rows(ctx, change.computer, prepared, rows, &mut expected)?;
                block.0 = count_differing(&window, &expected, width);
            }
            touched.tensor.shard.confirm(&window)?;
            ctx.observer.advance(window.len() as u64);
            Ok(block)
        },
        |_, (n, of_found, of_beneath)| {
            n_wrong += n;
            found.push(&of_found);
            beneath.push(&of_beneath);
            Ok::<_, MergeError>(())
        },
    )?;
    findings.n_touched += touched.tensor.info.n_elements();
    if let (Some(hashes), Some(tensor)) = (kept, originals)
        && beneath.finish() != hashes.base
    {
        return Err(match touched.origin {
            Origin::Ledger(_) => MergeError::BadLedger {
                path: tensor.shard.path().to_owned(),
                what: format!("tensor \"{name}\": the ledger is damaged: the whole tensor does not match its checksum"),
            },
            _ => MergeError::Refused {
                path: tensor.shard.path().to_owned(),
                what: format!("\"{name}\": its values differ from those of the merge's base"),
            },
        });
    }
    let is_left = kept.is_none_or(|hashes| found.finish() == hashes.merged);
    if n_wrong > 0 {
        if problems.len() < MAX_EXAMPLES {
            problems.push(format!("\"{name}\": {n_wrong} weights are not what the merge makes of the originals"));
        }
    } else if !is_left {
        problems.push(format!("\"{name}\": differs from what the merge wrote"));
    }
    // That its original is the base's was proven for all adapters at once, now or when it was merged.
    for terms in target.terms.chunk_by(|a, b| a.source.id == b.source.id) {
        findings.anchors.entry(terms[0].source.id).or_default().n_matching += 1;
    }
    Ok(n_wrong)
}

/// What the base's values are at the positions of sparse adapters.
fn base_findings(ctx: &Context<'_>, change: &Change<'_>, by_position: &[Touched<'_>]) -> Result<Findings, MergeError> {
    let nothing = Stack::default();
    let on_base = Change { before: &nothing, ..*change };
    let mut on_base_touched = Vec::new();
    for touched in by_position {
        let tensor = change.in_base(touched.tensor)?;
        on_base_touched.push(Touched { tensor, before: None, origin: Origin::Here, ..*touched });
    }
    let bounds = BTreeMap::new();
    let mut examination = Examination::new(&on_base, &bounds, None);
    for touched in &on_base_touched {
        examination.on_disk(ctx, touched)?;
    }
    Ok(examination.findings)
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

/// The stack that merging `given` into `base` would make, on the checkpoint that it is said to have made.
fn expected_stack<'a>(
    given: &'a [Source],
    map: &WeightMap<'a>,
    base: &Checkpoint,
    reading: &AdapterReading,
) -> Result<Stack<'a>, MergeError> {
    let is_original = |tensor: TensorRef<'a>, other: (&Shard, &TensorInfo)| match base.tensor(&tensor.info.name) {
        Some(found) if found.info.is_like(other.1) => Ok(same_bytes((found.shard, found.info), other)?),
        _ => Ok(false),
    };
    let planned = plan(map, given.iter(), reading, &is_original)?;
    let (mut added, mut targets) = (planned.added, planned.targets);
    targets.retain(|name, target| {
        // What the base does not have, the adapter brought along.
        let is_new = base.tensor(name).is_none_or(|found| !found.info.is_like(target.tensor.info));
        let new = if is_new { Added::of_full(target) } else { None };
        let is_target = new.is_none();
        added.extend(new.map(|new| ((*name).to_owned(), new)));
        is_target
    });
    let targets = combine(targets, Targets::new())
        .map_err(|what| MergeError::Refused { path: map.checkpoint().root().to_owned(), what })?;
    Ok(Stack { active: given.iter().collect(), targets, added, ledger: None })
}

fn anchor_reports(
    stack: &Stack<'_>,
    findings: &Findings,
    whose: &str,
    problems: &mut Vec<String>,
) -> Vec<AnchorReport> {
    let mut reports = Vec::new();
    for (source, n_tensors) in stack.active.iter().zip(stack.n_tensors()) {
        let id: AdapterId = source.id;
        let anchors = findings.anchors.get(&id).cloned().unwrap_or_default();
        if let Some(tensor) = &anchors.first_mismatch {
            let id = id.short();
            problems.push(format!("\"{}\": {whose} are not those that adapter {id} was made from", Printable(tensor)));
        }
        reports.push(AnchorReport { id: id.to_string(), n_tensors, n_matching: anchors.n_matching });
    }
    reports
}

/// Compares shards, headers and every tensor with the base; `expected` says how many elements of a tensor differ, or `None` for a tensor that is not compared.
fn compare_tensors(
    ctx: &Context<'_>,
    frame: &Frame<'_>,
    (checkpoint, base): (&Checkpoint, &Checkpoint),
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
        if frame.original_header(merged)?.0.as_bytes() != original.header_json()? {
            problems.push(format!("{}: its header differs from the base's", Printable(&merged.file_name())));
        }
    }
    ctx.observer.begin("comparing", base.n_bytes());
    let mut pairs = Vec::new();
    for tensor in checkpoint.tensors() {
        if expected(&tensor.info.name).is_none() {
            continue;
        }
        let same = |found: &TensorRef<'_>| found.info.is_like(tensor.info);
        match base.tensor(&tensor.info.name).filter(same) {
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
