//! Operations of an element type: reading, ordering by magnitude, widening and rounding.

use half::{bf16, f16};

use super::{Dtype, F8E4M3, F8E5M2};

/// The type in which merge arithmetic runs: `f32`, or `f64` for `f64` weights.
pub trait Accumulator: Copy + PartialEq + Send + Sync + 'static {
    /// Converts a delta or a scale; exact for `f32` values.
    fn from_f64(x: f64) -> Self;
    /// Exact for every accumulator.
    fn to_f64(self) -> f64;
    /// `self + other`.
    fn add(self, other: Self) -> Self;
    /// `self * other`.
    fn mul(self, other: Self) -> Self;
    /// `self + delta * scale`: the product is rounded, then the sum (never fused).
    fn add_scaled(self, delta: Self, scale: Self) -> Self;
}

impl Accumulator for f32 {
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self + other
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self * other
    }
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x as f32
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn add_scaled(self, delta: Self, scale: Self) -> Self {
        self + delta * scale
    }
}

impl Accumulator for f64 {
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self + other
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self * other
    }
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    fn add_scaled(self, delta: Self, scale: Self) -> Self {
        self + delta * scale
    }
}

/// A floating-point element type of a weight.
///
/// Bytes are little-endian and need no alignment.
pub trait Float: Copy + Send + Sync + 'static {
    /// The dtype in safetensors headers.
    const DTYPE: Dtype;
    /// Bytes of one element.
    const BYTES: usize;
    /// The bits of an element that form its magnitude key, and the largest key that is not NaN.
    const KEY_BITS: (u64, u64);
    /// The unsigned integer of the same width.
    type Key: Copy + Ord + Into<u64> + Send + Sync;
    /// The type in which arithmetic runs.
    type Acc: Accumulator;

    /// Reads the element at the start of `bytes` (at least [`Self::BYTES`] long).
    fn from_le(bytes: &[u8]) -> Self;
    /// Writes the element to the start of `bytes`.
    fn write_le(self, bytes: &mut [u8]);
    /// Larger key, larger magnitude: without its sign bit a float orders like an integer. NaN ranks above infinity.
    fn magnitude_key(self) -> Self::Key;
    /// Whether both have the same bits.
    fn same_bits(self, other: Self) -> bool;
    /// Whether the element is NaN.
    fn is_nan(self) -> bool;
    /// Whether the element is neither NaN nor infinite.
    fn is_finite(self) -> bool;
    /// The same number in the accumulator's type; exact.
    fn widen(self) -> Self::Acc;
    /// Rounds once, nearest even. NaN becomes the quiet NaN with a clear sign bit, on every machine.
    fn from_acc(acc: Self::Acc) -> Self;
}

macro_rules! impl_float {
    ($t:ty, $dtype:ident, $key:ty, $acc:ty, $mask:expr, $bits:ident, $from_bits:ident, $widen:expr, $round:expr, $nan:expr, $largest:expr) => {
        impl Float for $t {
            const DTYPE: Dtype = Dtype::$dtype;
            const BYTES: usize = size_of::<$key>();
            const KEY_BITS: (u64, u64) = ($mask, $largest);
            type Key = $key;
            type Acc = $acc;

            #[inline(always)]
            fn from_le(bytes: &[u8]) -> Self {
                let mut le = [0; size_of::<$key>()];
                le.copy_from_slice(&bytes[..size_of::<$key>()]);
                <$t>::$from_bits(<$key>::from_le_bytes(le))
            }
            #[inline(always)]
            fn write_le(self, bytes: &mut [u8]) {
                bytes[..size_of::<$key>()].copy_from_slice(&self.$bits().to_le_bytes());
            }
            #[inline(always)]
            fn magnitude_key(self) -> $key {
                self.$bits() & $mask
            }
            #[inline(always)]
            fn same_bits(self, other: Self) -> bool {
                self.$bits() == other.$bits()
            }
            #[inline(always)]
            fn is_nan(self) -> bool {
                <$t>::is_nan(self)
            }
            #[inline(always)]
            fn is_finite(self) -> bool {
                <$t>::is_finite(self)
            }
            #[inline(always)]
            fn widen(self) -> $acc {
                $widen(self)
            }
            #[inline(always)]
            fn from_acc(acc: $acc) -> Self {
                if acc.is_nan() {
                    return <$t>::$from_bits($nan);
                }
                $round(acc)
            }
        }
    };
}

