//! The loops of [`crate::backend::low_rank`], compiled for the CPU's instruction set. Vectorization does not change a
//! sum: each lane is a separate element.

use std::sync::OnceLock;

use super::super::{
    PatchCounts,
    low_rank::{add_products, merge_with_sums},
};
use crate::tensor::Dtype;

type Add = unsafe fn(u: &[f32], v: &[f32], rank: usize, n_columns: usize, sums: &mut [f32]);
type Merge = unsafe fn(dtype: Dtype, weights: &mut [u8], sums: &[f32], scale: f32) -> PatchCounts;

fn loops() -> (Add, Merge) {
    static LOOPS: OnceLock<(Add, Merge)> = OnceLock::new();
    *LOOPS.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            let has_512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl");
            return if has_512 { (add_avx512, merge_avx512) } else { (add_avx2, merge_avx2) };
        }
        // NEON is part of every 64-bit ARM CPU, fused multiply-add included.
        (add_products::<16>, merge_with_sums)
    })
}

/// As [`crate::backend::add_low_rank`].
pub(in crate::backend) fn add_low_rank(u: &[f32], v: &[f32], rank: usize, n_columns: usize, sums: &mut [f32]) {
    // SAFETY: the CPU supports the instruction set that the loop was compiled for.
    unsafe { loops().0(u, v, rank, n_columns, sums) }
}

/// As [`crate::backend::merge_sums`].
pub(in crate::backend) fn merge_sums(dtype: Dtype, weights: &mut [u8], sums: &[f32], scale: f32) -> PatchCounts {
    // SAFETY: the CPU supports the instruction set that the loop was compiled for.
    unsafe { loops().1(dtype, weights, sums, scale) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
fn add_avx512(u: &[f32], v: &[f32], rank: usize, n_columns: usize, sums: &mut [f32]) {
    add_products::<32>(u, v, rank, n_columns, sums);
}
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn add_avx2(u: &[f32], v: &[f32], rank: usize, n_columns: usize, sums: &mut [f32]) {
    add_products::<16>(u, v, rank, n_columns, sums);
}
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
fn merge_avx512(dtype: Dtype, weights: &mut [u8], sums: &[f32], scale: f32) -> PatchCounts {
    merge_with_sums(dtype, weights, sums, scale)
}
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn merge_avx2(dtype: Dtype, weights: &mut [u8], sums: &[f32], scale: f32) -> PatchCounts {
    merge_with_sums(dtype, weights, sums, scale)
}
