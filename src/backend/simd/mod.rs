//! The loops that choose, vectorized: AVX-512 or AVX2, whichever the CPU supports, and NEON.
//!
//! `select` contains the algorithm, written once over the few operations of [`Vector`]; `x86` and `neon` implement
//! these operations and compile the algorithm for each instruction set. All results equal those of [`super::portable`]
//! bit for bit. The portable code is used for 64-bit keys, and on other CPUs.

#![allow(unsafe_code)]

mod low_rank;
#[cfg(feature = "train")]
pub(super) mod matmul;
#[cfg(target_arch = "aarch64")]
mod neon;
mod select;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::OnceLock;

use super::{NotANumber, ScoredRows, keys::Key, score::Scratch};
use crate::tensor::RowColumns;
pub(super) use low_rank::{add_low_rank, merge_sums};
use select::SelectScratch;

/// Keys of 1, 2 or 4 bytes in memory, row by row.
#[derive(Clone, Copy)]
struct KeyRows<'a> {
    bytes: &'a [u8],
    d_in: usize,
    /// The bits of an element that form its key.
    mask: u32,
    /// Larger keys are NaNs.
    largest: u32,
}

/// Appends the `k` largest of each row, `0 < k < d_in`; stops at the first row with a NaN key, and returns that row.
type TopKFn =
    unsafe fn(rows: KeyRows<'_>, k: usize, scratch: &mut SelectScratch, columns: &mut Vec<u32>) -> Result<(), usize>;
/// Appends, row by row, the columns of keys of at least the bound, and the keys; stops as [`TopKFn`] does.
type ColumnsFromFn = unsafe fn(
    rows: KeyRows<'_>,
    bound: u32,
    scratch: &mut SelectScratch,
    columns: &mut RowColumns,
    keys: &mut Vec<u32>,
) -> Result<(), usize>;

/// The loops for one key width, compiled for one instruction set.
#[derive(Clone, Copy)]
struct Loops {
    topk: TopKFn,
    from: ColumnsFromFn,
}

/// The loops that a CPU supports.
#[derive(Clone, Copy)]
struct Machine {
    name: &'static str,
    u8: Loops,
    u16: Loops,
    u32: Loops,
}

impl Machine {
    fn loops<K: Key>(&self) -> Option<Loops> {
        match K::BITS {
            8 => Some(self.u8),
            16 => Some(self.u16),
            32 => Some(self.u32),
            _ => None,
        }
    }
}

/// The fastest of [`all`], if any.
fn machine() -> Option<Machine> {
    static MACHINE: OnceLock<Option<Machine>> = OnceLock::new();
    *MACHINE.get_or_init(|| all().into_iter().next())
}

/// All implementations that this CPU supports, fastest first.
fn all() -> Vec<Machine> {
    #[cfg(target_arch = "x86_64")]
    return x86::all();
    #[cfg(target_arch = "aarch64")]
    return neon::all();
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    Vec::new()
}

/// The instruction set in use: `avx512`, `avx2`, `neon` or `portable`.
pub(super) fn name() -> &'static str {
    machine().map_or("portable", |machine| machine.name)
}

/// As [`super::topk_rows`]; `None` if there is no vectorized form.
pub(super) fn topk_rows<K: Key>(rows: &ScoredRows<'_>, k: usize) -> Option<Result<Vec<u32>, NotANumber>> {
    topk_rows_on::<K>(machine()?, rows, k)
}

fn topk_rows_on<K: Key>(machine: Machine, rows: &ScoredRows<'_>, k: usize) -> Option<Result<Vec<u32>, NotANumber>> {
    let loops = machine.loops::<K>()?;
    let weights = rows.weights();
    if k == 0 || k >= weights.d_in() {
        return None;
    }
    let mut columns = Vec::with_capacity(weights.n_rows() * k);
    let mut scratch = SelectScratch::default();
    // SAFETY: `machine` lists only instruction sets that were detected.
    let done = for_each_run::<K>(rows, |run| unsafe { (loops.topk)(run, k, &mut scratch, &mut columns) });
    Some(done.map(|()| columns))
}

/// Every column whose key is at least `bound`, row by row, and the keys; `None` if there is no vectorized form.
pub(super) fn columns_from<K: Key>(rows: &ScoredRows<'_>, bound: u64) -> Option<Result<KeyedColumns, NotANumber>> {
    columns_from_on::<K>(machine()?, rows, bound)
}

/// Columns and their keys, `[nnz]`.
pub(super) type KeyedColumns = (RowColumns, Vec<u32>);

