//! The first look: how adapters overlap, and whether they can be of one base.

use std::{collections::BTreeMap, ops::Range};

use serde::Serialize;

use super::{CombineError, input::CombineInput};
use crate::{
    adapter::{AdapterError, DeltaRows},
    checkpoint::{Checkpoint, Context, Printable, for_each_ordered, gather_cost, gather_rows},
    mask::TargetInfo,
    tensor::RowColumns,
};

/// Positions that are read in one piece, and rows.
const PIECE: u64 = 1 << 15;

/// One of the adapters.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct InputReport {
    /// The file's name.
    pub name: String,
    /// Its id.
    pub id: String,
    /// What its deltas are multiplied by, in the file.
    pub scale: f64,
    /// Its weight.
    pub weight: f64,
    /// Deltas.
    pub n_deltas: u64,
    /// Deltas that are not zero after trimming or dropping.
    pub n_kept: u64,
    /// L2 norm of its deltas times its scale.
    pub norm: f64,
}

/// Two of the adapters.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct PairReport {
    /// Which one, from 0.
    pub a: usize,
    /// Which other, from 0.
    pub b: usize,
    /// Positions that both have.
    pub n_shared: u64,
    /// `n_shared` over all positions of either.
    pub jaccard: f64,
    /// Shared positions whose deltas have opposite signs.
    pub n_sign_conflicts: u64,
    /// The cosine over all positions of either, a missing delta being zero; none where one is all zero.
    pub cosine: Option<f64>,
}

/// A tensor that some adapter has.
pub(super) struct CombinedTarget<'a> {
    /// As the first of them describes it.
    pub(super) info: &'a TargetInfo,
    /// Which adapters have it, ascending.
    pub(super) members: Vec<usize>,
    /// Whether all of those have the same positions.
    pub(super) is_alike: bool,
    /// The BLAKE3 of the base's whole tensor, where one of them knows it.
    pub(super) whole: Option<blake3::Hash>,
    /// Its rows, in pieces.
    pub(super) pieces: Vec<Range<u64>>,
}

/// All of it.
pub(super) struct Survey<'a> {
    /// By name.
    pub(super) targets: Vec<CombinedTarget<'a>>,
    pub(super) pairs: Vec<PairReport>,
    pub(super) squares: Vec<f64>,
    /// Positions that any adapter has, that more than one has, and of those where signs disagree.
    pub(super) n_positions: u64,
    pub(super) n_contested: u64,
    pub(super) n_conflicts: u64,
}

/// Sums over a run of rows.
#[derive(Clone, Default)]
struct Sums {
    squares: Vec<f64>,
    /// Per pair: shared positions, conflicts, sum of products.
    pairs: Vec<(u64, u64, f64)>,
    n_positions: u64,
    n_contested: u64,
    n_conflicts: u64,
}

impl<'a> Survey<'a> {
    /// Reads all adapters once, and the base's values at their positions where there is a base.
    pub(super) fn of(
        ctx: &Context<'_>,
        inputs: &'a [CombineInput],
        base: Option<&Checkpoint>,
    ) -> Result<Self, CombineError> {
        let mut targets = match_targets(inputs)?;
        let n = inputs.len();
        let mut all = Sums::new(n);
        ctx.observer.begin("comparing", inputs.iter().map(|input| input.adapter.nnz()).sum());
        for target in &mut targets {
            let mut is_alike = true;
            let mut anchors = vec![blake3::Hasher::new(); target.members.len()];
            for_each_ordered(
                ctx,
                target.pieces.clone(),
                |rows| members_bytes(ctx, inputs, target, rows),
                |rows| survey_rows(ctx, inputs, target, rows, base),
                |_, (sums, alike, anchored): (Sums, bool, Vec<Vec<u8>>)| {
                    all.add(&sums);
                    is_alike &= alike;
                    anchors.iter_mut().zip(&anchored).for_each(|(hasher, bytes)| {
                        hasher.update(bytes);
                    });
                    Ok::<_, CombineError>(())
                },
            )?;
            target.is_alike = is_alike;
            check_bases(inputs, target, base, &anchors)?;
        }
        let norms: Vec<f64> = all.squares.iter().map(|squares| squares.sqrt()).collect();
        let pairs = pairs_of(n)
            .zip(&all.pairs)
            .map(|((a, b), &(n_shared, n_sign_conflicts, products))| {
                let either = inputs[a].adapter.nnz() + inputs[b].adapter.nnz() - n_shared;
                let jaccard = if either == 0 { 1.0 } else { n_shared as f64 / either as f64 };
                let both = norms[a] * norms[b];
                let cosine = (both > 0.0).then(|| (products / both).clamp(-1.0, 1.0));
                PairReport { a, b, n_shared, jaccard, n_sign_conflicts, cosine }
            })
            .collect();
        let Sums { squares, n_positions, n_contested, n_conflicts, .. } = all;
        Ok(Self { targets, pairs, squares, n_positions, n_contested, n_conflicts })
    }
}

