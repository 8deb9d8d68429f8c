//! A block of merged rows, from the originals.

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use super::prepared::Prepared;
use crate::{
    adapter::DeltaRows,
    backend::{Merger, PatchCounts, add_low_rank, merge_sums},
    checkpoint::{CheckpointError, Context},
    merge::{
        MergeError,
        factors::read_f32,
        plan::{Does, Magnitude, MergeTarget, Product, Term},
    },
    tensor::{Accumulator, Dtype, Float, with_float},
};

/// Rows that are hashed, and whose squares are summed, in one piece, whatever the size of blocks.
pub(in crate::merge) const HASH_ROWS: u64 = 16;

/// Blocks of a tensor's rows, each but the last a multiple of [`HASH_ROWS`].
pub(in crate::merge) fn row_blocks(
    ctx: &Context<'_>,
    n_rows: u64,
    n_columns: u64,
) -> impl Iterator<Item = Range<u64>> + Send + use<> {
    // Sums in float32 take about half a window.
    let most = ctx.window_bytes() / 8 / n_columns.max(1);
    let step = (most / HASH_ROWS * HASH_ROWS).max(HASH_ROWS);
    (0..n_rows).step_by(step as usize).map(move |first| first..n_rows.min(first + step))
}

/// Bytes of memory that [`merge_rows`] takes at most beside `bytes`.
pub(in crate::merge) fn merge_cost(ctx: &Context<'_>, target: &MergeTarget<'_>, rows: &Range<u64>) -> u64 {
    let n_elements = (rows.end - rows.start) * target.n_columns;
    // Sums; and, where more than one product may meet, wider values and flags, twice where adapters are computed apart.
    let element_bytes = match target.is_simple() {
        true => 4,
        false if has_contributions(target) => 4 + 2 * (8 + 1) + 8,
        false => 4 + 8 + 1 + 8,
    };
    let sparse = target.sparse().filter(|(.., sparse)| !sparse.transposed);
    let sparse = sparse.map(|(_, adapter, sparse)| adapter.rows_bytes(ctx, sparse, rows)).sum::<u64>();
    // Factors as they are stored and widened, of a part of the rank.
    let rank = rank_step(ctx, rows.end - rows.start, target.n_columns);
    let factors = 2 * 4 * rank * (rows.end - rows.start + target.n_columns);
    n_elements * element_bytes + sparse + factors
}

/// Whether an adapter's change has to be computed by itself before it is added to those of others.
fn has_contributions(target: &MergeTarget<'_>) -> bool {
    target.n_sources() > 1 && target.terms.iter().any(|term| term.magnitude().is_some())
}

/// As much of a product's rank at once as makes factors of half a window.
fn rank_step(ctx: &Context<'_>, n_rows: u64, n_columns: u64) -> u64 {
    (ctx.window_bytes() / 8 / n_rows.max(n_columns)).max(1)
}

/// Makes the originals in `bytes`, the `rows` of a target, into merged weights. `computer` is the job's.
///
/// Memory: about four times `bytes` for 16-bit weights, and factors of about a window.
pub(in crate::merge) fn merge_rows(
    ctx: &Context<'_>,
    computer: &Computer<'_>,
    prepared: &Prepared<'_>,
    rows: &Range<u64>,
    bytes: &mut [u8],
) -> Result<PatchCounts, MergeError> {
    let target = prepared.target;
    if target.is_simple() {
        return merge_products(ctx, computer, target, rows, bytes);
    }
    computer.merger.count_on_cpu((rows.end - rows.start) * target.n_columns);
    with_float!(target.tensor.info.dtype, T => {
        Block::<T>::new(target, rows.clone(), bytes).merge(ctx, prepared, bytes)
    }, else unreachable!("targets are floats"))
}

