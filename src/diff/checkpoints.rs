//! Two checkpoints: tensors added, removed, retyped, changed.

use serde::Serialize;

use super::{
    DiffError,
    norms::{PIECE, Sums},
};
use crate::{
    checkpoint::{Checkpoint, Context, TensorRef, n_readers, read_and_map_ordered, window_cost},
    tensor::{Accumulator, Dtype, Float, dtype_name, is_float, widened, with_float},
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

/// A tensor whose bytes differ, or a quantized weight whose stored tensors or layouts do. Elements of quantized weights are the numbers
/// that they are decoded to.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct ChangedTensor {
    /// The tensor's name.
    pub tensor: String,
    /// The element type, or the layout of a quantized weight; where both sides differ, `A -> B`.
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

/// Compares two checkpoints tensor by tensor, however each is cut into shards. A quantized weight is one tensor of the numbers that it is
/// decoded to, and is compared with the same weight in any other layout or type.
///
/// Reads both once, and quantized weights whose stored tensors differ once more. Memory: a few windows per thread.
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
    let found = WeightMap::new(a, Answers::default())?.pairs(&WeightMap::new(b, Answers::default())?)?;
    let names = |tensors: &[TensorRef<'_>]| tensors.iter().map(|tensor| tensor.info.name.clone()).collect();
    let (removed, added): (Vec<String>, Vec<String>) = (names(&found.only_a), names(&found.only_b));
    let (mut pairs, mut retyped) = (Vec::new(), Vec::new());
    for pairing in found.both.into_iter().chain(found.copies_b) {
        match Pair::of(pairing) {
            Some(pair) => pairs.push(pair),
            None => {
                let Pairing { a, b } = pairing;
                retyped.push(RetypedTensor {
                    tensor: a.info.name.clone(),
                    dtype_a: stored_as(a),
                    shape_a: a.info.shape.clone(),
                    dtype_b: stored_as(b),
                    shape_b: b.info.shape.clone(),
                });
            }
        }
    }
    let mut found = vec![Changes::default(); pairs.len()];
    let n_bytes = compare_bytes(ctx, &mut pairs, &mut found)? + compare_values(ctx, &pairs, &mut found)?;
    a.unchanged()?;
    b.unchanged()?;
    let changed: Vec<ChangedTensor> = pairs
        .iter()
        .zip(&found)
        .filter(|(pair, _)| pair.differs)
        .map(|(pair, changes)| changed_tensor(pair, changes))
        .collect();
    Ok(CheckpointDiff {
        equal: changed.is_empty() && removed.is_empty() && added.is_empty() && retyped.is_empty(),
        removed,
        added,
        retyped,
        n_same: (pairs.len() - changed.len()) as u64,
        n_changed_elements: changed.iter().map(|tensor| tensor.n_changed).sum(),
        changed,
        n_elements: pairs.iter().map(|pair| pair.a.info.n_elements()).sum(),
        bytes_compared: n_bytes,
    })
}

/// The same weight in both.
struct Pair<'a, 'b> {
    a: TensorRef<'a>,
    b: TensorRef<'b>,
    /// Whether either is quantized, so that numbers are compared and not bytes.
    is_quantized: bool,
    /// Whether bytes of stored tensors differ, or the layouts do.
    differs: bool,
}

impl<'a, 'b> Pair<'a, 'b> {
    /// Where they can be compared: plain tensors of one type and shape, or weights of one shape of which one is quantized.
    fn of(Pairing { a, b }: Pairing<'a, 'b>) -> Option<Self> {
        let is_quantized = a.layout().is_some() || b.layout().is_some();
        let fits = if is_quantized {
            let are_floats = is_float(a.info.dtype) && is_float(b.info.dtype);
            are_floats && a.info.shape == b.info.shape
        } else {
            a.info.is_like(b.info)
        };
        fits.then(|| Self { a, b, is_quantized, differs: is_quantized && !have_equal_layouts(a, b) })
    }

    /// The stored tensors to be compared byte by byte; none where the layouts differ.
    fn stored(&self) -> Vec<(TensorRef<'a>, TensorRef<'b>)> {
        if !self.is_quantized {
            return vec![(self.a, self.b)];
        }
        if self.differs {
            return Vec::new();
        }
        let stored = self.a.stored().zip(self.b.stored());
        stored.map(|((a, x), (b, y))| (TensorRef::of_file(a, x), TensorRef::of_file(b, y))).collect()
    }
}

/// Whether both are stored in the same layout, each stored tensor like its counterpart.
fn have_equal_layouts(a: TensorRef<'_>, b: TensorRef<'_>) -> bool {
    let name = |tensor: TensorRef<'_>| tensor.layout().map(|layout| layout.name().to_owned());
    let are_like = a.stored().zip(b.stored()).all(|((_, x), (_, y))| x.is_like(y));
    name(a) == name(b) && a.stored().count() == b.stored().count() && are_like
}

/// Compares plain tensors, and the stored tensors of quantized weights; returns the bytes compared, of each side.
fn compare_bytes(ctx: &Context<'_>, pairs: &mut [Pair<'_, '_>], found: &mut [Changes]) -> Result<u64, DiffError> {
    let stored: Vec<_> =
        pairs.iter().enumerate().flat_map(|(i, pair)| pair.stored().into_iter().map(move |(a, b)| (i, a, b))).collect();
    let n_bytes = stored.iter().map(|(_, a, _)| a.info.n_bytes()).sum();
    ctx.observer.begin("comparing", n_bytes);
    let windows = stored.iter().flat_map(|&(i, a, b)| {
        let (n_bytes, step) = (a.info.n_bytes(), step(ctx, a.info.dtype));
        (0..n_bytes).step_by(step as usize).map(move |start| (i, a, b, start..n_bytes.min(start + step)))
    });
    let both: Vec<TensorRef<'_>> = stored.iter().flat_map(|&(_, a, b)| [a, b]).collect();
    read_and_map_ordered(
        ctx,
        windows,
        |(.., range)| 2 * window_cost(range.end - range.start),
        n_readers(ctx, &both),
        |(_, a, b, range)| Ok((a.window(ctx, range.clone())?, b.window(ctx, range.clone())?)),
        |(_, a, b, range), (bytes_a, bytes_b)| {
            let changes = compare(a.info.dtype, &bytes_a, &bytes_b);
            a.shard.confirm(&bytes_a)?;
            b.shard.confirm(&bytes_b)?;
            ctx.observer.advance(range.end - range.start);
            Ok::<_, DiffError>(changes)
        },
        |(i, ..), pieces| {
            pairs[i].differs |= !pieces.is_empty();
            if !pairs[i].is_quantized {
                pieces.iter().for_each(|piece| found[i].add(piece));
            }
            Ok(())
        },
    )?;
    Ok(n_bytes)
}

/// Compares the numbers of quantized weights whose stored tensors differ; returns the bytes of A's stored tensors.
fn compare_values(ctx: &Context<'_>, pairs: &[Pair<'_, '_>], found: &mut [Changes]) -> Result<u64, DiffError> {
    let differing = || pairs.iter().enumerate().filter(|(_, pair)| pair.is_quantized && pair.differs);
    let n_elements: u64 = differing().map(|(_, pair)| pair.a.info.n_elements()).sum();
    let n_bytes = differing().map(|(_, pair)| pair.a.stored_bytes()).sum();
    if n_elements == 0 {
        return Ok(n_bytes);
    }
    ctx.observer.begin("comparing values", n_elements);
    let step = (ctx.window_bytes() / 4 / PIECE as u64).max(1) * PIECE as u64;
    let runs = differing().flat_map(|(i, pair)| {
        let n = pair.a.info.n_elements();
        (0..n).step_by(step as usize).map(move |start| (i, start..n.min(start + step)))
    });
    read_and_map_ordered(
        ctx,
        runs,
        // Numbers, and the codes and scales behind them.
        |(_, run)| 2 * window_cost((run.end - run.start) * 16),
        0,
        |(i, run)| {
            let read = |tensor: TensorRef<'_>| {
                let width = tensor.info.dtype.bitsize() as u64 / 8;
                let window = tensor.window(ctx, run.start * width..run.end * width)?;
                let numbers = widened(tensor.info.dtype, &window);
                tensor.shard.confirm(&window)?;
                Ok::<_, DiffError>(numbers)
            };
            Ok((read(pairs[*i].a)?, read(pairs[*i].b)?))
        },
        |(_, run), (a, b)| {
            ctx.observer.advance(run.end - run.start);
            Ok::<_, DiffError>(
                a.chunks(PIECE).zip(b.chunks(PIECE)).map(|(a, b)| compare_numbers(a, b)).collect::<Vec<_>>(),
            )
        },
        |(i, _), pieces| {
            pieces.iter().for_each(|piece| found[i].add(piece));
            Ok(())
        },
    )?;
    Ok(n_bytes)
}

