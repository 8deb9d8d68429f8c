//! Taking adapters out again: the others are merged anew, from the originals.

use std::{collections::BTreeMap, path::Path};

use super::{
    LowRankOptions,
    bounds::Bound,
    compute::{Computer, row_blocks},
    plan::{Plan, Target},
    record::{LowRankRecord, RecordFolder, RowsHasher, record_of},
    sources::Source,
    write::Job,
};
use crate::{
    adapter::AdapterId,
    backend::Merger,
    checkpoint::{Checkpoint, CheckpointError, Context, Printable, TensorRef, for_each_ordered, window_cost},
    merge::{MergeError, MergeReport, Which, verify::open_base},
    tensor::dtype_name,
    weights::WeightMap,
};

/// Takes adapters out of a checkpoint that holds a low-rank merge, as a new checkpoint.
///
/// The originals come from `base`, or, where the merge kept them, from beside the checkpoint. They are hashed and compared with
/// what was recorded before anything is written. With all adapters taken out every byte of the base returns.
///
/// # Errors
/// [`MergeError`]: a base that is another, no base where one is needed; nothing is left at the output.
pub fn undo_low_rank(
    ctx: &Context<'_>,
    path: &Path,
    which: &Which,
    base: Option<&Path>,
    options: &LowRankOptions,
) -> Result<MergeReport, MergeError> {
    let merged = Checkpoint::open(path)?;
    let refused = |what: String| MergeError::Refused { path: path.to_owned(), what };
    let (folder, record) =
        record_of(&merged)?.ok_or_else(|| refused("nothing to take out: it holds no low-rank merge".to_owned()))?;
    let originals = open_originals(&folder, &record, base, path)?;
    check_originals(ctx, &originals, &record)?;
    let mut sources = open_recorded(ctx, &folder, &record)?;
    let before: Vec<String> = sources.iter().map(|source| source.id.to_string()).collect();
    match which {
        Which::All => sources.clear(),
        Which::Some(ids) => {
            let absent = |id: &&AdapterId| !sources.iter().any(|source| source.id == **id);
            if let Some(id) = ids.iter().find(absent) {
                return Err(refused(format!("adapter {} is not merged into it", id.short())));
            }
            sources.retain(|source| !ids.contains(&source.id));
        }
    }
    let plan = restoring_plan(&merged, &originals, &sources, &record)?;
    let job = Job {
        copied: &merged,
        originals: &originals,
        sources: &sources,
        plan: &plan,
        computer: Computer::new(&plan, Merger::cpu()),
        bounds: vec![Bound::default(); plan.targets.len()],
        // What was let in must come out.
        allow_overflow: true,
        base: record.base.clone(),
        reading: record.reading.clone(),
    };
    let mut report = job.run(ctx, options)?;
    let stays = |id: &&String| sources.iter().any(|source| source.id.to_string() == **id);
    report.removed = before.iter().filter(|id| !stays(id)).cloned().collect();
    if sources.is_empty() {
        report.kinds.clear();
    }
    Ok(report)
}

/// The checkpoint that has the originals.
pub(super) fn open_originals(
    folder: &RecordFolder,
    record: &LowRankRecord,
    base: Option<&Path>,
    path: &Path,
) -> Result<Checkpoint, MergeError> {
    match base {
        Some(base) => open_base(base),
        None if record.has_originals => Ok(Checkpoint::open(&folder.originals()?)?),
        None => Err(MergeError::NeedsBase { path: path.to_owned(), base: record.base.clone() }),
    }
}

/// The recorded adapters, from their copies, proven to be those that were merged.
pub(super) fn open_recorded(
    ctx: &Context<'_>,
    folder: &RecordFolder,
    record: &LowRankRecord,
) -> Result<Vec<Source>, MergeError> {
    let sources = Source::open_all(ctx, &folder.inputs(record)?, None)?;
    let same = sources.iter().zip(&record.active).all(|(source, active)| source.id.to_string() == active.id);
    match same {
        true => Ok(sources),
        false => {
            Err(folder.bad("a copy of an adapter is not the one that was merged: its content does not match its id"))
        }
    }
}