impl_float!(
    f64,
    F64,
    u64,
    f64,
    0x7fff_ffff_ffff_ffff,
    to_bits,
    from_bits,
    |x| x,
    |x| x,
    0x7ff8_0000_0000_0000,
    0x7ff0_0000_0000_0000
);
impl_float!(f32, F32, u32, f32, 0x7fff_ffff, to_bits, from_bits, |x| x, |x| x, 0x7fc0_0000, 0x7f80_0000);
impl_float!(f16, F16, u16, f32, 0x7fff, to_bits, from_bits, f16::to_f32, f16::from_f32, 0x7e00, 0x7c00);
impl_float!(bf16, BF16, u16, f32, 0x7fff, to_bits, from_bits, bf16::to_f32, bf16::from_f32, 0x7fc0, 0x7f80);
impl_float!(F8E4M3, F8_E4M3, u8, f32, 0x7f, to_bits, from_bits, F8E4M3::to_f32, F8E4M3::from_f32, 0x7f, 0x7e);
impl_float!(F8E5M2, F8_E5M2, u8, f32, 0x7f, to_bits, from_bits, F8E5M2::to_f32, F8E5M2::from_f32, 0x7e, 0x7c);

/// Whether weights of this dtype can be scored and merged: F64, F32, F16, BF16, F8_E4M3 and F8_E5M2.
pub fn is_float(dtype: Dtype) -> bool {
    with_float!(dtype, T => true, else false)
}

/// Evaluates an expression with `T` as the [`Float`] type of a [`Dtype`], or the `else` expression for other dtypes.
///
/// ```
/// use neuroada_ckpt::{Dtype, internals::tensor::{Float, with_float}};
/// let bytes = with_float!(Dtype::BF16, T => T::BYTES, else 0);
/// assert_eq!(bytes, 2);
/// ```
#[macro_export]
#[doc(hidden)]
macro_rules! __with_float {
    ($dtype:expr, $t:ident => $body:expr, else $other:expr) => {
        match $dtype {
            $crate::internals::tensor::Dtype::F64 => {
                #[allow(dead_code)]
                type $t = f64;
                $body
            }
            $crate::internals::tensor::Dtype::F32 => {
                #[allow(dead_code)]
                type $t = f32;
                $body
            }
            $crate::internals::tensor::Dtype::F16 => {
                #[allow(dead_code)]
                type $t = ::half::f16;
                $body
            }
            $crate::internals::tensor::Dtype::BF16 => {
                #[allow(dead_code)]
                type $t = ::half::bf16;
                $body
            }
            $crate::internals::tensor::Dtype::F8_E4M3 => {
                #[allow(dead_code)]
                type $t = $crate::internals::tensor::F8E4M3;
                $body
            }
            $crate::internals::tensor::Dtype::F8_E5M2 => {
                #[allow(dead_code)]
                type $t = $crate::internals::tensor::F8E5M2;
                $body
            }
            _ => $other,
        }
    };
}
pub use __with_float as with_float;

/// Stored little-endian elements in float32: exact, except for F64.
///
/// # Panics
/// If `dtype` is not a float.
pub fn widened(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    with_float!(dtype, T => {
        bytes.chunks_exact(T::BYTES).map(|le| T::from_le(le).widen().to_f64() as f32).collect()
    }, else panic!("{dtype:?} is not a float"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_order_like_magnitudes_and_ignore_the_sign() {
        let ascending = [0.0f32, f32::from_bits(1), 0.5, 1.0, 3.0, f32::MAX, f32::INFINITY];
        for pair in ascending.windows(2) {
            assert!(pair[0].magnitude_key() < pair[1].magnitude_key());
            assert!(bf16::from_f32(pair[0]).magnitude_key() <= bf16::from_f32(-pair[1]).magnitude_key());
        }
        assert_eq!((-0.0f32).magnitude_key(), 0);
        assert!(f32::NAN.magnitude_key() > f32::INFINITY.magnitude_key());
    }

    #[test]
    fn elements_round_trip_through_unaligned_bytes() {
        let mut bytes = [0u8; 9];
        (-1.5f64).write_le(&mut bytes[1..]);
        assert_eq!(f64::from_le(&bytes[1..]), -1.5);
        bf16::from_f32(2.0).write_le(&mut bytes[3..]);
        assert_eq!(bf16::from_le(&bytes[3..]).to_f32(), 2.0);
    }

    #[test]
    fn a_nan_result_has_the_same_bits_everywhere() {
        let negative_nan = f32::from_bits(0xffc1_2345);
        assert_eq!(f32::from_acc(negative_nan).to_bits(), 0x7fc0_0000);
        assert_eq!(<bf16 as Float>::from_acc(negative_nan).to_bits(), 0x7fc0);
        assert_eq!(<f16 as Float>::from_acc(negative_nan).to_bits(), 0x7e00);
        assert_eq!(<F8E4M3 as Float>::from_acc(negative_nan).to_bits(), 0x7f);
        assert_eq!(<F8E5M2 as Float>::from_acc(negative_nan).to_bits(), 0x7e);
    }
}
