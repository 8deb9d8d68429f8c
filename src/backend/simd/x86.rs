//! AVX-512 and AVX2.

use std::arch::x86_64::*;

use super::{KeyRows, Loops, Machine, Vector, select, select::SelectScratch};
use crate::tensor::RowColumns;

/// The implementations that this CPU supports, fastest first.
pub(super) fn all() -> Vec<Machine> {
    let mut all = Vec::new();
    let has_bits = is_x86_feature_detected!("popcnt") && is_x86_feature_detected!("bmi1");
    let has_avx2 = is_x86_feature_detected!("avx2");
    if has_bits && has_avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
        all.push(Machine { name: "avx512", u8: avx512_u8::LOOPS, u16: avx512_u16::LOOPS, u32: avx512_u32::LOOPS });
    }
    if has_bits && has_avx2 {
        all.push(Machine { name: "avx2", u8: avx2_u8::LOOPS, u16: avx2_u16::LOOPS, u32: avx2_u32::LOOPS });
    }
    all
}

macro_rules! vector {
    ($name:ident, $inner:ty, $key_bytes:expr, $lanes:expr, $load:ident, $store:ident, $splat:expr, $and:ident, $max:ident,
     $min:ident, $not_below:expr, $largest:expr, $smallest:expr $(, $compressing:ident)?) => {
        #[derive(Clone, Copy)]
        struct $name($inner);

        impl Vector for $name {
            const KEY_BYTES: usize = $key_bytes;
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
                Self(unsafe { $splat(key) })
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
                unsafe { $largest(self.0) }
            }
            #[inline(always)]
            unsafe fn smallest(self) -> u32 {
                // SAFETY: the caller upholds the contract of `Vector`.
                unsafe { $smallest(self.0) }
            }
            #[inline(always)]
            unsafe fn prefetch(at: *const u8) {
                // SAFETY: the caller upholds the contract of `Vector`.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
            }
            $($compressing!();)?
        }
    };
}