/// Fails where the tensors of `originals` are not those that were merged into.
pub(super) fn check_originals(
    ctx: &Context<'_>,
    originals: &Checkpoint,
    record: &LowRankRecord,
) -> Result<(), MergeError> {
    ctx.observer.begin("checking the originals", record.n_original_bytes());
    for (name, target) in &record.targets {
        let wrong = |what: String| MergeError::Refused {
            path: originals.root().to_owned(),
            what: format!("\"{}\": {what}: not the base of this merge", Printable(name)),
        };
        let tensor = originals.tensor(name).ok_or_else(|| wrong("there is no such tensor".to_owned()))?;
        if dtype_name(tensor.info.dtype) != target.dtype || tensor.info.shape != target.shape {
            return Err(wrong(format!("it is {} {:?}", dtype_name(tensor.info.dtype), tensor.info.shape)));
        }
        if hash_of(ctx, tensor, target.n_columns)? != target.base {
            return Err(wrong("its values are others".to_owned()));
        }
    }
    Ok(originals.unchanged()?)
}

/// The hash of a tensor, as records have it.
pub(super) fn hash_of(ctx: &Context<'_>, tensor: TensorRef<'_>, n_columns: u64) -> Result<String, MergeError> {
    let n_elements = tensor.info.n_elements();
    if n_columns == 0 || !n_elements.is_multiple_of(n_columns) || n_elements == 0 {
        let what = format!("shape {:?} has no rows of {n_columns}", tensor.info.shape);
        return Err(CheckpointError::bad_tensor(tensor.shard.path(), &tensor.info.name, what).into());
    }
    let n_rows = n_elements / n_columns;
    let row_bytes = tensor.info.n_bytes() / n_rows;
    let mut hasher = RowsHasher::default();
    for_each_ordered(
        ctx,
        row_blocks(ctx, n_rows, n_columns),
        |rows| window_cost((rows.end - rows.start) * row_bytes),
        |rows| {
            let window = tensor.window(ctx, rows.start * row_bytes..rows.end * row_bytes)?;
            let groups = RowsHasher::groups(&window, row_bytes);
            tensor.shard.confirm(&window)?;
            ctx.observer.advance(window.len() as u64);
            Ok(groups)
        },
        |_, groups| {
            hasher.push(&groups);
            Ok::<_, MergeError>(())
        },
    )?;
    Ok(hasher.finish())
}

/// The plan of `sources`, and, for every other recorded tensor, nothing but its original.
pub(super) fn restoring_plan<'a>(
    merged: &'a Checkpoint,
    originals: &'a Checkpoint,
    sources: &'a [Source],
    record: &LowRankRecord,
) -> Result<Plan<'a>, MergeError> {
    let map = WeightMap::new(merged, record.reading.answers())?;
    let mut plan = Plan::new(&map, originals, sources, &record.reading)?;
    let mut targets: BTreeMap<String, Target<'a>> =
        plan.targets.drain(..).map(|target| (target.name().to_owned(), target)).collect();
    for (name, recorded) in &record.targets {
        if targets.contains_key(name) {
            continue;
        }
        let same = |tensor: &TensorRef<'_>| {
            dtype_name(tensor.info.dtype) == recorded.dtype && tensor.info.shape == recorded.shape
        };
        let Some(tensor) = merged.tensor(name).filter(same) else {
            let what = format!("\"{}\": there is no such tensor any more, or it is another", Printable(name));
            return Err(MergeError::Refused { path: merged.root().to_owned(), what });
        };
        let n_columns = recorded.n_columns;
        let n_rows = tensor.info.n_elements() / n_columns;
        let target = Target { is_simple: true, ..Target::untouched(tensor, n_rows, n_columns) };
        targets.insert(name.clone(), target);
    }
    plan.targets = targets.into_values().collect();
    Ok(plan)
}
