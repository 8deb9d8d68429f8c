//! The loops that choose, over any [`Vector`].
//!
//! A row is read twice, the second time from the L1 cache. The first pass distributes the row over a few times `k`
//! lanes and keeps each lane's maximum. The `k`-th largest of the maxima is a bound that at least `k` keys reach, and
//! few more. The second pass marks the keys that reach it, one bit each; the marked keys are then cut exactly. If `k`
//! is large compared with the row, the bound is searched on the row itself, bit by bit. Keys are processed in groups
//! of 64; the last group is padded with zeros.

use super::{KeyRows, Vector};
use crate::tensor::RowColumns;

/// Keys per group: one bit each in a word.
const GROUP: usize = 64;
/// Maximum number of vectors for which lanes stay in registers.
const MAX_REGISTERS: usize = 16;

/// Scratch memory that is reused for every row.
#[derive(Default)]
pub(super) struct SelectScratch {
    /// The last group of a row, padded.
    tail: Vec<u8>,
    /// Maxima of the lanes, in whole groups.
    lanes: Vec<u8>,
    /// One bit per key of the row.
    marked: Vec<u64>,
    /// Keys and columns of the marked entries, padded to whole groups.
    keys: Vec<u8>,
    columns: Vec<u32>,
}

/// The keys of a row in groups.
#[derive(Clone, Copy)]
struct Groups {
    whole: *const u8,
    n_whole: usize,
    /// A padded last group, and its number of valid keys; 0 if there is no such group.
    tail: *const u8,
    n_tail: usize,
}

impl Groups {
    #[inline(always)]
    fn n(&self) -> usize {
        self.n_whole + usize::from(self.n_tail > 0)
    }

    /// # Safety
    /// `group < self.n()`.
    #[inline(always)]
    unsafe fn at<V: Vector>(&self, group: usize) -> *const u8 {
        // SAFETY: whole groups are contiguous.
        if group < self.n_whole { unsafe { self.whole.add(group * GROUP * V::KEY_BYTES) } } else { self.tail }
    }

    /// # Safety
    /// The column is inside the groups.
    #[inline(always)]
    unsafe fn key<V: Vector>(&self, column: usize) -> u32 {
        let in_whole = self.n_whole * GROUP;
        let (from, at) = if column < in_whole { (self.whole, column) } else { (self.tail, column - in_whole) };
        // SAFETY: the column is inside the groups.
        unsafe { read_key::<V>(from.add(at * V::KEY_BYTES)) }
    }
}

/// See [`super::TopKFn`].
#[inline(always)]
pub(super) unsafe fn topk_rows<V: Vector>(
    rows: KeyRows<'_>,
    k: usize,
    scratch: &mut SelectScratch,
    columns: &mut Vec<u32>,
) -> Result<(), usize> {
    assert!(0 < k && k < rows.d_in, "k is smaller than the row");
    for (i, row) in rows.bytes.chunks_exact(rows.d_in * V::KEY_BYTES).enumerate() {
        // SAFETY: the caller guarantees the instruction set.
        unsafe {
            let groups = groups_of::<V>(row, &mut scratch.tail);
            let largest = if k == 1 {
                top_one::<V>(groups, rows.mask, columns)
            } else {
                top::<V>(groups, rows.d_in, rows.mask, k, scratch, columns)
            };
            if largest > rows.largest {
                return Err(i);
            }
        }
    }
    Ok(())
}

/// See [`super::ColumnsFromFn`].
#[inline(always)]
pub(super) unsafe fn columns_from<V: Vector>(
    rows: KeyRows<'_>,
    bound: u32,
    scratch: &mut SelectScratch,
    columns: &mut RowColumns,
    keys: &mut Vec<u32>,
) -> Result<(), usize> {
    for (i, row) in rows.bytes.chunks_exact(rows.d_in * V::KEY_BYTES).enumerate() {
        // SAFETY: the caller guarantees the instruction set.
        unsafe {
            let groups = groups_of::<V>(row, &mut scratch.tail);
            let (n, largest) = mark::<V, true>(groups, rows.mask, bound, &mut scratch.marked);
            if largest > rows.largest {
                return Err(i);
            }
            scratch.columns.clear();
            append_marked::<V>(&scratch.marked, n, &mut scratch.columns);
            let key_of = |&column: &u32| groups.key::<V>(column as usize) & rows.mask;
            keys.extend(scratch.columns.iter().map(key_of));
        }
        columns.push_row(&scratch.columns);
    }
    Ok(())
}

