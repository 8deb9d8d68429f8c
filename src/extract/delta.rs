//! Which delta takes one weight to another.

use half::{bf16, f16};

use crate::tensor::{Accumulator, Dtype, Float};

/// The value of `dtype` (F32, BF16 or F16) that a merge adds to `original` to get `tuned`, bit for bit; none where no
/// value does. Both weights are finite.
///
/// A merge computes `round(original + delta)`, which never falls as the delta grows, zeros counted as `-0 < +0`. So where the
/// difference itself misses, all values of the type are searched by halving, and "none" is proven. Of several that do,
/// one next to the difference is returned.
pub(super) fn exact_delta<T: Float>(original: T, tuned: T, dtype: Dtype) -> Option<f32> {
    let wanted = order(tuned);
    let merged = |code: i64| {
        let delta = T::Acc::from_f64(f64::from(value(dtype, code)));
        order(T::from_acc(original.widen().add_scaled(delta, T::Acc::from_f64(1.0))))
    };
    let guess = nearest(dtype, tuned.widen().to_f64() - original.widen().to_f64());
    let found = match merged(guess).cmp(&wanted) {
        std::cmp::Ordering::Equal => guess,
        // The first that gets there, if it does not get past.
        std::cmp::Ordering::Less => first(guess, largest(dtype) + 1, |code| merged(code) >= wanted),
        // The last that does not get past.
        std::cmp::Ordering::Greater => first(-largest(dtype) - 1, guess, |code| merged(code) > wanted) - 1,
    };
    let is_value = (-largest(dtype) - 1..=largest(dtype)).contains(&found);
    (is_value && merged(found) == wanted).then(|| value(dtype, found))
}

/// The first of `from..to` for which `is_true`, which stays true from there on; `to` where there is none.
fn first(mut from: i64, mut to: i64, is_true: impl Fn(i64) -> bool) -> i64 {
    while from < to {
        let middle = from + (to - from) / 2;
        if is_true(middle) {
            to = middle;
        } else {
            from = middle + 1;
        }
    }
    from
}

/// An integer that orders elements as numbers, `-0` below `+0`, infinity and NaN at the ends.
fn order<T: Float>(x: T) -> i64 {
    let mut le = [0; 8];
    x.write_le(&mut le);
    let bits = u64::from_le_bytes(le);
    signed(bits >> (8 * T::BYTES - 1) & 1 == 1, x.magnitude_key().into())
}

/// Codes count the finite values of a type: 0 is +0, 1 the smallest above it, -1 is -0, -2 the first below.
fn signed(is_negative: bool, magnitude: u64) -> i64 {
    if is_negative { -1 - magnitude as i64 } else { magnitude as i64 }
}

/// The code of the largest finite value.
fn largest(dtype: Dtype) -> i64 {
    match dtype {
        Dtype::F32 => 0x7f7f_ffff,
        Dtype::BF16 => 0x7f7f,
        Dtype::F16 => 0x7bff,
        other => unreachable!("values are F32, BF16 or F16, not {other:?}"),
    }
}

/// The value of a code.
fn value(dtype: Dtype, code: i64) -> f32 {
    let magnitude = (if code < 0 { -1 - code } else { code }) as u32;
    let magnitude = match dtype {
        Dtype::F32 => f32::from_bits(magnitude),
        Dtype::BF16 => bf16::from_bits(magnitude as u16).to_f32(),
        _ => f16::from_bits(magnitude as u16).to_f32(),
    };
    if code < 0 { -magnitude } else { magnitude }
}