/// Every tensor of every adapter, by name.
fn match_targets(inputs: &[CombineInput]) -> Result<Vec<CombinedTarget<'_>>, CombineError> {
    let mut targets: BTreeMap<&str, CombinedTarget<'_>> = BTreeMap::new();
    for (i, input) in inputs.iter().enumerate() {
        for info in input.adapter.targets() {
            let target = targets.entry(&info.name).or_insert_with(|| CombinedTarget {
                info,
                members: Vec::new(),
                is_alike: true,
                whole: None,
                pieces: Vec::new(),
            });
            let other = |what: String| CombineError::OtherBase {
                path: input.adapter.path().to_owned(),
                tensor: info.name.clone(),
                what,
            };
            let first = || Printable::path(inputs[target.members[0]].adapter.path()).to_string();
            if (target.info.dtype, &target.info.shape, target.info.transposed)
                != (info.dtype, &info.shape, info.transposed)
            {
                let what = format!(
                    "it is {:?} {:?}, in {} {:?} {:?}",
                    info.dtype,
                    info.shape,
                    first(),
                    target.info.dtype,
                    target.info.shape
                );
                return Err(other(what));
            }
            if target.whole.is_some_and(|whole| info.blake3.is_some_and(|hash| hash != whole)) {
                return Err(other(format!("it was made from other weights than {}", first())));
            }
            target.whole = target.whole.or(info.blake3);
            target.members.push(i);
        }
    }
    let mut targets: Vec<CombinedTarget<'_>> = targets.into_values().collect();
    for target in &mut targets {
        let nnz = |&i: &usize| inputs[i].adapter.target(&target.info.name).map_or(0, |info| info.nnz);
        let (n_rows, nnz) = (target.info.layout.n_rows(), target.members.iter().map(nnz).sum::<u64>().max(1));
        // A fixed number of rows, whatever the threads and windows are.
        let step = ((u128::from(n_rows) * u128::from(PIECE) / u128::from(nnz)) as u64).clamp(1, PIECE);
        target.pieces = (0..n_rows).step_by(step as usize).map(|row| row..n_rows.min(row + step)).collect();
    }
    Ok(targets)
}

/// Bytes of memory that a run of rows takes, including the results computed from it.
pub(super) fn members_bytes(
    ctx: &Context<'_>,
    inputs: &[CombineInput],
    target: &CombinedTarget<'_>,
    rows: &Range<u64>,
) -> u64 {
    let of_member = |&i: &usize| {
        let adapter = &inputs[i].adapter;
        adapter.rows_bytes(ctx, adapter.target(&target.info.name).expect("a member has the target"), rows)
    };
    // Sums of pairs, and the base's values are read in windows.
    let sums = 32 * (inputs.len() * inputs.len()) as u64;
    target.members.iter().map(of_member).sum::<u64>() + gather_cost(ctx) + sums
}

/// The deltas of a run of rows of all adapters that have the target.
pub(super) fn read_members(
    ctx: &Context<'_>,
    inputs: &[CombineInput],
    target: &CombinedTarget<'_>,
    rows: &Range<u64>,
) -> Result<Vec<DeltaRows>, CombineError> {
    let read = |&i: &usize| {
        let adapter = &inputs[i].adapter;
        let info = adapter.target(&target.info.name).expect("a member has the target");
        Ok(adapter.read_rows(ctx, info, rows.clone())?)
    };
    target.members.iter().map(read).collect()
}

/// Hands every position of a run of rows to `visit`: row (from 0), column, and who has it, as places among `parts` and in their values.
pub(super) fn for_each_position(parts: &[DeltaRows], mut visit: impl FnMut(usize, u32, &[(usize, usize)])) {
    let n_rows = parts.first().map_or(0, |part| part.columns.n_rows());
    let mut here = Vec::with_capacity(parts.len());
    for row in 0..n_rows {
        let mut left: Vec<Range<usize>> = parts.iter().map(|part| part.columns.row_range(row)).collect();
        loop {
            let column =
                |(part, at): (&DeltaRows, &Range<usize>)| (!at.is_empty()).then(|| part.columns.columns()[at.start]);
            let Some(first) = parts.iter().zip(&left).filter_map(column).min() else { break };
            here.clear();
            for (i, (part, at)) in parts.iter().zip(&mut left).enumerate() {
                if column((part, at)) == Some(first) {
                    here.push((i, at.start));
                    at.start += 1;
                }
            }
            visit(row, first, &here);
        }
    }
}

