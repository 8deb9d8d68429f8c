//! Two checkpoints: tensors added, removed, retyped, changed.

use serde::Serialize;

use super::{
    DiffError,
    norms::{PIECE, Sums},
};
use crate::{
    checkpoint::{Checkpoint, Context, TensorRef, n_readers, read_and_map_ordered, window_cost},
    tensor::{Accumulator, Dtype, Float, dtype_name, with_float},
    weights::{Answers, Pairing, WeightMap},
};

/// A tensor that both have, not alike.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct RetypedTensor {
    /// The tensor's name.
    pub tensor: String,
    /// A's element type.
    pub dtype_a: String,
    /// A's shape.
    pub shape_a: Vec<u64>,
    /// B's element type.
    pub dtype_b: String,
    /// B's shape.
    pub shape_b: Vec<u64>,
}

/// A tensor whose bytes differ.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct ChangedTensor {
    /// The tensor's name.
    pub tensor: String,
    /// The element type.
    pub dtype: String,
    /// The shape.
    pub shape: Vec<u64>,
    /// Elements.
    pub n_elements: u64,
    /// Elements whose bits differ (bytes, for elements of less than one).
    pub n_changed: u64,
    /// `n_changed / n_elements`.
    pub share: f64,
    /// The largest `|b - a|` of finite elements; none where elements are codes, or no floats.
    pub largest_change: Option<f64>,
    /// L2 norm of `b - a` over finite elements; none where elements are codes, or no floats.
    pub change_norm: Option<f64>,
    /// L2 norm of A's finite elements that changed.
    pub norm_of_changed: Option<f64>,
    /// Changed elements that are NaN or infinite on either side, left out of the numbers above.
    pub n_not_finite: u64,
}

/// What differs between two checkpoints.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct CheckpointDiff {
    /// Whether every tensor of either is in both, byte for byte.
    pub equal: bool,
    /// Tensors that only A has.
    pub removed: Vec<String>,
    /// Tensors that only B has.
    pub added: Vec<String>,
    /// Tensors of other types or shapes.
    pub retyped: Vec<RetypedTensor>,
    /// Tensors whose bytes differ, by name.
    pub changed: Vec<ChangedTensor>,
    /// Tensors whose bytes are the same.
    pub n_same: u64,
    /// Elements that changed, in all.
    pub n_changed_elements: u64,
    /// Elements compared, in all.
    pub n_elements: u64,
    /// Bytes compared, of each side.
    pub bytes_compared: u64,
}