/// Splits a row into groups; copies its last keys to `tail`.
#[inline(always)]
fn groups_of<V: Vector>(row: &[u8], tail: &mut Vec<u8>) -> Groups {
    let whole = row.len() / (GROUP * V::KEY_BYTES);
    let rest = &row[whole * GROUP * V::KEY_BYTES..];
    if !rest.is_empty() {
        tail.clear();
        tail.extend_from_slice(rest);
        tail.resize(GROUP * V::KEY_BYTES, 0);
    }
    Groups { whole: row.as_ptr(), n_whole: whole, tail: tail.as_ptr(), n_tail: rest.len() / V::KEY_BYTES }
}

/// Appends the first column of the largest key, and returns the key.
#[inline(always)]
unsafe fn top_one<V: Vector>(groups: Groups, mask: u32, columns: &mut Vec<u32>) -> u32 {
    // SAFETY: the caller guarantees the instruction set; all reads are inside the groups.
    unsafe {
        let mask = V::splat(mask);
        let row_bytes = (groups.n_whole * GROUP + groups.n_tail) * V::KEY_BYTES;
        let mut max = [V::splat(0); MAX_REGISTERS];
        let per_group = GROUP / V::LANES;
        // Two groups at a time if there are enough registers, so that consecutive maxima are independent.
        let n_together = if 2 * per_group <= MAX_REGISTERS { 2 } else { 1 };
        let rounds = groups.n_whole / n_together;
        for round in 0..rounds {
            let at = groups.at::<V>(n_together * round);
            for (v, max) in max.iter_mut().enumerate().take(n_together * per_group) {
                let at = at.add(v * V::LANES * V::KEY_BYTES);
                *max = max.max(V::load(at).and(mask));
                V::prefetch(at.wrapping_add(row_bytes));
            }
        }
        for group in n_together * rounds..groups.n() {
            let at = groups.at::<V>(group);
            for (v, max) in max.iter_mut().enumerate().take(per_group) {
                *max = max.max(V::load(at.add(v * V::LANES * V::KEY_BYTES)).and(mask));
            }
        }
        let mut all = max[0];
        for &max in &max[1..n_together * per_group] {
            all = all.max(max);
        }
        let largest = all.largest();
        let bound = V::splat(largest);
        for group in 0..groups.n() {
            let word = word_of::<V>(groups.at::<V>(group), mask, bound);
            if word != 0 {
                columns.push((group * GROUP) as u32 + word.trailing_zeros());
                break;
            }
        }
        largest
    }
}

