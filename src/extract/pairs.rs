//! Tensors of two checkpoints, paired.

use std::{collections::BTreeMap, ops::Range};

use super::{ExtractError, ExtractOptions};
use crate::{
    checkpoint::{Checkpoint, CheckpointError, CodedLayout, Context, Printable, RowScan, TensorRef, window_cost},
    mask::{MaskError, ROW_BYTES, Read, select_rows},
    tensor::dtype_name,
    weights::{Answers, Pairing, WeightMap},
};

/// A tensor of the base and the same of the tuned checkpoint.
pub(super) struct TensorPair<'a> {
    pub(super) base: TensorRef<'a>,
    pub(super) tuned: TensorRef<'a>,
    /// Both as rows, or why the tensor takes no part.
    pub(super) rows: Result<(RowScan<'a>, RowScan<'a>), String>,
    /// Whether it was the request that left the tensor out.
    pub(super) is_unwanted: bool,
}

impl TensorPair<'_> {
    pub(super) fn name(&self) -> &str {
        &self.base.info.name
    }

    /// Runs of rows, or of bytes where the tensor takes no part, of at most about `n_bytes` each.
    pub(super) fn runs(&self, n_bytes: u64) -> impl Iterator<Item = Range<u64>> + use<> {
        let (end, step) = match &self.rows {
            Ok((scan, _)) => (scan.layout.n_rows(), (n_bytes / scan.row_bytes().max(1)).max(1)),
            Err(_) => (self.base.info.n_bytes(), n_bytes.max(1)),
        };
        (0..end).step_by(step as usize).map(move |start| start..end.min(start + step))
    }

    /// Bytes of memory that a run of both takes, with scratch for one row.
    pub(super) fn read_bytes(&self, run: &Range<u64>) -> u64 {
        /// Of one change: its column, and both weights.
        const CHANGE_BYTES: u64 = 24;
        let n = run.end - run.start;
        match &self.rows {
            Ok((scan, _)) => 2 * window_cost(n * scan.read_bytes()) + scan.layout.d_in * CHANGE_BYTES + n * ROW_BYTES,
            Err(_) => 2 * window_cost(n),
        }
    }

    /// Whether a run of bytes of a tensor that takes no part is the same.
    pub(super) fn is_same(&self, ctx: &Context<'_>, bytes: Range<u64>) -> Result<bool, CheckpointError> {
        Ok(*self.base.window(ctx, bytes.clone())? == *self.tuned.window(ctx, bytes)?)
    }
}

/// Pairs all tensors by name.
///
/// # Errors
/// [`ExtractError::Unlike`] lists tensors that one of the two has not, or not alike.
pub(super) fn pairs<'a>(
    base: &'a Checkpoint,
    tuned: &'a Checkpoint,
    options: &ExtractOptions,
) -> Result<Vec<TensorPair<'a>>, ExtractError> {
    let answers = Answers { axes: options.axes.clone(), ..Answers::default() };
    let map = WeightMap::new(base, answers)?;
    map.check_axes(std::iter::empty()).map_err(MaskError::Usage)?;
    let found = map.pairs(&WeightMap::new(tuned, Answers::default())?)?;
    let mut problems = Vec::new();
    problems.extend(found.only_a.iter().map(|a| format!("\"{}\" was removed", Printable(&a.info.name))));
    let mut matched = Vec::new();
    for Pairing { a, b } in found.both {
        let layouts = [a, b].map(|tensor| tensor.layout().map(CodedLayout::name));
        if b.info.is_like(a.info) && layouts[0] == layouts[1] {
            matched.push((a, b));
            continue;
        }
        let stored = |tensor: TensorRef<'_>, layout: Option<&str>| {
            layout.map_or_else(|| dtype_name(tensor.info.dtype), str::to_owned)
        };
        let (from, to) = (stored(a, layouts[0]), stored(b, layouts[1]));
        let name = Printable(&a.info.name);
        problems.push(format!("\"{name}\": {from} {:?} became {to} {:?}", a.info.shape, b.info.shape));
    }
    problems.extend(
        found
            .only_b
            .iter()
            .chain(found.copies_b.iter().map(|copy| &copy.b))
            .map(|b| format!("\"{}\" was added", Printable(&b.info.name))),
    );
    if !problems.is_empty() {
        return Err(ExtractError::Unlike { tuned: tuned.root().to_owned(), base: base.name(), problems });
    }
    // An exact adapter takes vectors too; nothing of them can be chosen.
    let read: Read<'a> = if options.k.is_some() { TensorRef::rows } else { TensorRef::any_rows };
    let wanted = wanted(&map, options, read)?;
    let pair = |(a, b): (TensorRef<'a>, TensorRef<'a>)| {
        let of_name = wanted.as_ref().map(|wanted| wanted.get(a.info.name.as_str()));
        let layout = match of_name {
            Some(Some(scan)) => Ok(scan.layout),
            Some(None) if !options.targets.is_empty() => Err("not among the targets".to_owned()),
            _ => read(&a, false).and_then(|layout| b.numbers().map(|()| layout)).map_err(|e| match e {
                CheckpointError::BadTensor { what, .. } => what,
                other => other.to_string(),
            }),
        };
        let is_unwanted = !options.targets.is_empty() && of_name.is_some_and(|scan| scan.is_none());
        let scan = |tensor| move |layout| RowScan { tensor, layout };
        let rows = layout.map(|layout| (scan(a)(layout), scan(b)(layout)));
        TensorPair { base: a, tuned: b, rows, is_unwanted }
    };
    Ok(matched.into_iter().map(pair).collect())
}

/// The tensors that patterns name, where there are patterns.
fn wanted<'a>(
    map: &WeightMap<'a>,
    options: &ExtractOptions,
    read: Read<'a>,
) -> Result<Option<BTreeMap<&'a str, RowScan<'a>>>, ExtractError> {
    // An exact adapter is the same whichever way its rows are read.
    if options.targets.is_empty() && options.transposed.is_empty() && options.k.is_none() {
        return Ok(None);
    }
    let every = ["*".to_owned()];
    let patterns = if options.targets.is_empty() { &every[..] } else { &options.targets };
    let selection = select_rows(map, patterns, &options.transposed, read)?;
    Ok(Some(selection.targets.into_iter().map(|scan| (scan.tensor.info.name.as_str(), scan)).collect()))
}