/// Compares two checkpoints tensor by tensor, however each is cut into shards.
///
/// Reads both once. Memory: a few windows per thread.
///
/// ```
/// use neuroada_ckpt::{Checkpoint, Context, diff_checkpoints};
/// let a = Checkpoint::open("fixtures/tiny-llama".as_ref())?;
/// let b = Checkpoint::open("fixtures/tiny-llama".as_ref())?;
/// assert!(diff_checkpoints(&Context::default(), &a, &b)?.equal);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`DiffError`] where a file cannot be read or changed meanwhile; checkpoints that differ are a report.
pub fn diff_checkpoints(ctx: &Context<'_>, a: &Checkpoint, b: &Checkpoint) -> Result<CheckpointDiff, DiffError> {
    let found = WeightMap::new(a, Answers::default())?.pairs(&WeightMap::new(b, Answers::default())?);
    let names = |tensors: &[TensorRef<'_>]| tensors.iter().map(|tensor| tensor.info.name.clone()).collect();
    let (removed, added): (Vec<String>, Vec<String>) = (names(&found.only_a), names(&found.only_b));
    let (mut pairs, mut retyped) = (Vec::new(), Vec::new());
    for Pairing { a: tensor, b: other } in found.both.into_iter().chain(found.copies_b) {
        if tensor.info.is_like(other.info) {
            pairs.push((tensor, other));
        } else {
            retyped.push(RetypedTensor {
                tensor: tensor.info.name.clone(),
                dtype_a: dtype_name(tensor.info.dtype),
                shape_a: tensor.info.shape.clone(),
                dtype_b: dtype_name(other.info.dtype),
                shape_b: other.info.shape.clone(),
            });
        }
    }
    let n_bytes = pairs.iter().map(|(tensor, _)| tensor.info.n_bytes()).sum();
    ctx.observer.begin("comparing", n_bytes);
    let mut found = vec![Changes::default(); pairs.len()];
    let windows = pairs.iter().enumerate().flat_map(|(i, (tensor, _))| {
        let (n_bytes, step) = (tensor.info.n_bytes(), step(ctx, tensor.info.dtype));
        (0..n_bytes).step_by(step as usize).map(move |start| (i, start..n_bytes.min(start + step)))
    });
    let both: Vec<TensorRef<'_>> = pairs.iter().flat_map(|&(a, b)| [a, b]).collect();
    read_and_map_ordered(
        ctx,
        windows,
        |(_, range)| 2 * window_cost(range.end - range.start),
        n_readers(ctx, &both),
        |(i, range)| {
            let (a, b) = pairs[*i];
            Ok((a.window(ctx, range.clone())?, b.window(ctx, range.clone())?))
        },
        |(i, range), (bytes_a, bytes_b)| {
            let (a, b) = pairs[*i];
            let changes = compare(a.info.dtype, &bytes_a, &bytes_b);
            a.shard.confirm(&bytes_a)?;
            b.shard.confirm(&bytes_b)?;
            ctx.observer.advance(range.end - range.start);
            Ok::<_, DiffError>(changes)
        },
        |(i, _), pieces| {
            pieces.iter().for_each(|piece| found[i].add(piece));
            Ok(())
        },
    )?;
    a.unchanged()?;
    b.unchanged()?;
    let changed: Vec<ChangedTensor> = pairs
        .iter()
        .zip(&found)
        .filter(|(_, changes)| changes.n_changed > 0)
        .map(|((tensor, _), changes)| changed_tensor(*tensor, changes))
        .collect();
    Ok(CheckpointDiff {
        equal: changed.is_empty() && removed.is_empty() && added.is_empty() && retyped.is_empty(),
        removed,
        added,
        retyped,
        n_same: (pairs.len() - changed.len()) as u64,
        n_changed_elements: changed.iter().map(|tensor| tensor.n_changed).sum(),
        changed,
        n_elements: pairs.iter().map(|(tensor, _)| tensor.info.n_elements()).sum(),
        bytes_compared: n_bytes,
    })
}

/// Bytes of one window: whole pieces.
fn step(ctx: &Context<'_>, dtype: Dtype) -> u64 {
    let piece = piece_bytes(dtype) as u64;
    (ctx.window_bytes() / piece).max(1) * piece
}

/// Bytes of one piece; elements of less than a byte are compared by bytes.
fn piece_bytes(dtype: Dtype) -> usize {
    PIECE * (dtype.bitsize() / 8).max(1)
}

/// What changed in a piece, or in a tensor so far.
#[derive(Clone, Copy, Default)]
struct Changes {
    n_changed: u64,
    n_not_finite: u64,
    sums: Sums,
    change_squares: f64,
}

impl Changes {
    fn add(&mut self, next: &Self) {
        self.n_changed += next.n_changed;
        self.n_not_finite += next.n_not_finite;
        self.sums.add(&next.sums);
        self.change_squares += next.change_squares;
    }
}

/// The changes of every piece that has some, in order.
fn compare(dtype: Dtype, a: &[u8], b: &[u8]) -> Vec<Changes> {
    if a == b {
        return Vec::new();
    }
    let piece = piece_bytes(dtype);
    let of_piece = |(a, b): (&[u8], &[u8])| {
        if a == b {
            return None;
        }
        Some(with_float!(dtype, T => compare_floats::<T>(a, b), else compare_bits(dtype, a, b)))
    };
    a.chunks(piece).zip(b.chunks(piece)).filter_map(of_piece).collect()
}

fn compare_floats<T: Float>(a: &[u8], b: &[u8]) -> Changes {
    let mut changes = Changes::default();
    for (a, b) in a.chunks_exact(T::BYTES).zip(b.chunks_exact(T::BYTES)) {
        if a == b {
            continue;
        }
        changes.n_changed += 1;
        let (a, b) = (T::from_le(a), T::from_le(b));
        if a.is_finite() && b.is_finite() {
            let (a, b) = (a.widen().to_f64(), b.widen().to_f64());
            changes.sums.pair(a, b);
            changes.change_squares += (b - a) * (b - a);
        } else {
            changes.n_not_finite += 1;
        }
    }
    changes
}

fn compare_bits(dtype: Dtype, a: &[u8], b: &[u8]) -> Changes {
    let width = (dtype.bitsize() / 8).max(1);
    let n_changed = a.chunks(width).zip(b.chunks(width)).filter(|(a, b)| a != b).count() as u64;
    Changes { n_changed, ..Changes::default() }
}

fn changed_tensor(tensor: TensorRef<'_>, changes: &Changes) -> ChangedTensor {
    let info = tensor.info;
    // Differences of codes are none of the weights.
    let is_number = crate::tensor::is_float(info.dtype) && tensor.numbers().is_ok();
    let of_floats = |x: f64| is_number.then_some(x);
    ChangedTensor {
        tensor: info.name.clone(),
        dtype: dtype_name(info.dtype),
        shape: info.shape.clone(),
        n_elements: info.n_elements(),
        n_changed: changes.n_changed,
        share: changes.n_changed as f64 / info.n_elements() as f64,
        largest_change: of_floats(changes.sums.largest),
        change_norm: of_floats(changes.change_squares.sqrt()),
        norm_of_changed: of_floats(changes.sums.aa.sqrt()),
        n_not_finite: changes.n_not_finite,
    }
}