/// Appends the columns of the `k` largest keys, ascending, and returns the largest.
#[inline(always)]
unsafe fn top<V: Vector>(
    groups: Groups,
    d_in: usize,
    mask: u32,
    k: usize,
    scratch: &mut SelectScratch,
    columns: &mut Vec<u32>,
) -> u32 {
    // SAFETY: the caller guarantees the instruction set; all reads are inside the groups.
    unsafe {
        // A few keys more than needed cost less than the last steps of a search.
        let slack = k / 8 + 1;
        let (bound, largest) = if 8 * k <= d_in {
            let n_groups = (4 * k).div_ceil(GROUP);
            let (smallest, largest) = lane_maxima::<V>(groups, mask, n_groups, &mut scratch.lanes);
            let lanes = Groups { whole: scratch.lanes.as_ptr(), n_whole: n_groups, tail: std::ptr::null(), n_tail: 0 };
            (kth::<V>(lanes, u32::MAX, k, slack, smallest, largest), largest)
        } else {
            let (_, largest) = lane_maxima::<V>(groups, mask, 1, &mut scratch.lanes);
            (kth::<V>(groups, mask, k, slack, 0, largest), largest)
        };
        let (n, _) = mark::<V, false>(groups, mask, bound, &mut scratch.marked);
        if n == k {
            append_marked::<V>(&scratch.marked, n, columns);
            return largest;
        }
        // More keys reach the bound than needed: cut them.
        scratch.columns.clear();
        append_marked::<V>(&scratch.marked, n, &mut scratch.columns);
        let n_groups = n.div_ceil(GROUP);
        scratch.columns.resize(n_groups * GROUP, 0);
        grow(&mut scratch.keys, n_groups * GROUP * V::KEY_BYTES);
        let keys = scratch.keys.as_mut_ptr();
        for (i, &column) in scratch.columns[..n].iter().enumerate() {
            write_key::<V>(keys.add(i * V::KEY_BYTES), groups.key::<V>(column as usize) & mask);
        }
        keys.add(n * V::KEY_BYTES).write_bytes(0, (n_groups * GROUP - n) * V::KEY_BYTES);
        let candidates = Groups { whole: keys, n_whole: n_groups, tail: std::ptr::null(), n_tail: 0 };
        let cut = kth::<V>(candidates, u32::MAX, k, 0, bound, largest);
        let n_above = if cut == largest { 0 } else { count::<V>(candidates, u32::MAX, cut + 1) };
        let mut ties_left = k - n_above;
        columns.reserve(k + GROUP);
        let mut to = columns.as_mut_ptr().add(columns.len());
        let (all, from_cut) = (V::splat(u32::MAX), V::splat(cut));
        for group in 0..n_groups {
            let at = candidates.at::<V>(group);
            let reached = word_of::<V>(at, all, from_cut) & valid(n - group * GROUP);
            let above = if cut == largest { 0 } else { word_of::<V>(at, all, V::splat(cut + 1)) };
            let ties = first_bits(reached & !above, ties_left);
            ties_left -= ties.count_ones() as usize;
            V::compress(scratch.columns.as_ptr().add(group * GROUP), above | ties, to);
            to = to.add((above | ties).count_ones() as usize);
        }
        columns.set_len(columns.len() + k);
        largest
    }
}

/// Distributes the keys over `64 * n_groups` lanes and keeps their maxima; returns the smallest and the largest
/// maximum.
#[inline(always)]
unsafe fn lane_maxima<V: Vector>(groups: Groups, mask: u32, n_groups: usize, lanes: &mut Vec<u8>) -> (u32, u32) {
    let per_group = GROUP / V::LANES;
    let vector_bytes = V::LANES * V::KEY_BYTES;
    grow(lanes, n_groups * GROUP * V::KEY_BYTES);
    // SAFETY: the caller guarantees the instruction set; reads are inside the groups, and `lanes` was just resized for
    // all lanes.
    unsafe {
        let mask = V::splat(mask);
        let maxima = lanes.as_mut_ptr();
        if n_groups * per_group <= MAX_REGISTERS {
            match n_groups {
                1 => registers::<V, 1>(groups, mask, maxima),
                2 => registers::<V, 2>(groups, mask, maxima),
                3 => registers::<V, 3>(groups, mask, maxima),
                _ => through_memory::<V>(groups, mask, n_groups, maxima),
            }
        } else {
            through_memory::<V>(groups, mask, n_groups, maxima);
        }
        let (mut smallest, mut largest) = (V::load(maxima), V::load(maxima));
        for v in 1..n_groups * per_group {
            let lane = V::load(maxima.add(v * vector_bytes));
            smallest = smallest.min(lane);
            largest = largest.max(lane);
        }
        (smallest.smallest(), largest.largest())
    }
}

