//! A new checkpoint of the same layout: shards copied, examined and patched in one pass, side files brought along.

use std::path::{Path, PathBuf};

use super::{
    MergeError, MergeReport,
    apply::{judge_all, report},
    change::{Change, Touched, patch, row_blocks},
    examine::Examination,
    ledger::{GROUP_ROWS, LedgerWriter},
    new_checkpoint::{Destination, NewCheckpoint, RowBlocks, pieces},
    plausible::can_overflow,
    resume::{Piece, Resume},
    stack::{Stack, copy_name},
};
use crate::checkpoint::{
    Checkpoint, Context, CopyMode, Layout, Patcher, Shard, Silent, StateFolder, give_name, rewrite_shard, share_file,
};

/// Writes the checkpoint that `after` makes of `checkpoint`, which `before` describes.
///
/// Shards are copied, examined and patched in one pass, and judged when all were: until then nothing has its name.
pub(super) fn apply(
    ctx: &Context<'_>,
    checkpoint: &Checkpoint,
    before: &Stack,
    after: Stack,
    target: &Destination<'_>,
    allow_overflow: bool,
) -> Result<MergeReport, MergeError> {
    let change = Change { checkpoint, before, after: &after };
    let touched = change.touched()?;
    refuse_early(ctx, &change, &touched, allow_overflow)?;
    let is_file = checkpoint.layout() == Layout::File;
    let output = NewCheckpoint::begin(checkpoint, target, || plan(&change), state_bytes(&after, &touched))?;
    let resume = match target.resume && !is_file {
        true => Some(Resume::begin(ctx, output.root(), &plan(&change), checkpoint)?),
        false => None,
    };
    let state = output.state();
    state.create()?;

    let mut writer = LedgerWriter::create(state, StateFolder::LEDGER, &after.entries())?;
    let mut examination = Examination::new(&change, Some(&mut writer));
    ctx.observer.begin("merging", checkpoint.shards().iter().map(Shard::file_bytes).sum());
    let mut waiting = Vec::new();
    let mut by_shard: Vec<Vec<Touched<'_>>> = vec![Vec::new(); checkpoint.shards().len()];
    touched.iter().for_each(|target| by_shard[target.tensor.shard_index].push(*target));
    for (index, (shard, mut of_shard)) in checkpoint.shards().iter().zip(by_shard).enumerate() {
        of_shard.sort_by_key(|target| target.tensor.info.data.start);
        let path = output.shard_path(shard);
        if resume.as_ref().is_some_and(|resume| resume.has(shard)) {
            of_shard.iter().try_for_each(|target| examination.examine_on_disk(ctx, target))?;
            continue;
        }
        let part = path.with_extension("part");
        let mode = if target.link && of_shard.is_empty() { CopyMode::Link } else { CopyMode::Auto };
        if share_file(shard.path(), &part, mode)?.is_some() {
            of_shard.iter().try_for_each(|target| examination.examine_on_disk(ctx, target))?;
            // Sharing once more costs less than proving: there is no record, and no name before the end.
            waiting.push(Waiting { index, later: of_shard, part, path, is_recorded: false });
            continue;
        }
        let mut pieces = resume.as_ref().map(|_| Vec::new());
        let later = rewrite(ctx, &change, shard, &of_shard, &part, &mut examination, &mut pieces)?;
        if !later.is_empty() {
            waiting.push(Waiting { index, later, part, path, is_recorded: true });
            continue;
        }
        if let Some((resume, pieces)) = resume.as_ref().zip(pieces) {
            resume.record(&shard.file_name(), pieces)?;
        }
        give_name(&part, &path)?;
    }
    let findings = examination.findings();
    if let Err(e) = judge_all(&change, &findings, allow_overflow) {
        output.discard();
        return Err(e);
    }
    let mut report = report(&change, &touched, &findings);
    for active in &after.active {
        active.adapter.write_own(ctx, &state.adapters(), &copy_name(&active.id))?;
    }
    let ledger = writer.finish(ctx)?;
    let ledger_bytes = ledger.n_bytes();
    let after = Stack::of_ledger(ctx, state, ledger)?;
    for Waiting { index, later, part, path, is_recorded } in waiting {
        if !later.is_empty() {
            let mut files: Vec<Option<Patcher>> = checkpoint.shards().iter().map(|_| None).collect();
            files[index] = Some(Patcher::open(ctx, &part)?);
            patch(ctx, &later, &files, before, &after)?;
        }
        if let Some(resume) = resume.as_ref().filter(|_| is_recorded) {
            resume.record_file(ctx, &checkpoint.shards()[index].file_name(), &part)?;
        }
        give_name(&part, &path)?;
    }
    output.copy_side_files(ctx)?;
    checkpoint.unchanged()?;

    report.bytes_written = checkpoint.n_bytes();
    let is_kept = target.keep_ledger && !after.active.is_empty();
    if is_kept {
        report.ledger_bytes = ledger_bytes;
    }
    drop(after);
    output.finish_state(is_kept)?;
    if let Some(resume) = resume {
        report.notes.extend(resume.finish(checkpoint)?);
    }
    output.commit()?;
    Ok(report)
}