fn survey_rows(
    ctx: &Context<'_>,
    inputs: &[CombineInput],
    target: &CombinedTarget<'_>,
    rows: &Range<u64>,
    base: Option<&Checkpoint>,
) -> Result<(Sums, bool, Vec<Vec<u8>>), CombineError> {
    let parts = read_members(ctx, inputs, target, rows)?;
    let mut sums = Sums::new(inputs.len());
    for_each_position(&parts, |_, _, here| {
        sums.n_positions += 1;
        sums.n_contested += u64::from(here.len() > 1);
        let delta = |&(part, at): &(usize, usize)| {
            let i = target.members[part];
            (i, f64::from(parts[part].values[at]) * inputs[i].adapter.scale())
        };
        let (mut is_up, mut is_down) = (false, false);
        for (j, one) in here.iter().enumerate() {
            let (a, delta_a) = delta(one);
            sums.squares[a] += delta_a * delta_a;
            is_up |= delta_a > 0.0;
            is_down |= delta_a < 0.0;
            for other in &here[j + 1..] {
                let (b, delta_b) = delta(other);
                let pair = &mut sums.pairs[pair_index(inputs.len(), a, b)];
                pair.0 += 1;
                pair.1 += u64::from(delta_a * delta_b < 0.0);
                pair.2 += delta_a * delta_b;
            }
        }
        sums.n_conflicts += u64::from(is_up && is_down);
    });
    let is_alike = parts.windows(2).all(|pair| pair[0].columns == pair[1].columns);
    let at_base = |columns: &RowColumns| -> Result<Vec<u8>, CombineError> {
        match base.map(|base| target.info.find_in(base)).transpose()?.flatten() {
            Some(tensor) => Ok(gather_rows(ctx, tensor, target.info.layout, rows.start, columns)?),
            // A missing weight is reported when all anchors are compared.
            None => Ok(Vec::new()),
        }
    };
    let anchored = parts.iter().map(|part| at_base(&part.columns)).collect::<Result<_, _>>()?;
    ctx.observer.advance(parts.iter().map(|part| part.columns.nnz() as u64).sum());
    Ok((sums, is_alike, anchored))
}

/// Fails where the adapters that have a target are not all of one base, or that cannot be told.
fn check_bases(
    inputs: &[CombineInput],
    target: &CombinedTarget<'_>,
    base: Option<&Checkpoint>,
    anchors: &[blake3::Hasher],
) -> Result<(), CombineError> {
    let name = &target.info.name;
    let anchor = |i: usize| inputs[i].adapter.target(name).expect("a member has the target").anchor;
    let path = |i: usize| inputs[i].adapter.path().to_owned();
    if let Some(base) = base {
        for (&i, found) in target.members.iter().zip(anchors) {
            if found.finalize() != anchor(i) {
                return Err(AdapterError::other_base("it", &path(i), name, inputs[i].adapter.base(), base).into());
            }
        }
        return Ok(());
    }
    let first = target.members[0];
    if !target.is_alike {
        return Err(CombineError::NeedsBase { path: path(first), tensor: name.clone() });
    }
    match target.members.iter().find(|&&i| anchor(i) != anchor(first)) {
        None => Ok(()),
        Some(&i) => {
            let other = Printable::path(inputs[first].adapter.path()).to_string();
            let what = format!(
                "it was made from other values at the same positions than {other}: they are of different bases"
            );
            Err(CombineError::OtherBase { path: path(i), tensor: name.clone(), what })
        }
    }
}

fn pairs_of(n: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..n).flat_map(move |a| (a + 1..n).map(move |b| (a, b)))
}

/// Where the pair `a < b` of `n` stands among all pairs.
fn pair_index(n: usize, a: usize, b: usize) -> usize {
    a * (2 * n - a - 1) / 2 + b - a - 1
}

impl Sums {
    fn new(n: usize) -> Self {
        Self { squares: vec![0.0; n], pairs: vec![(0, 0, 0.0); n * (n - 1) / 2], ..Self::default() }
    }

    fn add(&mut self, next: &Self) {
        self.squares.iter_mut().zip(&next.squares).for_each(|(mine, theirs)| *mine += theirs);
        for (mine, theirs) in self.pairs.iter_mut().zip(&next.pairs) {
            *mine = (mine.0 + theirs.0, mine.1 + theirs.1, mine.2 + theirs.2);
        }
        self.n_positions += next.n_positions;
        self.n_contested += next.n_contested;
        self.n_conflicts += next.n_conflicts;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_numbered_in_their_order() {
        for n in 2..6 {
            let indices: Vec<usize> = pairs_of(n).map(|(a, b)| pair_index(n, a, b)).collect();
            assert_eq!(indices, (0..n * (n - 1) / 2).collect::<Vec<_>>());
        }
    }
}