#[inline(always)]
unsafe fn registers<V: Vector, const N_GROUPS: usize>(groups: Groups, mask: V, maxima: *mut u8) {
    let per_group = GROUP / V::LANES;
    let vector_bytes = V::LANES * V::KEY_BYTES;
    // SAFETY: as in `lane_maxima`.
    unsafe {
        let mut max = [V::splat(0); MAX_REGISTERS];
        let rounds = groups.n_whole / N_GROUPS;
        for round in 0..rounds {
            let at = groups.at::<V>(round * N_GROUPS);
            for (v, max) in max.iter_mut().enumerate().take(N_GROUPS * per_group) {
                *max = max.max(V::load(at.add(v * vector_bytes)).and(mask));
            }
        }
        for (v, max) in max.iter().enumerate().take(N_GROUPS * per_group) {
            max.store(maxima.add(v * vector_bytes));
        }
        for group in rounds * N_GROUPS..groups.n() {
            raise::<V>(groups.at::<V>(group), mask, maxima.add(group % N_GROUPS * per_group * vector_bytes));
        }
    }
}

#[inline(always)]
unsafe fn through_memory<V: Vector>(groups: Groups, mask: V, n_groups: usize, maxima: *mut u8) {
    // SAFETY: as in `lane_maxima`.
    unsafe { maxima.write_bytes(0, n_groups * GROUP * V::KEY_BYTES) };
    let mut lane_group = 0;
    for group in 0..groups.n() {
        // SAFETY: as in `lane_maxima`.
        unsafe { raise::<V>(groups.at::<V>(group), mask, maxima.add(lane_group * GROUP * V::KEY_BYTES)) };
        lane_group = if lane_group + 1 == n_groups { 0 } else { lane_group + 1 };
    }
}

/// Takes the maximum of a group of lanes and a group of keys.
#[inline(always)]
unsafe fn raise<V: Vector>(group: *const u8, mask: V, lanes: *mut u8) {
    for v in 0..GROUP / V::LANES {
        let at = v * V::LANES * V::KEY_BYTES;
        // SAFETY: both are whole groups.
        unsafe { V::load(lanes.add(at)).max(V::load(group.add(at)).and(mask)).store(lanes.add(at)) };
    }
}

/// A key that at least `k` keys reach, and at most `k + slack`, unless it is the `k`-th largest key itself.
///
/// At least `k` keys reach `smallest`, and none is above `largest`.
#[inline(always)]
unsafe fn kth<V: Vector>(groups: Groups, mask: u32, k: usize, slack: usize, smallest: u32, largest: u32) -> u32 {
    let (mut reached, mut most) = (smallest, largest);
    while reached < most {
        let middle = most - (most - reached) / 2;
        // SAFETY: the caller guarantees the instruction set and the groups.
        let n = unsafe { count::<V>(groups, mask, middle) };
        if n < k {
            most = middle - 1;
        } else {
            reached = middle;
            if n <= k + slack {
                break;
            }
        }
    }
    reached
}

/// Number of keys that reach `bound`, which is not zero.
#[inline(always)]
unsafe fn count<V: Vector>(groups: Groups, mask: u32, bound: u32) -> usize {
    debug_assert!(bound > 0, "padding reaches zero");
    // SAFETY: the caller guarantees the instruction set and the groups.
    unsafe {
        let (mask, bound) = (V::splat(mask), V::splat(bound));
        let mut n = 0;
        for group in 0..groups.n() {
            n += word_of::<V>(groups.at::<V>(group), mask, bound).count_ones();
        }
        n as usize
    }
}

/// Marks the keys that reach `bound`; returns their number and, with `WITH_LARGEST`, the largest key of all.
#[inline(always)]
unsafe fn mark<V: Vector, const WITH_LARGEST: bool>(
    groups: Groups,
    mask: u32,
    bound: u32,
    marked: &mut Vec<u64>,
) -> (usize, u32) {
    marked.resize(groups.n(), 0);
    // SAFETY: the caller guarantees the instruction set and the groups; there is one word per group.
    unsafe {
        let (mask, bound) = (V::splat(mask), V::splat(bound));
        let row_bytes = (groups.n_whole * GROUP + groups.n_tail) * V::KEY_BYTES;
        let mut largest = V::splat(0);
        let mut n = 0;
        for group in 0..groups.n() {
            let at = groups.at::<V>(group);
            let mut word = 0;
            for v in 0..GROUP / V::LANES {
                let keys = V::load(at.add(v * V::LANES * V::KEY_BYTES)).and(mask);
                if WITH_LARGEST {
                    largest = largest.max(keys);
                } else {
                    // Prefetch the next row while this one is cut.
                    V::prefetch(at.wrapping_add(v * V::LANES * V::KEY_BYTES + row_bytes));
                }
                word |= keys.not_below(bound) << (v * V::LANES);
            }
            if group == groups.n_whole {
                word &= (1 << groups.n_tail) - 1;
            }
            n += word.count_ones();
            *marked.get_unchecked_mut(group) = word;
        }
        (n as usize, if WITH_LARGEST { largest.largest() } else { 0 })
    }
}