/// The code of the finite value next to `x`.
fn nearest(dtype: Dtype, x: f64) -> i64 {
    let magnitude = match dtype {
        Dtype::F32 => u64::from((x.abs() as f32).to_bits()),
        Dtype::BF16 => u64::from(bf16::from_f64(x.abs()).to_bits()),
        _ => u64::from(f16::from_f64(x.abs()).to_bits()),
    };
    signed(x.is_sign_negative(), magnitude.min(largest(dtype) as u64))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tensor::{F8E4M3, F8E5M2};

    fn merged<T: Float>(original: T, delta: f32) -> i64 {
        order(T::from_acc(original.widen().add_scaled(T::Acc::from_f64(f64::from(delta)), T::Acc::from_f64(1.0))))
    }

    /// Against every value of a 16-bit type.
    fn judge<T: Float>(original: T, tuned: T, dtype: Dtype) {
        let found = exact_delta(original, tuned, dtype);
        match found {
            Some(delta) => assert_eq!(merged(original, delta), order(tuned)),
            None => {
                let mut all = -largest(dtype) - 1..=largest(dtype);
                assert!(!all.any(|code| merged(original, value(dtype, code)) == order(tuned)));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn none_means_that_no_value_of_the_type_does(a: u16, b: u16, near in 0u16..40, c: u32) {
            for dtype in [Dtype::BF16, Dtype::F16] {
                let (x, y) = (bf16::from_bits(a), bf16::from_bits(b));
                if x.is_finite() && y.is_finite() {
                    judge(x, y, dtype);
                }
                let y = bf16::from_bits(a.wrapping_add(near));
                if x.is_finite() && y.is_finite() {
                    judge(x, y, dtype);
                }
                let (x, y) = (f16::from_bits(a), f16::from_bits(b));
                if x.is_finite() && y.is_finite() {
                    judge(x, y, dtype);
                }
                let (x, y) = (F8E4M3::from_bits(a as u8), F8E4M3::from_bits(b as u8));
                if x.is_finite() && y.is_finite() {
                    judge(x, y, dtype);
                }
                let (x, y) = (F8E5M2::from_bits(a as u8), F8E5M2::from_bits(b as u8));
                if x.is_finite() && y.is_finite() {
                    judge(x, y, dtype);
                }
                let (x, y) = (f32::from_bits(c), f32::from_bits(c.wrapping_add(u32::from(near))));
                if x.is_finite() && y.is_finite() {
                    judge(x, y, dtype);
                }
            }
        }

        #[test]
        fn f32_deltas_take_f32_weights_to_their_neighbourhood(bits: u32, step in -1_000_000i32..1_000_000) {
            let (a, b) = (f32::from_bits(bits), f32::from_bits(bits.wrapping_add_signed(step)));
            // Within a factor of two the difference is exact (Sterbenz); `-0` is no sum but of `-0`.
            if a.is_finite() && b.is_finite() && a / b >= 0.5 && a / b <= 2.0 {
                prop_assert_eq!(exact_delta(a, b, Dtype::F32).map(|d| (a + d).to_bits()), Some(b.to_bits()));
            }
        }
    }

    #[test]
    fn where_the_difference_misses_its_neighbours_are_searched() {
        // 3 - 2^-23 is no f32; rounded, it takes -1 to 2, not to the number below.
        let (a, b) = (-1.0f32, 2.0f32.next_down());
        assert_eq!(a + (b - a), 2.0);
        let delta = exact_delta(a, b, Dtype::F32);
        assert!(delta.is_none_or(|delta| a + delta == b));
        // Next to 1, a bf16 delta of one unit is enough whatever it is rounded to.
        let (a, b) = (bf16::from_f32(1.0), bf16::from_f32(1.0078125));
        assert_eq!(exact_delta(a, b, Dtype::BF16), Some(0.0078125));
    }

    #[test]
    fn what_no_delta_does() {
        // The sum of 1 and any f32 is a multiple of 2^-24 near zero.
        assert_eq!(exact_delta(1.0f32, 1e-10, Dtype::F32), None);
        assert_eq!(exact_delta(1.0f32, 0.0, Dtype::F32), Some(-1.0));
        assert_eq!(exact_delta(1.0f32, -0.0, Dtype::F32), None);
        assert_eq!(exact_delta(-0.0f32, 0.0, Dtype::F32), Some(0.0));
        assert_eq!(exact_delta(0.0f32, -0.0, Dtype::F32), None);
        // Below half of the smallest bf16 a sum rounds to -0.
        assert!(exact_delta(bf16::from_f32(0.0), bf16::from_f32(-0.0), Dtype::F32).is_some());
        // An f32 has too few digits for most pairs of f64.
        assert_eq!(exact_delta(1.0f64, 1.5, Dtype::F32), Some(0.5));
        assert_eq!(exact_delta(1.0f64, 1.1, Dtype::F32), None);
    }
}