/// The same where each row gets one product at most.
fn merge_products(
    ctx: &Context<'_>,
    computer: &Computer<'_>,
    target: &MergeTarget<'_>,
    rows: &Range<u64>,
    bytes: &mut [u8],
) -> Result<PatchCounts, MergeError> {
    let row_bytes = target.row_bytes() as usize;
    let mut counts = PatchCounts::default();
    for term in &target.terms {
        let Does::LowRank(product) = &term.does else { unreachable!("a simple target has products alone") };
        let Some(shared) = intersection(rows, &product.rows()) else { continue };
        let part = (shared.start - rows.start) as usize * row_bytes..(shared.end - rows.start) as usize * row_bytes;
        let (dtype, bytes) = (target.tensor.info.dtype, &mut bytes[part]);
        if let Some(merged) = computer.merge(ctx, product, &shared, target.n_columns, (dtype, bytes))? {
            counts.add(merged);
            continue;
        }
        computer.merger.count_on_cpu((shared.end - shared.start) * target.n_columns);
        let sums = sums_of(ctx, product, &shared)?;
        counts.add(merge_sums(dtype, bytes, &sums, product.scale));
    }
    Ok(counts)
}

/// Who computes, for the length of one change.
pub(in crate::merge) struct Computer<'a> {
    merger: Merger<'a>,
    /// The second factors that a GPU was given last, and the place of their product in the plan.
    held: Mutex<Vec<(usize, Arc<Vec<f32>>)>>,
}

/// How many second factors are held: threads that finish a tensor, and threads that begin the next.
const MAX_HELD: usize = 2;

impl<'a> Computer<'a> {
    /// For targets that stay where they are.
    pub(in crate::merge) fn new(merger: Merger<'a>) -> Self {
        Self { merger, held: Mutex::default() }
    }

    /// Merges on a GPU, or leaves all as it was: where there is none, it does not take the type, or the factors are too large for the
    /// memory of either.
    fn merge(
        &self,
        ctx: &Context<'_>,
        product: &Product<'_>,
        rows: &Range<u64>,
        n_columns: u64,
        (dtype, bytes): (Dtype, &mut [u8]),
    ) -> Result<Option<PatchCounts>, MergeError> {
        let (rank, n_rows) = (product.rank, rows.end - rows.start);
        let fits = 4 * rank * n_rows <= ctx.window_bytes() && 4 * rank * n_columns <= ctx.max_memory / 16;
        if !fits || rank == 0 || !self.merger.supports(dtype) {
            return Ok(None);
        }
        ctx.check()?;
        let v = self.second_factor(product, n_columns)?;
        let u = product.u.read(rows.start - product.first_row..rows.end - product.first_row, 0..rank)?;
        Ok(self.merger.merge(dtype, bytes, (&u, &v, rank as usize), product.scale)?)
    }

    fn second_factor(&self, product: &Product<'_>, n_columns: u64) -> Result<Arc<Vec<f32>>, CheckpointError> {
        let place = std::ptr::from_ref(product).addr();
        // Read under the lock: the other threads want the same.
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, v)) = held.iter().find(|(of, _)| *of == place) {
            return Ok(Arc::clone(v));
        }
        if held.len() == MAX_HELD {
            held.remove(0);
        }
        let v = Arc::new(product.v.read(0..product.rank, 0..n_columns)?);
        held.push((place, Arc::clone(&v)));
        Ok(v)
    }
}

fn intersection(a: &Range<u64>, b: &Range<u64>) -> Option<Range<u64>> {
    let both = a.start.max(b.start)..a.end.min(b.end);
    (both.start < both.end).then_some(both)
}