/// One bit per key of a group: whether it reaches `bound`.
#[inline(always)]
unsafe fn word_of<V: Vector>(group: *const u8, mask: V, bound: V) -> u64 {
    let mut word = 0;
    for v in 0..GROUP / V::LANES {
        // SAFETY: the caller guarantees the instruction set; the group is whole.
        let keys = unsafe { V::load(group.add(v * V::LANES * V::KEY_BYTES)).and(mask) };
        // SAFETY: as above.
        word |= unsafe { keys.not_below(bound) } << (v * V::LANES);
    }
    word
}

/// Appends the columns of the `n` marked keys.
#[inline(always)]
unsafe fn append_marked<V: Vector>(marked: &[u64], n: usize, columns: &mut Vec<u32>) {
    columns.reserve(n + GROUP);
    // SAFETY: there is room for all of them, and for one more word.
    unsafe {
        let mut to = columns.as_mut_ptr().add(columns.len());
        if n > marked.len() {
            for (group, &word) in marked.iter().enumerate() {
                V::positions(word, (group * GROUP) as u32, to);
                to = to.add(word.count_ones() as usize);
            }
        } else {
            // Most words have no bit or one, in an order that branch prediction cannot learn.
            for (group, &word) in marked.iter().enumerate() {
                let base = (group * GROUP) as u32;
                to.write(base + word.trailing_zeros());
                to = to.add(usize::from(word != 0));
                let rest = word & word.wrapping_sub(1);
                if rest != 0 {
                    V::positions(rest, base, to);
                    to = to.add(rest.count_ones() as usize);
                }
            }
        }
        columns.set_len(columns.len() + n);
    }
}

/// A word whose first `n` bits are set.
#[inline(always)]
fn valid(n: usize) -> u64 {
    if n < GROUP { (1 << n) - 1 } else { u64::MAX }
}

/// The lowest `n` set bits of `word`.
#[inline(always)]
fn first_bits(word: u64, n: usize) -> u64 {
    let mut too_many = (word.count_ones() as usize).saturating_sub(n);
    let mut word = word;
    while too_many > 0 {
        word &= !(1 << (63 - word.leading_zeros()));
        too_many -= 1;
    }
    word
}

/// Lengthens `scratch` to `n_bytes`; its content is arbitrary.
#[inline(always)]
fn grow(scratch: &mut Vec<u8>, n_bytes: usize) {
    if scratch.len() < n_bytes {
        scratch.resize(n_bytes, 0);
    }
}

#[inline(always)]
unsafe fn read_key<V: Vector>(from: *const u8) -> u32 {
    // SAFETY: the caller guarantees `KEY_BYTES` bytes.
    unsafe {
        match V::KEY_BYTES {
            1 => from.read().into(),
            2 => from.cast::<u16>().read_unaligned().into(),
            _ => from.cast::<u32>().read_unaligned(),
        }
    }
}

#[inline(always)]
unsafe fn write_key<V: Vector>(to: *mut u8, key: u32) {
    // SAFETY: the caller guarantees `KEY_BYTES` bytes.
    unsafe {
        match V::KEY_BYTES {
            1 => to.write(key as u8),
            2 => to.cast::<u16>().write_unaligned(key as u16),
            _ => to.cast::<u32>().write_unaligned(key),
        }
    }
}
