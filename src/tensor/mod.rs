//! Plain values: dtypes, shapes, rows.
//!
//! Nothing here reads a file or starts a thread. A linear weight is `[d_out, d_in]`, row-major, as stored; its rows
//! are neurons. [`Float`] defines the operations of each element type (order by magnitude, widen, round),
//! [`RowLayout`] how a stored tensor is read as rows. [`RowBlock`] borrows a run of rows, and [`RowColumns`] lists
//! chosen columns row by row.

mod codes;
mod float;
mod float8;
mod layout;
mod names;
mod rows;

use half::{bf16, f16};

pub use codes::{CodeType, bits_at, e8m0};
pub use float::{Accumulator, Float, is_float, widened, with_float};
pub use float8::{F8E4M3, F8E5M2};
pub use layout::RowLayout;
pub use names::{module_of, projection_kind};
pub use rows::{RowBlock, RowColumns};
pub use safetensors::Dtype;

/// The name of a dtype in safetensors headers, such as `BF16`.
pub fn dtype_name(dtype: Dtype) -> String {
    // The crate's Debug form is the format's spelling.
    format!("{dtype:?}")
}

/// The dtype with this name in safetensors headers.
pub fn parse_dtype(name: &str) -> Option<Dtype> {
    serde_json::from_value(serde_json::Value::String(name.to_owned())).ok()
}

/// Bytes of `n` elements; `None` if that is not a whole number of bytes, or overflows.
pub fn checked_bytes(dtype: Dtype, n: u64) -> Option<u64> {
    let bits = n.checked_mul(dtype.bitsize() as u64)?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// Rounds to a dtype, nearest even, and widens again. Dtypes wider than 16 bits round to float32.
pub fn round_to(dtype: Dtype, x: f64) -> f32 {
    match dtype {
        Dtype::BF16 => bf16_of(x).to_f32(),
        Dtype::F16 => f16_of(x).to_f32(),
        _ => x as f32,
    }
}

/// Rounds to bfloat16, nearest even, once.
pub fn bf16_of(x: f64) -> bf16 {
    bf16::from_f32(to_odd(x))
}

/// Rounds to float16, nearest even, once.
pub fn f16_of(x: f64) -> f16 {
    f16::from_f32(to_odd(x))
}

/// Rounds to float32 so that a second rounding to fewer bits gives what one rounding would: an inexact result has an odd last bit, and is
/// never taken for a tie. `half`'s own conversions drop the low bits of a float64 before they round.
///
/// Source: Boldo and Melquiond, "When double rounding is odd", 2005.
fn to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    if f64::from(nearest) == x || !nearest.is_finite() {
        return nearest;
    }
    let bits = nearest.to_bits();
    let toward_zero = if f64::from(nearest).abs() > x.abs() { bits - 1 } else { bits };
    f32::from_bits(toward_zero | 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_64_bits_are_rounded_once() {
        // A little above and below the middle between 1 and the next bfloat16.
        let middle = 1.0 + 2f64.powi(-8);
        assert_eq!(bf16_of(middle).to_f64(), 1.0);
        for far in [-23, -30, -52] {
            assert_eq!(bf16_of(middle + 2f64.powi(far)).to_f64(), 1.0 + 2f64.powi(-7), "2^{far}");
            assert_eq!(bf16_of(-middle - 2f64.powi(far)).to_f64(), -1.0 - 2f64.powi(-7), "2^{far}");
            assert_eq!(bf16_of(middle - 2f64.powi(far)).to_f64(), 1.0, "2^{far}");
        }
        let middle = 1.0 + 2f64.powi(-11);
        assert_eq!(f16_of(middle + 2f64.powi(-40)).to_f64(), 1.0 + 2f64.powi(-10));
        assert_eq!(f16_of(middle).to_f64(), 1.0);
        // Every float32 is rounded as `half` rounds it.
        for bits in (0..=u32::MAX).step_by(65_521) {
            let x = f32::from_bits(bits);
            if !x.is_nan() {
                assert_eq!(bf16_of(x.into()).to_bits(), bf16::from_f32(x).to_bits());
                assert_eq!(f16_of(x.into()).to_bits(), f16::from_f32(x).to_bits());
            }
        }
        assert!(bf16_of(f64::NAN).is_nan() && f16_of(1e300).is_infinite());
    }
}