/// The product's sums for `rows` of the tensor, `[rows, columns.n]`.
fn sums_of(ctx: &Context<'_>, product: &Product<'_>, rows: &Range<u64>) -> Result<Vec<f32>, CheckpointError> {
    let n_columns = product.columns.n;
    let own = rows.start - product.first_row..rows.end - product.first_row;
    let n_rows = own.end - own.start;
    let mut sums = vec![0.0; (n_rows * n_columns) as usize];
    let step = rank_step(ctx, n_rows, n_columns).min(product.rank);
    for first in (0..product.rank).step_by(step as usize) {
        ctx.check()?;
        let part = first..product.rank.min(first + step);
        let u = product.u.read(own.clone(), part.clone())?;
        let v = product.v.read(part.clone(), 0..n_columns)?;
        add_low_rank(&u, &v, (part.end - part.start) as usize, n_columns as usize, &mut sums);
    }
    Ok(sums)
}

/// Bits of what became of an element.
const TOUCHED: u8 = 1;
const NONZERO: u8 = 2;
/// Its original does not matter, not even where it is a NaN.
const REPLACED: u8 = 4;

/// Rows in the accumulator's type.
pub(super) struct Block<'t, 'a, T: Float> {
    target: &'t MergeTarget<'a>,
    rows: Range<u64>,
    values: Vec<T::Acc>,
    flags: Vec<u8>,
}

impl<'t, 'a, T: Float> Block<'t, 'a, T> {
    /// The originals.
    pub(super) fn new(target: &'t MergeTarget<'a>, rows: Range<u64>, bytes: &[u8]) -> Self {
        let values: Vec<T::Acc> = bytes.chunks_exact(T::BYTES).map(|e| T::from_le(e).widen()).collect();
        let flags = vec![0; values.len()];
        Self { target, rows, values, flags }
    }

    fn merge(
        mut self,
        ctx: &Context<'_>,
        prepared: &Prepared<'_>,
        bytes: &mut [u8],
    ) -> Result<PatchCounts, MergeError> {
        let terms = &self.target.terms;
        let has_others = self.target.n_sources() > 1;
        for (own, of_source) in terms.chunk_by(|a, b| a.source.id == b.source.id).scan(0, |at, own| {
            let first = *at;
            *at += own.len();
            Some((first, own))
        }) {
            match has_others && of_source.iter().any(|term| term.magnitude().is_some()) {
                true => {
                    let mut alone = Self::new(self.target, self.rows.clone(), bytes);
                    alone.apply(ctx, prepared, own, of_source)?;
                    self.add_contribution(&alone, bytes);
                }
                false => self.apply(ctx, prepared, own, of_source)?,
            }
        }
        Ok(self.round(bytes))
    }

