//! Merge arithmetic: the new value of a changed weight.
//!
//! `value = round(original + delta_1 * scale_1 + delta_2 * scale_2 + …)`: each product and each sum is rounded to
//! float32 (float64 for float64 weights), in the order of the adapters, and the result is rounded once to the weight's
//! dtype, nearest even. A NaN original keeps its bits. The value depends on nothing else, so it can always be
//! recomputed.

use crate::tensor::{Accumulator, Dtype, Float, RowColumns, with_float};

/// The deltas of one adapter on a run of rows.
#[derive(Clone, Copy)]
pub struct ScaledDeltas<'a> {
    /// Chosen columns, row by row.
    pub columns: &'a RowColumns,
    /// `[columns.nnz()]` deltas, in the columns' order.
    pub values: &'a [f32],
    /// Multiplied into every delta.
    pub scale: f64,
}

/// The effects of deltas on a run of rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PatchCounts {
    /// Positions with a delta.
    pub touched: u64,
    /// Positions where some scaled delta is not zero.
    pub nonzero: u64,
    /// Those among them whose weight kept its bits: rounding absorbed the delta.
    pub absorbed: u64,
    /// Positions whose weight changed its bits.
    pub changed: u64,
    /// Positions where a finite weight became infinite or NaN.
    pub overflowed: u64,
}

impl PatchCounts {
    /// Adds the counts of other rows.
    pub fn add(&mut self, other: Self) {
        self.touched += other.touched;
        self.nonzero += other.nonzero;
        self.absorbed += other.absorbed;
        self.changed += other.changed;
        self.overflowed += other.overflowed;
    }
}

/// The columns that appear in any of `parts`, row by row.
///
/// # Panics
/// If the parts differ in their number of rows, or there are none.
pub fn union_columns(parts: &[&RowColumns]) -> RowColumns {
    let n_rows = parts.first().expect("a union of at least one part").n_rows();
    assert!(parts.iter().all(|part| part.n_rows() == n_rows), "parts cover the same rows");
    if let [only] = parts {
        return (*only).clone();
    }
    let mut union = RowColumns::with_capacity(n_rows, parts.iter().map(|part| part.nnz()).max().unwrap_or(0));
    let mut row_columns = Vec::new();
    for row in 0..n_rows {
        row_columns.clear();
        for part in parts {
            row_columns.extend_from_slice(part.row(row));
        }
        row_columns.sort_unstable();
        row_columns.dedup();
        union.push_row(&row_columns);
    }
    union
}

/// The elements of `bytes` (one per column of `from`, `width` bytes each) at the columns of `wanted`.
///
/// # Panics
/// If `wanted` has a column that `from` does not have.
pub fn pick(from: &RowColumns, bytes: &[u8], width: usize, wanted: &RowColumns) -> Vec<u8> {
    assert_eq!(bytes.len(), from.nnz() * width, "one element per column");
    if from == wanted {
        return bytes.to_vec();
    }
    let mut picked = Vec::with_capacity(wanted.nnz() * width);
    for row in 0..wanted.n_rows() {
        let range = from.row_range(row);
        let columns = from.row(row);
        let mut at = 0;
        for &column in wanted.row(row) {
            at +=
                columns[at..].iter().position(|&c| c == column).expect("wanted columns are a subset of the given ones");
            let element = (range.start + at) * width;
            picked.extend_from_slice(&bytes[element..element + width]);
        }
    }
    picked
}

