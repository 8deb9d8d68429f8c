//! The proof of a low-rank merge: it is computed again and compared.

use std::path::Path;

use super::{
    compute::{Computer, merge_cost, merge_rows, row_blocks},
    norms::column_factors,
    record::record_of,
    sources::Source,
    undo::{check_originals, hash_of, open_originals, open_recorded, restoring_plan},
};
use crate::{
    backend::Merger,
    checkpoint::{Checkpoint, Context, Printable, for_each_ordered, window_cost},
    merge::{AnchorReport, MergeError, VerifyReport, verify::compare_other_tensors},
};

/// Wrong weights that are counted one tensor after the other; problems that are listed.
const MOST_PROBLEMS: usize = 20;

/// Proves a checkpoint that holds a low-rank merge.
///
/// With the base, or with originals beside the checkpoint: every touched tensor is computed again from originals that are proven by
/// their hashes, and compared bit for bit; with the base, every other tensor is compared with it too. With neither: every touched
/// tensor is what the merge wrote, by its hash.
///
/// # Errors
/// [`MergeError`] where it cannot be checked; a checkpoint that is wrong is a report whose `ok` is false.
pub fn verify_low_rank(ctx: &Context<'_>, path: &Path, base: Option<&Path>) -> Result<VerifyReport, MergeError> {
    let merged = Checkpoint::open(path)?;
    let refused = |what: &str| MergeError::Refused { path: path.to_owned(), what: what.to_owned() };
    let (folder, record) = record_of(&merged)?.ok_or_else(|| refused("it holds no low-rank merge"))?;
    let sources = open_recorded(ctx, &folder, &record)?;
    let mut report = VerifyReport {
        ok: false,
        active: Vec::new(),
        n_touched: 0,
        n_wrong: 0,
        anchors: Vec::new(),
        base_compared: base.is_some(),
        bytes_compared: 0,
        problems: Vec::new(),
    };
    let mut n_tensors = vec![record.targets.len(); sources.len()];
    if base.is_some() || record.has_originals {
        let originals = open_originals(&folder, &record, base, path)?;
        check_originals(ctx, &originals, &record)?;
        let plan = restoring_plan(&merged, &originals, &sources, &record)?;
        n_tensors.clone_from(&plan.n_tensors);
        let factors = column_factors(ctx, &originals, &plan)?;
        let computer = Computer::new(&plan, Merger::cpu());
        ctx.observer.begin("computing again", record.n_original_bytes());
        for (target, factors) in plan.targets.iter().zip(&factors) {
            let name = target.name();
            let original = originals.tensor(name).expect("the originals were checked");
            let width = target.tensor.info.dtype.bitsize() / 8;
            let (mut n_wrong, row_bytes) = (0u64, target.row_bytes());
            for_each_ordered(
                ctx,
                row_blocks(ctx, target.n_rows, target.n_columns),
                |rows| 3 * window_cost((rows.end - rows.start) * row_bytes) + merge_cost(ctx, target, rows),
                |rows| {
                    let range = rows.start * row_bytes..rows.end * row_bytes;
                    let window = original.window(ctx, range.clone())?;
                    let mut expected = window.to_vec();
                    original.shard.confirm(&window)?;
                    merge_rows(ctx, &computer, target, factors.as_deref(), rows, &mut expected)?;
                    let window = target.tensor.window(ctx, range)?;
                    let differ = |(a, b): &(&[u8], &[u8])| a != b;
                    let n = window.chunks_exact(width).zip(expected.chunks_exact(width)).filter(differ).count();
                    target.tensor.shard.confirm(&window)?;
                    ctx.observer.advance(expected.len() as u64);
                    Ok(n as u64)
                },
                |_, n| {
                    n_wrong += n;
                    Ok::<_, MergeError>(())
                },
            )?;
            report.n_touched += target.tensor.info.n_elements();
            report.n_wrong += n_wrong;
            if n_wrong > 0 && report.problems.len() < MOST_PROBLEMS {
                let what =
                    format!("\"{}\": {n_wrong} weights are not what the merge makes of the originals", Printable(name));
                report.problems.push(what);
            }
        }
        if base.is_some() {
            let is_touched = |name: &str| record.targets.contains_key(name);
            report.bytes_compared = compare_other_tensors(ctx, &merged, &originals, is_touched, &mut report.problems)?;
        }
        originals.unchanged()?;
    } else {
        ctx.observer.begin("hashing", record.n_original_bytes());
        for (name, target) in &record.targets {
            let found = merged.tensor(name).filter(|t| t.info.shape == target.shape);
            let hash = found.map(|found| hash_of(ctx, found, target.n_columns)).transpose()?;
            report.n_touched += target.shape.iter().product::<u64>();
            if hash.as_ref() != Some(&target.merged) && report.problems.len() < MOST_PROBLEMS {
                report.problems.push(format!("\"{}\": is not what the merge left there", Printable(name)));
            }
        }
    }
    merged.unchanged()?;
    report.active = sources.iter().zip(&n_tensors).map(|(source, &n)| source.entry(n)).collect();
    // That the originals are the base's was proven above, for all adapters at once.
    let anchors = |(source, &n_tensors): (&Source, &usize)| AnchorReport {
        id: source.id.to_string(),
        n_tensors,
        n_matching: n_tensors,
    };
    report.anchors = sources.iter().zip(&n_tensors).map(anchors).collect();
    report.ok = report.problems.is_empty();
    Ok(report)
}