    /// What one adapter makes of the values; its terms begin with the target's term `first`.
    fn apply(
        &mut self,
        ctx: &Context<'_>,
        prepared: &Prepared<'_>,
        first: usize,
        terms: &[Term<'_>],
    ) -> Result<(), MergeError> {
        // What stands in for the originals comes first.
        for term in terms {
            if let Does::Full { shard, info } = &term.does {
                ctx.check()?;
                let n_columns = self.target.n_columns;
                let full = read_f32(shard, info, self.rows.start * n_columns..self.rows.end * n_columns)?;
                for ((value, flag), full) in self.values.iter_mut().zip(&mut self.flags).zip(full) {
                    let full = T::Acc::from_f64(f64::from(full));
                    *flag |= TOUCHED | REPLACED | if full == *value { 0 } else { NONZERO };
                    *value = full;
                }
            }
        }
        for (index, term) in (first..).zip(terms) {
            match &term.does {
                Does::Full { .. } => {}
                Does::Rows(rows) => {
                    for &(row, of_tensor) in rows.among(&self.rows) {
                        let at = self.elements(&(row..row + 1));
                        let values = self.values[at.clone()].iter_mut().zip(&mut self.flags[at]);
                        for ((value, flag), new) in values.zip(rows.read(of_tensor)?) {
                            let new = T::Acc::from_f64(f64::from(new));
                            *flag |= TOUCHED | REPLACED | if new == *value { 0 } else { NONZERO };
                            *value = new;
                        }
                    }
                }
                Does::LowRank(product) => {
                    let Some(shared) = intersection(&self.rows, &product.rows()) else { continue };
                    self.add_product(ctx, product, &shared)?;
                    match &product.magnitude {
                        None => {}
                        Some(magnitude) if magnitude.of_columns => self.scale_columns(prepared.column_factors(index)),
                        Some(magnitude) => self.scale_rows(product, magnitude, &shared)?,
                    }
                }
                Does::Sparse { adapter, target } => {
                    let scale = T::Acc::from_f64(term.source.scale);
                    match prepared.scattered(index) {
                        Some(scattered) => {
                            let n_columns = self.target.n_columns;
                            let start = self.rows.start * n_columns;
                            for (flat, delta) in scattered.of(start..self.rows.end * n_columns) {
                                self.add_delta((flat - start) as usize, T::Acc::from_f64(f64::from(delta)), scale);
                            }
                        }
                        None => self.add_deltas(&adapter.read_rows(ctx, target, self.rows.clone())?, scale),
                    }
                }
                Does::Bias { shard, info, scale } => {
                    let bias = read_f32(shard, info, self.rows.clone())?;
                    let at = 0..bias.len();
                    self.add(at, bias.iter().map(|bias| bias * scale));
                }
            }
        }
        Ok(())
    }

    /// Adds what an adapter by itself makes of the originals, which are in `bytes`, less the originals.
    fn add_contribution(&mut self, alone: &Self, bytes: &[u8]) {
        let minus = T::Acc::from_f64(-1.0);
        let originals = bytes.chunks_exact(T::BYTES).map(|e| T::from_le(e).widen());
        let own = alone.values.iter().zip(&alone.flags);
        for (((value, flag), original), (&alone, &touched)) in
            self.values.iter_mut().zip(&mut self.flags).zip(originals).zip(own)
        {
            if touched & TOUCHED != 0 {
                *value = value.add(alone.add(original.mul(minus)));
                *flag |= touched;
            }
        }
    }

    /// Adds a product to `rows` of the tensor.
    pub(super) fn add_product(
        &mut self,
        ctx: &Context<'_>,
        product: &Product<'_>,
        rows: &Range<u64>,
    ) -> Result<(), CheckpointError> {
        let sums = sums_of(ctx, product, rows)?;
        let columns = product.columns;
        if columns.is_all() {
            self.add(self.elements(rows), sums.iter().map(|sum| sum * product.scale));
            return Ok(());
        }
        for (row, sums) in (rows.start..).zip(sums.chunks_exact(columns.n as usize)) {
            let start = self.elements(&(row..row + 1)).start + columns.first as usize;
            for (at, sum) in (start..).step_by(columns.step as usize).zip(sums) {
                self.add(at..at + 1, std::iter::once(sum * product.scale));
            }
        }
        Ok(())
    }

    fn elements(&self, rows: &Range<u64>) -> Range<usize> {
        let n_columns = self.target.n_columns as usize;
        (rows.start - self.rows.start) as usize * n_columns..(rows.end - self.rows.start) as usize * n_columns
    }

    fn add(&mut self, at: Range<usize>, deltas: impl Iterator<Item = f32>) {
        for ((value, flag), delta) in self.values[at.clone()].iter_mut().zip(&mut self.flags[at]).zip(deltas) {
            *value = value.add(T::Acc::from_f64(f64::from(delta)));
            *flag |= TOUCHED | if delta == 0.0 { 0 } else { NONZERO };
        }
    }

    fn add_deltas(&mut self, deltas: &DeltaRows, scale: T::Acc) {
        for row in 0..deltas.columns.n_rows() {
            let start = row * self.target.n_columns as usize;
            for (&column, at) in deltas.columns.row(row).iter().zip(deltas.columns.row_range(row)) {
                self.add_delta(start + column as usize, T::Acc::from_f64(f64::from(deltas.values[at])), scale);
            }
        }
    }

    fn add_delta(&mut self, element: usize, delta: T::Acc, scale: T::Acc) {
        let zero = T::Acc::from_f64(0.0);
        self.values[element] = self.values[element].add_scaled(delta, scale);
        self.flags[element] |= TOUCHED | if delta == zero || scale == zero { 0 } else { NONZERO };
    }

    /// Brings each of `rows` to its magnitude.
    fn scale_rows(
        &mut self,
        product: &Product<'_>,
        magnitude: &Magnitude<'_>,
        rows: &Range<u64>,
    ) -> Result<(), MergeError> {
        let first = magnitude.start + rows.start - product.first_row;
        let magnitudes = read_f32(magnitude.shard, magnitude.info, first..first + rows.end - rows.start)?;
        let at = self.elements(rows);
        let n_columns = self.target.n_columns as usize;
        for ((row, values), m) in (rows.start..).zip(self.values[at].chunks_exact_mut(n_columns)).zip(magnitudes) {
            let mut lanes = [0.0f64; 8];
            for values in values.chunks(8) {
                for (lane, value) in lanes.iter_mut().zip(values) {
                    *lane += value.to_f64() * value.to_f64();
                }
            }
            let factor = factor_of(m, lanes.iter().sum(), || format!("row {row}"), self.target)?;
            let factor = T::Acc::from_f64(f64::from(factor));
            values.iter_mut().for_each(|value| *value = value.mul(factor));
        }
        self.flag_all(rows);
        Ok(())
    }

    fn scale_columns(&mut self, factors: &[f32]) {
        for values in self.values.chunks_exact_mut(self.target.n_columns as usize) {
            for (value, &factor) in values.iter_mut().zip(factors) {
                *value = value.mul(T::Acc::from_f64(f64::from(factor)));
            }
        }
        self.flag_all(&self.rows.clone());
    }

    /// A magnitude moves every weight of its row, however little.
    fn flag_all(&mut self, rows: &Range<u64>) {
        let at = self.elements(rows);
        self.flags[at].fill(TOUCHED | NONZERO);
    }

    /// Adds the squares of each column to `sums`, `[n_columns]`, for rows `rows` of the block.
    pub(super) fn add_squares(&self, rows: Range<usize>, sums: &mut [f64]) {
        let n_columns = self.target.n_columns as usize;
        for values in self.values[rows.start * n_columns..rows.end * n_columns].chunks_exact(n_columns) {
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += value.to_f64() * value.to_f64();
            }
        }
    }