fn compare_numbers(a: &[f32], b: &[f32]) -> Changes {
    let mut changes = Changes::default();
    for (&a, &b) in a.iter().zip(b) {
        // A NaN on both sides is no change.
        if a != b && !(a.is_nan() && b.is_nan()) {
            changes.n_changed += 1;
            changes.change(f64::from(a), f64::from(b));
        }
    }
    changes
}

/// The type of a plain tensor, or the layout of a quantized weight.
fn stored_as(tensor: TensorRef<'_>) -> String {
    tensor.layout().map_or_else(|| dtype_name(tensor.info.dtype), |layout| layout.name().to_owned())
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
    /// Counts how far an element changed.
    fn change(&mut self, a: f64, b: f64) {
        if a.is_finite() && b.is_finite() {
            self.sums.pair(a, b);
            self.change_squares += (b - a) * (b - a);
        } else {
            self.n_not_finite += 1;
        }
    }

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
        changes.change(T::from_le(a).widen().to_f64(), T::from_le(b).widen().to_f64());
    }
    changes
}

fn compare_bits(dtype: Dtype, a: &[u8], b: &[u8]) -> Changes {
    let width = (dtype.bitsize() / 8).max(1);
    let n_changed = a.chunks(width).zip(b.chunks(width)).filter(|(a, b)| a != b).count() as u64;
    Changes { n_changed, ..Changes::default() }
}

fn changed_tensor(pair: &Pair<'_, '_>, changes: &Changes) -> ChangedTensor {
    let info = pair.a.info;
    let (from, to) = (stored_as(pair.a), stored_as(pair.b));
    // Codes and scales of a weight that could not be decoded are no numbers.
    let is_number = is_float(info.dtype) && pair.a.numbers().is_ok();
    let of_floats = |x: f64| is_number.then_some(x);
    ChangedTensor {
        tensor: info.name.clone(),
        dtype: if from == to { from } else { format!("{from} -> {to}") },
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