/// A shard that gets its name when all were judged.
struct Waiting<'a> {
    index: usize,
    /// What is still to be patched.
    later: Vec<Touched<'a>>,
    part: PathBuf,
    path: PathBuf,
    /// Whether a run that is cut short leaves a record of it.
    is_recorded: bool,
}

/// Copies a shard, patching and examining on the way the tensors whose rows lie in one piece; returns the others, examined.
/// `written` gets the hashes of what was written, where they are wanted.
fn rewrite<'a>(
    ctx: &Context<'_>,
    change: &Change<'_>,
    shard: &Shard,
    of_shard: &[Touched<'a>],
    part: &Path,
    examination: &mut Examination<'_, '_>,
    written: &mut Option<Vec<Piece>>,
) -> Result<Vec<Touched<'a>>, MergeError> {
    let hashes = written.is_some();
    // Blocks of very long rows would not fit into memory whole.
    let is_long = |target: &Touched<'_>| ctx.pass_bytes() / 8 < GROUP_ROWS * row_bytes(target);
    let (later, at_once): (Vec<_>, Vec<_>) =
        of_shard.iter().partition(|target| target.layout.transposed || is_long(target));
    let row_blocks_of = |target: &Touched<'_>| RowBlocks {
        tensor: shard.file_range(target.tensor.info),
        row_bytes: row_bytes(target),
        rows: row_blocks(ctx, target, &[change.before, change.after]),
    };
    rewrite_shard(
        ctx,
        shard,
        part,
        pieces(ctx, shard, at_once.iter().map(row_blocks_of)).map(|(range, rows)| {
            let rows = rows.map(|(number, rows)| (&at_once[number], rows));
            (range.clone(), (range.end, rows))
        }),
        |(_, rows)| rows.as_ref().map_or(0, |(target, rows)| change.block_bytes(ctx, target, rows)),
        |(_, rows), bytes| {
            let block = match rows {
                Some((target, rows)) => Some(change.examine_and_patch(ctx, target, rows, bytes)?),
                None => None,
            };
            Ok((block, hashes.then(|| blake3::hash(bytes))))
        },
        |(end, rows), (block, hash)| {
            if let (Some(written), Some(hash)) = (&mut *written, hash) {
                written.push(Piece::new(end, hash));
            }
            match (rows, block) {
                (Some((target, rows)), Some(block)) => examination.push(target, &rows, block),
                _ => Ok(()),
            }
        },
    )?;
    later.iter().try_for_each(|target| examination.examine_on_disk(ctx, target))?;
    Ok(later)
}

fn row_bytes(target: &Touched<'_>) -> u64 {
    target.tensor.info.n_bytes() / target.layout.n_rows()
}

/// Fails before anything is written where the smallest tensor shows that the base is another, or where a finite weight would become
/// infinite: tensors whose deltas are large enough for that are examined, which are none in most merges.
fn refuse_early(
    ctx: &Context<'_>,
    change: &Change<'_>,
    touched: &[Touched<'_>],
    allow_overflow: bool,
) -> Result<(), MergeError> {
    let Some(smallest) = touched.iter().min_by_key(|target| target.tensor.info.n_bytes()) else { return Ok(()) };
    let can_overflow = |target: &&Touched<'_>| {
        !allow_overflow && can_overflow(target.tensor.info.dtype, change.after.largest_sum(target.name))
    };
    let first: Vec<Touched<'_>> =
        touched.iter().filter(|target| target.name == smallest.name || can_overflow(target)).copied().collect();
    let quiet = Context { observer: &Silent, ..*ctx };
    let observed = if first.len() == 1 { &quiet } else { ctx };
    match judge_all(change, &change.examine(observed, &first, None)?, allow_overflow) {
        Ok(()) => Ok(()),
        // Told with all that is wrong.
        Err(_) => judge_all(change, &change.examine(ctx, touched, None)?, allow_overflow),
    }
}

/// Bytes that the ledger and the adapters beside it take at most, while the ledger is being written.
fn state_bytes(after: &Stack, touched: &[Touched<'_>]) -> u64 {
    let adapters: u64 = after.active.iter().map(|active| active.adapter.plain_bytes()).sum();
    let originals = |target: &Touched<'_>| {
        after.nnz(target.name) * target.tensor.info.dtype.bitsize() as u64 / 8 + target.layout.n_rows() / 4
    };
    adapters + 2 * touched.iter().map(originals).sum::<u64>()
}

/// Everything that the output's bytes depend on: the input's files as they are, and the adapters before and after.
fn plan(change: &Change<'_>) -> String {
    let mut plan = String::new();
    for shard in change.checkpoint.shards() {
        plan += &format!("shard {:?}: {}\n", shard.file_name(), shard.stamp());
    }
    for (when, stack) in [("before", change.before), ("after", change.after)] {
        for (id, scale) in stack.entries() {
            plan += &format!("{when} {id} {:016x}\n", scale.to_bits());
        }
    }
    plan
}