    /// Rounds every touched element once, to the weight's type.
    fn round(self, bytes: &mut [u8]) -> PatchCounts {
        let mut counts = PatchCounts::default();
        for ((element, value), flag) in bytes.chunks_exact_mut(T::BYTES).zip(self.values).zip(self.flags) {
            if flag & TOUCHED == 0 {
                continue;
            }
            let original = T::from_le(element);
            let is_nonzero = flag & NONZERO != 0;
            counts.touched += 1;
            counts.nonzero += u64::from(is_nonzero);
            if original.is_nan() && flag & REPLACED == 0 {
                continue;
            }
            let value = T::from_acc(value);
            let is_same = value.same_bits(original);
            counts.absorbed += u64::from(is_nonzero && is_same);
            counts.changed += u64::from(!is_same);
            counts.overflowed += u64::from(original.is_finite() && !value.is_finite());
            value.write_le(element);
        }
        counts
    }
}

/// What brings a norm to a magnitude.
///
/// # Errors
/// A norm that is zero or no number.
pub(super) fn factor_of(
    magnitude: f32,
    squares: f64,
    place: impl Fn() -> String,
    target: &MergeTarget<'_>,
) -> Result<f32, MergeError> {
    let norm = squares.sqrt() as f32;
    let factor = magnitude / norm;
    if norm > 0.0 && factor.is_finite() {
        return Ok(factor);
    }
    let what = format!("{}: its norm is {norm}, which cannot be brought to the magnitude {magnitude}", place());
    Err(CheckpointError::bad_tensor(target.tensor.shard.path(), target.name(), what).into())
}