/// The bytes of the merged weights at the columns of `touched`, and the effects of the deltas.
///
/// `originals` holds one little-endian element of `dtype` per column of `touched`, which contains at least the union
/// of the adapters' columns (a position without a delta keeps its original). Memory: the result.
///
/// # Panics
/// If the lengths are inconsistent, or `dtype` is not a float.
pub fn merged_values(
    dtype: Dtype,
    parts: &[ScaledDeltas<'_>],
    touched: &RowColumns,
    originals: &[u8],
) -> (Vec<u8>, PatchCounts) {
    with_float!(dtype, T => merged::<T>(parts, touched, originals), else unreachable!("targets are floats"))
}

fn merged<T: Float>(parts: &[ScaledDeltas<'_>], touched: &RowColumns, originals: &[u8]) -> (Vec<u8>, PatchCounts) {
    assert_eq!(originals.len(), touched.nnz() * T::BYTES, "one original per touched position");
    let zero = T::Acc::from_f64(0.0);
    let scales: Vec<T::Acc> = parts.iter().map(|part| T::Acc::from_f64(part.scale)).collect();
    let mut values = originals.to_vec();
    let mut counts = PatchCounts::default();
    let mut cursors = vec![0usize; parts.len()];
    for row in 0..touched.n_rows() {
        for (cursor, part) in cursors.iter_mut().zip(parts) {
            *cursor = part.columns.row_range(row).start;
        }
        for (&column, at) in touched.row(row).iter().zip(touched.row_range(row)) {
            let element = &mut values[at * T::BYTES..(at + 1) * T::BYTES];
            let original = T::from_le(element);
            let mut sum = original.widen();
            let (mut has_delta, mut is_nonzero) = (false, false);
            for ((cursor, part), &scale) in cursors.iter_mut().zip(parts).zip(&scales) {
                let end = part.columns.row_range(row).end;
                if *cursor < end && part.columns.columns()[*cursor] == column {
                    let delta = T::Acc::from_f64(f64::from(part.values[*cursor]));
                    sum = sum.add_scaled(delta, scale);
                    has_delta = true;
                    is_nonzero |= delta != zero && scale != zero;
                    *cursor += 1;
                }
            }
            if !has_delta {
                continue;
            }
            counts.touched += 1;
            counts.nonzero += u64::from(is_nonzero);
            if original.is_nan() {
                continue;
            }
            let value = T::from_acc(sum);
            counts.overflowed += u64::from(original.is_finite() && !value.is_finite());
            let mut bits = [0u8; 8];
            value.write_le(&mut bits);
            let is_same = bits[..T::BYTES] == *element;
            counts.absorbed += u64::from(is_nonzero && is_same);
            counts.changed += u64::from(!is_same);
            element.copy_from_slice(&bits[..T::BYTES]);
        }
    }
    (values, counts)
}

/// Replaces `elements` by `values`, each rounded once to `dtype`, and counts the effects.
///
/// # Panics
/// If the lengths are inconsistent, or `dtype` is not a float.
pub fn replace_values(dtype: Dtype, elements: &mut [u8], values: &[f32]) -> PatchCounts {
    with_float!(dtype, T => replace::<T>(elements, values), else unreachable!("targets are floats"))
}

fn replace<T: Float>(elements: &mut [u8], values: &[f32]) -> PatchCounts {
    assert_eq!(elements.len(), values.len() * T::BYTES, "one value per element");
    let mut counts = PatchCounts::default();
    for (element, &value) in elements.chunks_exact_mut(T::BYTES).zip(values) {
        let original = T::from_le(element);
        let value = T::from_acc(T::Acc::from_f64(f64::from(value)));
        let is_same = value.same_bits(original);
        counts.touched += 1;
        counts.nonzero += u64::from(!is_same);
        counts.changed += u64::from(!is_same);
        counts.overflowed += u64::from(original.is_finite() && !value.is_finite());
        value.write_le(element);
    }
    counts
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn rows(rows: &[&[u32]]) -> RowColumns {
        let mut columns = RowColumns::default();
        rows.iter().for_each(|row| columns.push_row(row));
        columns
    }

    fn bf16_bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect()
    }

    #[test]
    fn a_union_has_every_column_once() {
        let union = union_columns(&[&rows(&[&[1, 5], &[]]), &rows(&[&[0, 5], &[2]])]);
        assert_eq!(union, rows(&[&[0, 1, 5], &[2]]));
        assert_eq!(pick(&union, &[10, 11, 15, 22], 1, &rows(&[&[1, 5], &[]])), [11, 15]);
    }

    #[test]
    fn deltas_are_summed_in_order_and_rounded_once() {
        let (a, b) = (rows(&[&[0, 2]]), rows(&[&[2]]));
        let parts = [
            ScaledDeltas { columns: &a, values: &[0.5, 1.0], scale: 2.0 },
            ScaledDeltas { columns: &b, values: &[0.25], scale: -1.0 },
        ];
        let touched = rows(&[&[0, 1, 2]]);
        let (values, counts) = merged_values(Dtype::BF16, &parts, &touched, &bf16_bytes(&[1.0, 7.0, 1.0]));
        assert_eq!(values, bf16_bytes(&[2.0, 7.0, 2.75]));
        assert_eq!(counts, PatchCounts { touched: 2, nonzero: 2, absorbed: 0, changed: 2, overflowed: 0 });
    }

    #[test]
    fn a_delta_below_half_a_unit_is_absorbed_and_counted() {
        let columns = rows(&[&[0, 1]]);
        let parts = [ScaledDeltas { columns: &columns, values: &[0.001, 0.0], scale: 1.0 }];
        let (values, counts) = merged_values(Dtype::BF16, &parts, &columns, &bf16_bytes(&[1.0, -0.0]));
        // Adding zero to -0 gives +0, as in every IEEE addition.
        assert_eq!(values, bf16_bytes(&[1.0, 0.0]));
        assert_eq!(counts, PatchCounts { touched: 2, nonzero: 1, absorbed: 1, changed: 1, overflowed: 0 });
    }

    #[test]
    fn a_nan_keeps_its_payload_and_overflow_is_counted() {
        let columns = rows(&[&[0, 1]]);
        let parts = [ScaledDeltas { columns: &columns, values: &[1.0, 60000.0], scale: 1.0 }];
        let originals: Vec<u8> = [0xfe01u16, 0x7bff].iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let (values, counts) = merged_values(Dtype::F16, &parts, &columns, &originals);
        assert_eq!(values, [0x01, 0xfe, 0x00, 0x7c]);
        assert_eq!((counts.overflowed, counts.touched), (1, 2));
    }
}