macro_rules! loops {
    ($module:ident, $vector:ident, $features:literal) => {
        mod $module {
            use super::*;

            pub(super) const LOOPS: Loops = Loops { topk, from };

            #[target_feature(enable = $features)]
            unsafe fn topk(
                rows: KeyRows<'_>,
                k: usize,
                scratch: &mut SelectScratch,
                columns: &mut Vec<u32>,
            ) -> Result<(), usize> {
                // SAFETY: this function is compiled for the vector's instruction set.
                unsafe { select::topk_rows::<$vector>(rows, k, scratch, columns) }
            }

            #[target_feature(enable = $features)]
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

/// The two functions of [`Vector`] that AVX-512 has instructions for.
macro_rules! compressing {
    () => {
        #[inline(always)]
        unsafe fn positions(word: u64, base: u32, to: *mut u32) {
            // SAFETY: the caller upholds the contract of `Vector`.
            unsafe {
                let first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
                let (mut word, mut to) = (word, to);
                let mut columns = _mm512_add_epi32(first, _mm512_set1_epi32(base as i32));
                for _ in 0..4 {
                    _mm512_storeu_si512(to.cast(), _mm512_maskz_compress_epi32(word as u16, columns));
                    to = to.add((word as u16).count_ones() as usize);
                    columns = _mm512_add_epi32(columns, _mm512_set1_epi32(16));
                    word >>= 16;
                }
            }
        }
        #[inline(always)]
        unsafe fn compress(from: *const u32, word: u64, to: *mut u32) {
            // SAFETY: the caller upholds the contract of `Vector`.
            unsafe {
                let mut to = to;
                for i in 0..4 {
                    let part = (word >> (16 * i)) as u16;
                    let columns = _mm512_loadu_si512(from.add(16 * i).cast());
                    _mm512_storeu_si512(to.cast(), _mm512_maskz_compress_epi32(part, columns));
                    to = to.add(part.count_ones() as usize);
                }
            }
        }
    };
}

/// Folds a vector of 512 bits, whole or in halves, to one of 128.
macro_rules! fold {
    ($_fold512:ident, $fold256:ident, $fold128:ident, $v:expr) => {{
        let v = $v;
        let half = $fold256(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64::<1>(v));
        fold!($fold256, $fold128, half)
    }};
    ($fold256:ident, $fold128:ident, $v:expr) => {{
        let v = $v;
        $fold128(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v))
    }};
}

/// The smallest of eight `u16`.
#[inline(always)]
unsafe fn min_u16(v: __m128i) -> u32 {
    // SAFETY: the caller guarantees SSE4.1.
    unsafe { _mm_extract_epi16::<0>(_mm_minpos_epu16(v)) as u32 }
}
/// The largest of eight `u16`.
#[inline(always)]
unsafe fn max_u16(v: __m128i) -> u32 {
    // SAFETY: the caller guarantees SSE4.1.
    unsafe { 0xffff - min_u16(_mm_xor_si128(v, _mm_set1_epi8(-1))) }
}
/// The smallest of sixteen `u8`.
#[inline(always)]
unsafe fn min_u8(v: __m128i) -> u32 {
    // SAFETY: the caller guarantees SSE4.1.
    unsafe { min_u16(_mm_min_epu8(_mm_srli_epi16::<8>(v), _mm_and_si128(v, _mm_set1_epi16(0xff)))) }
}
/// The largest of sixteen `u8`.
#[inline(always)]
unsafe fn max_u8(v: __m128i) -> u32 {
    // SAFETY: the caller guarantees SSE4.1.
    unsafe { 0xff - min_u8(_mm_xor_si128(v, _mm_set1_epi8(-1))) }
}
/// The smallest of four `u32`.
#[inline(always)]
unsafe fn min_u32(v: __m128i) -> u32 {
    // SAFETY: the caller guarantees SSE4.1.
    unsafe {
        let v = _mm_min_epu32(v, _mm_shuffle_epi32::<0b01_00_11_10>(v));
        _mm_cvtsi128_si32(_mm_min_epu32(v, _mm_shuffle_epi32::<0b10_11_00_01>(v))) as u32
    }
}
/// The largest of four `u32`.
#[inline(always)]
unsafe fn max_u32(v: __m128i) -> u32 {
    // SAFETY: the caller guarantees SSE4.1.
    unsafe { !min_u32(_mm_xor_si128(v, _mm_set1_epi8(-1))) }
}

vector!(
    Avx512U8,
    __m512i,
    1,
    64,
    _mm512_loadu_si512,
    _mm512_storeu_si512,
    |key: u32| _mm512_set1_epi8(key as i8),
    _mm512_and_si512,
    _mm512_max_epu8,
    _mm512_min_epu8,
    |a, b| _mm512_cmpge_epu8_mask(a, b),
    |v| max_u8(fold!(_mm512_max_epu8, _mm256_max_epu8, _mm_max_epu8, v)),
    |v| min_u8(fold!(_mm512_min_epu8, _mm256_min_epu8, _mm_min_epu8, v)),
    compressing
);
vector!(
    Avx512U16,
    __m512i,
    2,
    32,
    _mm512_loadu_si512,
    _mm512_storeu_si512,
    |key: u32| _mm512_set1_epi16(key as i16),
    _mm512_and_si512,
    _mm512_max_epu16,
    _mm512_min_epu16,
    |a, b| u64::from(_mm512_cmpge_epu16_mask(a, b)),
    |v| max_u16(fold!(_mm512_max_epu16, _mm256_max_epu16, _mm_max_epu16, v)),
    |v| min_u16(fold!(_mm512_min_epu16, _mm256_min_epu16, _mm_min_epu16, v)),
    compressing
);
vector!(
    Avx512U32,
    __m512i,
    4,
    16,
    _mm512_loadu_si512,
    _mm512_storeu_si512,
    |key: u32| _mm512_set1_epi32(key as i32),
    _mm512_and_si512,
    _mm512_max_epu32,
    _mm512_min_epu32,
    |a, b| u64::from(_mm512_cmpge_epu32_mask(a, b)),
    |v| max_u32(fold!(_mm512_max_epu32, _mm256_max_epu32, _mm_max_epu32, v)),
    |v| min_u32(fold!(_mm512_min_epu32, _mm256_min_epu32, _mm_min_epu32, v)),
    compressing
);
vector!(
    Avx2U8,
    __m256i,
    1,
    32,
    _mm256_loadu_si256,
    _mm256_storeu_si256,
    |key: u32| _mm256_set1_epi8(key as i8),
    _mm256_and_si256,
    _mm256_max_epu8,
    _mm256_min_epu8,
    |a, b| { u64::from(_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(a, b), a)) as u32) },
    |v| max_u8(fold!(_mm256_max_epu8, _mm_max_epu8, v)),
    |v| min_u8(fold!(_mm256_min_epu8, _mm_min_epu8, v))
);
vector!(
    Avx2U16,
    __m256i,
    2,
    16,
    _mm256_loadu_si256,
    _mm256_storeu_si256,
    |key: u32| _mm256_set1_epi16(key as i16),
    _mm256_and_si256,
    _mm256_max_epu16,
    _mm256_min_epu16,
    |a, b| {
        let reached = _mm256_cmpeq_epi16(_mm256_max_epu16(a, b), a);
        // Each half of the vector is packed into its own lower bytes.
        let packed = _mm256_movemask_epi8(_mm256_packs_epi16(reached, _mm256_setzero_si256())) as u32;
        u64::from(packed & 0xff | packed >> 8 & 0xff00)
    },
    |v| max_u16(fold!(_mm256_max_epu16, _mm_max_epu16, v)),
    |v| min_u16(fold!(_mm256_min_epu16, _mm_min_epu16, v))
);
vector!(
    Avx2U32,
    __m256i,
    4,
    8,
    _mm256_loadu_si256,
    _mm256_storeu_si256,
    |key: u32| _mm256_set1_epi32(key as i32),
    _mm256_and_si256,
    _mm256_max_epu32,
    _mm256_min_epu32,
    |a, b| {
        let reached = _mm256_cmpeq_epi32(_mm256_max_epu32(a, b), a);
        u64::from(_mm256_movemask_ps(_mm256_castsi256_ps(reached)) as u32)
    },
    |v| max_u32(fold!(_mm256_max_epu32, _mm_max_epu32, v)),
    |v| min_u32(fold!(_mm256_min_epu32, _mm_min_epu32, v))
);

loops!(avx512_u8, Avx512U8, "avx512f,avx512bw,avx2,popcnt,bmi1");
loops!(avx512_u16, Avx512U16, "avx512f,avx512bw,avx2,popcnt,bmi1");
loops!(avx512_u32, Avx512U32, "avx512f,avx512bw,avx2,popcnt,bmi1");
loops!(avx2_u8, Avx2U8, "avx2,popcnt,bmi1");
loops!(avx2_u16, Avx2U16, "avx2,popcnt,bmi1");
loops!(avx2_u32, Avx2U32, "avx2,popcnt,bmi1");
