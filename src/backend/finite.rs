//! The distance of weights from infinity, which a merge checks before it writes.

use crate::tensor::{Accumulator, Dtype, Float, with_float};

/// The sum of delta magnitudes below which no finite weight of `dtype` can become infinite or NaN.
///
/// A quarter of a unit in the last place at the dtype's largest finite number. This is half of what rounds to
/// infinity, so that rounding of intermediate sums does not matter.
///
/// # Panics
/// If `dtype` is not a float.
pub fn overflow_margin(dtype: Dtype) -> f64 {
    with_float!(dtype, T => (largest_below::<T>(0) - largest_below::<T>(1)) / 4.0, else unreachable!("targets are floats"))
}

/// The largest finite number of `dtype`.
///
/// # Panics
/// If `dtype` is not a float.
pub fn largest_finite(dtype: Dtype) -> f64 {
    with_float!(dtype, T => largest_below::<T>(0), else unreachable!("targets are floats"))
}

/// The finite number `n` steps below the largest.
fn largest_below<T: Float>(n: u64) -> f64 {
    let number = |key: u64| T::from_le(&key.to_le_bytes());
    let largest = T::KEY_BITS.1 - u64::from(!number(T::KEY_BITS.1).is_finite());
    number(largest - n).widen().to_f64()
}

/// The largest magnitude among finite elements of `dtype`; 0 if there are none.
///
/// # Panics
/// If `dtype` is not a float.
pub fn largest_magnitude(dtype: Dtype, elements: &[u8]) -> f64 {
    with_float!(dtype, T => {
        let keys = elements.chunks_exact(T::BYTES).map(T::from_le).filter(|x| x.is_finite());
        keys.max_by_key(|x| x.magnitude_key()).map_or(0.0, |x| x.widen().to_f64().abs())
    }, else unreachable!("targets are floats"))
}

/// Indices of elements that are finite in `before` and infinite or NaN in `after`.
///
/// # Panics
/// If the lengths differ, or `dtype` is not a float.
pub fn overflows(dtype: Dtype, before: &[u8], after: &[u8]) -> Vec<usize> {
    assert_eq!(before.len(), after.len(), "the same elements before and after");
    with_float!(dtype, T => {
        let pairs = before.chunks_exact(T::BYTES).zip(after.chunks_exact(T::BYTES)).enumerate();
        let lost = pairs.filter(|(_, (before, after))| T::from_le(before).is_finite() && !T::from_le(after).is_finite());
        lost.map(|(index, _)| index).collect()
    }, else unreachable!("targets are floats"))
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn the_margin_is_half_of_what_rounds_the_largest_number_to_infinity() {
        for (dtype, largest, margin) in [
            (Dtype::F16, 65504.0, 8.0),
            (Dtype::F8_E4M3, 448.0, 8.0),
            (Dtype::F8_E5M2, 57344.0, 2048.0),
            (Dtype::F32, f64::from(f32::MAX), 2f64.powi(102)),
            (Dtype::BF16, 3.389_531_389_251_535_5e38, 2f64.powi(118)),
            (Dtype::F64, f64::MAX, 2f64.powi(969)),
        ] {
            assert_eq!((largest_finite(dtype), overflow_margin(dtype)), (largest, margin), "{dtype:?}");
        }
        assert!(f16::from_f32(65504.0 + 15.9).is_finite() && !f16::from_f32(65504.0 + 16.0).is_finite());
    }

    #[test]
    fn magnitudes_ignore_elements_that_are_not_finite() {
        let bytes = |values: &[f32]| values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect::<Vec<u8>>();
        assert_eq!(largest_magnitude(Dtype::F16, &bytes(&[1.0, -3.0, f32::INFINITY, f32::NAN])), 3.0);
        assert_eq!(largest_magnitude(Dtype::F16, &[]), 0.0);
        let (before, after) = (bytes(&[1.0, f32::NAN, 2.0, 3.0]), bytes(&[f32::NAN, f32::NAN, 5.0, f32::INFINITY]));
        assert_eq!(overflows(Dtype::F16, &before, &after), [0, 3]);
    }
}
