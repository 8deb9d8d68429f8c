//! NEON, which every 64-bit ARM CPU supports.

use std::arch::aarch64::*;

use super::{KeyRows, Loops, Machine, Vector, select, select::SelectScratch};
use crate::tensor::RowColumns;

/// The implementations that this CPU supports.
pub(super) fn all() -> Vec<Machine> {
    vec![Machine { name: "neon", u8: neon_u8::LOOPS, u16: neon_u16::LOOPS, u32: neon_u32::LOOPS }]
}

/// One weight per lane, so that the sum over the set lanes is a bit mask.
const BITS_U8: [u8; 16] = [1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128];
const BITS_U16: [u16; 8] = [1, 2, 4, 8, 16, 32, 64, 128];
const BITS_U32: [u32; 4] = [1, 2, 4, 8];

macro_rules! vector {
    ($name:ident, $inner:ty, $key:ty, $lanes:expr, $load:ident, $store:ident, $splat:ident, $and:ident, $max:ident,
     $min:ident, $largest:ident, $smallest:ident, $not_below:expr) => {
        #[derive(Clone, Copy)]
        struct $name($inner);

        impl Vector for $name {
            const KEY_BYTES: usize = size_of::<$key>();
            const LANES: usize = $lanes;
            #[inline(always)]
            unsafe fn load(from: *const u8) -> Self {
                // SAFETY: the caller upholds the contract of `Vector`.
                Self(unsafe { $load(from.cast()) })
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut u8) {
                // SAFETY: the caller upholds the contract of `Vector`.
                unsafe { $store(to.cast(), self.0) }
            }
            #[inline(always)]
            unsafe fn splat(key: u32) -> Self {
                // SAFETY: the caller upholds the contract of `Vector`.
                Self(unsafe { $splat(key as $key) })
            }
            #[inline(always)]
            unsafe fn and(self, other: Self) -> Self {
                // SAFETY: the caller upholds the contract of `Vector`.
                Self(unsafe { $and(self.0, other.0) })
            }
            #[inline(always)]
            unsafe fn max(self, other: Self) -> Self {
                // SAFETY: the caller upholds the contract of `Vector`.
                Self(unsafe { $max(self.0, other.0) })
            }
            #[inline(always)]
            unsafe fn min(self, other: Self) -> Self {
                // SAFETY: the caller upholds the contract of `Vector`.
                Self(unsafe { $min(self.0, other.0) })
            }
            #[inline(always)]
            unsafe fn not_below(self, bound: Self) -> u64 {
                // SAFETY: the caller upholds the contract of `Vector`.
                unsafe { $not_below(self.0, bound.0) }
            }
            #[inline(always)]
            unsafe fn largest(self) -> u32 {
                // SAFETY: the caller upholds the contract of `Vector`.
                u32::from(unsafe { $largest(self.0) })
            }
            #[inline(always)]
            unsafe fn smallest(self) -> u32 {
                // SAFETY: the caller upholds the contract of `Vector`.
                u32::from(unsafe { $smallest(self.0) })
            }
            #[inline(always)]
            unsafe fn prefetch(_at: *const u8) {}
        }
    };
}

macro_rules! loops {
    ($module:ident, $vector:ident) => {
        mod $module {
            use super::*;

            pub(super) const LOOPS: Loops = Loops { topk, from };

            #[target_feature(enable = "neon")]
            unsafe fn topk(
                rows: KeyRows<'_>,
                k: usize,
                scratch: &mut SelectScratch,
                columns: &mut Vec<u32>,
            ) -> Result<(), usize> {
                // SAFETY: this function is compiled for the vector's instruction set.
                unsafe { select::topk_rows::<$vector>(rows, k, scratch, columns) }
            }

            #[target_feature(enable = "neon")]
            unsafe fn from(
                rows: KeyRows<'_>,
                bound: u32,
                scratch: &mut SelectScratch,
                columns: &mut RowColumns,
                keys: &mut Vec<u32>,
            ) -> Result<(), usize> {
                // SAFETY: this function is compiled for the vector's instruction set.
                unsafe { select::columns_from::<$vector>(rows, bound, scratch, columns, keys) }
            }
        }
    };
}

vector!(
    NeonU8,
    uint8x16_t,
    u8,
    16,
    vld1q_u8,
    vst1q_u8,
    vdupq_n_u8,
    vandq_u8,
    vmaxq_u8,
    vminq_u8,
    vmaxvq_u8,
    vminvq_u8,
    |a, b| {
        let bits = vandq_u8(vcgeq_u8(a, b), vld1q_u8(BITS_U8.as_ptr()));
        u64::from(vaddv_u8(vget_low_u8(bits))) | u64::from(vaddv_u8(vget_high_u8(bits))) << 8
    }
);
vector!(
    NeonU16,
    uint16x8_t,
    u16,
    8,
    vld1q_u16,
    vst1q_u16,
    vdupq_n_u16,
    vandq_u16,
    vmaxq_u16,
    vminq_u16,
    vmaxvq_u16,
    vminvq_u16,
    |a, b| u64::from(vaddvq_u16(vandq_u16(vcgeq_u16(a, b), vld1q_u16(BITS_U16.as_ptr()))))
);
vector!(
    NeonU32,
    uint32x4_t,
    u32,
    4,
    vld1q_u32,
    vst1q_u32,
    vdupq_n_u32,
    vandq_u32,
    vmaxq_u32,
    vminq_u32,
    vmaxvq_u32,
    vminvq_u32,
    |a, b| u64::from(vaddvq_u32(vandq_u32(vcgeq_u32(a, b), vld1q_u32(BITS_U32.as_ptr()))))
);

loops!(neon_u8, NeonU8);
loops!(neon_u16, NeonU16);
loops!(neon_u32, NeonU32);