fn columns_from_on<K: Key>(
    machine: Machine,
    rows: &ScoredRows<'_>,
    bound: u64,
) -> Option<Result<KeyedColumns, NotANumber>> {
    let loops = machine.loops::<K>()?;
    let bound = bound as u32;
    let mut columns = RowColumns::with_capacity(rows.weights().n_rows(), 0);
    let (mut keys, mut scratch) = (Vec::new(), SelectScratch::default());
    // SAFETY: `machine` lists only instruction sets that were detected.
    let done =
        for_each_run::<K>(rows, |run| unsafe { (loops.from)(run, bound, &mut scratch, &mut columns, &mut keys) });
    Some(done.map(|()| (columns, keys)))
}

/// Passes keys to `visit`: all rows at once if the weights are their own keys, otherwise row by row.
fn for_each_run<K: Key>(
    rows: &ScoredRows<'_>,
    mut visit: impl FnMut(KeyRows<'_>) -> Result<(), usize>,
) -> Result<(), NotANumber> {
    let d_in = rows.weights().d_in();
    let mut scratch = Scratch::default();
    let mut keys = vec![K::default(); d_in];
    if let Some((mask, largest)) = rows.stored_keys() {
        let (mask, largest) = (mask as u32, largest as u32);
        let done = visit(KeyRows { bytes: rows.weights().bytes(), d_in, mask, largest });
        return match done {
            Ok(()) => Ok(()),
            Err(row) => {
                rows.keys(row, &mut scratch, &mut keys)?;
                unreachable!("a row with a key above infinity contains a NaN")
            }
        };
    }
    for row in 0..rows.weights().n_rows() {
        rows.keys(row, &mut scratch, &mut keys)?;
        // SAFETY: keys are plain unsigned integers: all their bytes are initialized.
        let bytes = unsafe { std::slice::from_raw_parts(keys.as_ptr().cast::<u8>(), size_of_val(&keys[..])) };
        let done = visit(KeyRows { bytes, d_in, mask: u32::MAX, largest: u32::MAX });
        debug_assert!(done.is_ok(), "all keys are numbers");
    }
    Ok(())
}

/// A vector of keys. Callers of any function guarantee two things: the CPU supports the instruction set it is written
/// for, and pointers are valid for as many keys as are read or written.
trait Vector: Copy {
    /// Bytes per key.
    const KEY_BYTES: usize;
    /// Keys per vector; divides 64.
    const LANES: usize;
    /// Loads `LANES` keys, of any alignment.
    unsafe fn load(from: *const u8) -> Self;
    unsafe fn store(self, to: *mut u8);
    unsafe fn splat(key: u32) -> Self;
    unsafe fn and(self, other: Self) -> Self;
    unsafe fn max(self, other: Self) -> Self;
    unsafe fn min(self, other: Self) -> Self;
    /// Bit `i`: whether key `i` is at least `bound`'s. Bits past the lanes are zero.
    unsafe fn not_below(self, bound: Self) -> u64;
    /// The largest key; below, the smallest.
    unsafe fn largest(self) -> u32;
    unsafe fn smallest(self) -> u32;
    /// Prefetches the cache line at `at`, which may be outside our memory.
    unsafe fn prefetch(at: *const u8);

    /// Writes `base` plus the position of each set bit of `word`, ascending; writes up to 64 numbers, of which the
    /// rest are arbitrary.
    #[inline(always)]
    unsafe fn positions(word: u64, base: u32, to: *mut u32) {
        let (mut word, mut to) = (word, to);
        while word != 0 {
            // SAFETY: a word has at most 64 bits.
            unsafe {
                to.write(base + word.trailing_zeros());
                to = to.add(1);
            }
            word &= word - 1;
        }
    }

    /// Writes those of 64 numbers whose bits are set in `word`; writes up to 64 numbers, of which the rest are
    /// arbitrary.
    #[inline(always)]
    unsafe fn compress(from: *const u32, word: u64, to: *mut u32) {
        let mut to = to;
        for i in 0..64 {
            // SAFETY: the caller guarantees 64 numbers on both sides.
            unsafe {
                to.write(from.add(i).read());
                to = to.add((word >> i & 1) as usize);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::{
        backend::{Score, keys::with_key, mix, portable},
        tensor::{Accumulator, Dtype, Float, RowBlock, with_float},
    };

    const D_IN: [usize; 16] = [1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 1000, 2048, 4096, 4097];
    const K: [usize; 9] = [1, 2, 5, 16, 20, 64, 100, 256, 2000];
    const DTYPES: [Dtype; 6] = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F8_E4M3, Dtype::F8_E5M2];

    /// Rows of bell-shaped, coarse, equal, and tiny values.
    fn rows_of(dtype: Dtype, d_in: usize) -> Vec<u8> {
        let bell = |i: u64| (0..4).map(|j| (mix(4 * i + j) % 1000) as f64 / 1000.0 - 0.5).sum::<f64>();
        let mut values: Vec<f64> = (0..3 * d_in as u64).map(bell).collect();
        values.extend((0..d_in as u64).map(|i| (mix(i) % 5) as f64 - 2.0));
        values.extend((0..d_in).map(|_| -0.25));
        values.extend((0..d_in).map(|i| if i % 3 == 0 { 0.0 } else { -0.0 }));
        with_float!(dtype, T => {
            let mut bytes = vec![0; values.len() * T::BYTES];
            for (bytes, &value) in bytes.chunks_exact_mut(T::BYTES).zip(&values) {
                T::from_acc(Accumulator::from_f64(value)).write_le(bytes);
            }
            bytes
        }, else unreachable!())
    }

    #[test]
    fn every_instruction_set_equals_the_plain_loop() {
        for machine in all() {
            for (dtype, d_in) in DTYPES.iter().flat_map(|&dtype| D_IN.map(|d_in| (dtype, d_in))) {
                let bytes = rows_of(dtype, d_in);
                let block = RowBlock::new(&bytes, dtype, 6, d_in);
                for score in [Score::Magnitude, Score::Smallest, Score::Fisher(block)] {
                    let rows = ScoredRows::new(block, score);
                    with_key!(rows.space(), K => {
                        for k in K {
                            if let Some(columns) = topk_rows_on::<K>(machine, &rows, k) {
                                let expected = portable::topk_rows::<K>(&rows, k);
                                assert_eq!(columns, expected, "{} {dtype:?} {d_in} {k}", machine.name);
                            }
                        }
                        let mut scratch = Scratch::default();
                        let mut keys = vec![K::default(); d_in];
                        rows.keys(0, &mut scratch, &mut keys).unwrap();
                        for bound in [0, 1, keys[0].to_u64(), keys[d_in / 2].to_u64()] {
                            if let Some(columns) = columns_from_on::<K>(machine, &rows, bound) {
                                let (columns, of_columns) = columns.unwrap();
                                let expected = portable::cut_rows::<K>(&rows, bound, u64::MAX).unwrap().columns;
                                assert_eq!(columns, expected, "{} {dtype:?} {d_in} {bound}", machine.name);
                                let first_row = columns.row(0).iter().map(|&column| keys[column as usize].to_u64() as u32);
                                assert!(first_row.eq(of_columns[columns.row_range(0)].iter().copied()));
                            }
                        }
                    });
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_finds_nans() {
        for machine in all() {
            for nan in [bf16::NAN.to_bits(), 0xff81, 0x7fff] {
                for at in [0, 63, 64, 99, 150, 199] {
                    let mut elements = vec![bf16::INFINITY.to_bits(); 200];
                    elements[at] = nan;
                    let bytes: Vec<u8> = elements.iter().flat_map(|bits| bits.to_le_bytes()).collect();
                    let rows = ScoredRows::new(RowBlock::new(&bytes, Dtype::BF16, 2, 100), Score::Magnitude);
                    for k in [1, 20, 60] {
                        let found = topk_rows_on::<u16>(machine, &rows, k).unwrap().unwrap_err();
                        assert_eq!((found.row, found.column), (at / 100, at % 100));
                    }
                    assert!(columns_from_on::<u16>(machine, &rows, 7).is_some_and(|found| found.is_err()));
                }
            }
            let bytes: Vec<u8> = (0..100).flat_map(|_| f16::NEG_INFINITY.to_le_bytes()).collect();
            let rows = ScoredRows::new(RowBlock::new(&bytes, Dtype::F16, 1, 100), Score::Magnitude);
            assert_eq!(topk_rows_on::<u16>(machine, &rows, 2).unwrap().unwrap(), [0, 1]);
        }
    }

    #[test]
    fn unaligned_rows_give_the_same_result() {
        for machine in all() {
            let bytes = rows_of(Dtype::F32, 333);
            for offset in 0..5 {
                let mut moved = vec![0; offset];
                moved.extend_from_slice(&bytes);
                let rows = ScoredRows::new(RowBlock::new(&moved[offset..], Dtype::F32, 6, 333), Score::Magnitude);
                let expected = portable::topk_rows::<u32>(&rows, 7);
                assert_eq!(topk_rows_on::<u32>(machine, &rows, 7).unwrap(), expected);
            }
        }
    }
}
