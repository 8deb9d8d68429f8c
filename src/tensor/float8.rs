//! The two 8-bit float formats of weights.
//!
//! Source: Micikevicius et al., "FP8 Formats for Deep Learning", <https://arxiv.org/abs/2209.05433>. E4M3 has no
//! infinity (overflow gives NaN, as in PyTorch), E5M2 has one.

/// A number `sign : EXP bits : MAN bits` with the given bias, widened exactly.
fn widen(bits: u8, man_bits: u32, bias: i32) -> f32 {
    let sign = if bits & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from((bits & 0x7f) >> man_bits);
    let mantissa = f32::from(bits & ((1 << man_bits) - 1));
    let scale = f32::from(1u8 << man_bits);
    // Powers of two in this range and products of few-bit integers with them are exact in f32.
    let magnitude = if exponent == 0 {
        (mantissa / scale) * 2f32.powi(1 - bias)
    } else {
        (1.0 + mantissa / scale) * 2f32.powi(exponent - bias)
    };
    sign * magnitude
}

/// Rounds a finite or infinite `x` to `man_bits` of mantissa, nearest even, and returns the code without its sign.
/// Codes above `max_code` are replaced by `over_code`.
fn round(x: f32, man_bits: u32, bias: i32, max_code: u32, over_code: u8) -> u8 {
    let bits = x.to_bits() & 0x7fff_ffff;
    if bits >= 0x7f80_0000 {
        return over_code;
    }
    let exponent = (bits >> 23) as i32 - 127;
    let smallest_normal = 1 - bias;
    let code = if exponent >= smallest_normal {
        // Drop the low mantissa bits of the f32; a carry correctly runs into the exponent.
        let shift = 23 - man_bits;
        let rounded = round_shift(bits, shift);
        rounded - (((127 - bias) as u32) << man_bits)
    } else {
        // Subnormal: the code is x in units of the smallest subnormal.
        let mantissa = if exponent < -126 { bits & 0x007f_ffff } else { (bits & 0x007f_ffff) | 0x0080_0000 };
        let shift = (23 - man_bits) as i32 + (smallest_normal - exponent.max(-126));
        if shift > 25 { 0 } else { round_shift(mantissa, shift as u32) }
    };
    if code > max_code { over_code } else { code as u8 }
}

/// `bits / 2^shift`, nearest even.
fn round_shift(bits: u32, shift: u32) -> u32 {
    let half = 1u32 << (shift - 1);
    let odd = (bits >> shift) & 1;
    (bits + (half - 1) + odd) >> shift
}

macro_rules! float8 {
    ($(#[$doc:meta])* $name:ident, $man_bits:expr, $bias:expr, $max_code:expr, $over_code:expr, $infinity:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub struct $name(u8);

        impl $name {
            /// The element with this bit pattern.
            pub const fn from_bits(bits: u8) -> Self {
                Self(bits)
            }
            /// The bit pattern.
            pub const fn to_bits(self) -> u8 {
                self.0
            }
            /// The same number, exactly.
            pub fn to_f32(self) -> f32 {
                if self.is_nan() {
                    return f32::NAN;
                }
                if Some(self.0 & 0x7f) == $infinity {
                    return if self.0 & 0x80 == 0 { f32::INFINITY } else { f32::NEG_INFINITY };
                }
                widen(self.0, $man_bits, $bias)
            }
            /// Rounds nearest even.
            pub fn from_f32(x: f32) -> Self {
                let sign = ((x.to_bits() >> 24) & 0x80) as u8;
                if x.is_nan() {
                    return Self(sign | 0x7f);
                }
                Self(sign | round(x, $man_bits, $bias, $max_code, $over_code))
            }
        }
    };
}

float8!(
    /// 4 exponent bits, 3 mantissa bits, bias 7; largest number 448, no infinity.
    F8E4M3,
    3,
    7,
    0x7e,
    0x7f,
    None
);
float8!(
    /// 5 exponent bits, 2 mantissa bits, bias 15; largest number 57344, then infinity.
    F8E5M2,
    2,
    15,
    0x7b,
    0x7c,
    Some(0x7c)
);

impl F8E4M3 {
    /// Whether this is one of the two NaN codes.
    pub const fn is_nan(self) -> bool {
        self.0 & 0x7f == 0x7f
    }
    /// Whether this is not a NaN.
    pub const fn is_finite(self) -> bool {
        !self.is_nan()
    }
}

impl F8E5M2 {
    /// Whether this is one of the six NaN codes.
    pub const fn is_nan(self) -> bool {
        self.0 & 0x7f > 0x7c
    }
    /// Whether this is neither NaN nor infinite.
    pub const fn is_finite(self) -> bool {
        self.0 & 0x7f < 0x7c
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        assert_eq!(F8E4M3::from_bits(0x7e).to_f32(), 448.0);
        assert_eq!(F8E4M3::from_bits(0x01).to_f32(), 2f32.powi(-9));
        assert_eq!(F8E4M3::from_bits(0xb8).to_f32(), -1.0);
        assert_eq!(F8E5M2::from_bits(0x7b).to_f32(), 57344.0);
        assert_eq!(F8E5M2::from_bits(0x01).to_f32(), 2f32.powi(-16));
        assert_eq!(F8E5M2::from_bits(0xfc).to_f32(), f32::NEG_INFINITY);
        assert_eq!(F8E4M3::from_f32(464.0).to_bits(), 0x7e, "halfway to 480 rounds to the even code");
        assert_eq!(F8E4M3::from_f32(464.1).to_bits(), 0x7f, "above it there is only NaN");
        assert_eq!(F8E5M2::from_f32(1e9).to_bits(), 0x7c);
    }

    #[test]
    fn every_code_survives_the_round_trip() {
        for bits in 0..=255u8 {
            let (a, b) = (F8E4M3::from_bits(bits), F8E5M2::from_bits(bits));
            if !a.is_nan() {
                assert_eq!(F8E4M3::from_f32(a.to_f32()), a);
            }
            if !b.is_nan() {
                assert_eq!(F8E5M2::from_f32(b.to_f32()), b);
            }
        }
    }

    /// Rounding by search: the nearest code, with ties to the even one.
    fn nearest(x: f32, codes: impl Fn(u8) -> f32, max_code: u8) -> u8 {
        (0..=max_code)
            .min_by(|&a, &b| {
                let (da, db) = (f64::from(codes(a)) - f64::from(x), f64::from(codes(b)) - f64::from(x));
                da.abs().total_cmp(&db.abs()).then((a & 1).cmp(&(b & 1)))
            })
            .unwrap()
    }

    #[test]
    fn rounding_is_nearest_even() {
        let midpoints_4 =
            (0..0x7eu8).map(|c| (F8E4M3::from_bits(c).to_f32() + F8E4M3::from_bits(c + 1).to_f32()) / 2.0);
        for mid in midpoints_4 {
            for x in [mid, mid.next_up(), mid.next_down()] {
                let expected = nearest(x, |c| F8E4M3::from_bits(c).to_f32(), 0x7e);
                assert_eq!(F8E4M3::from_f32(x).to_bits(), expected, "{x:e}");
                assert_eq!(F8E4M3::from_f32(-x).to_bits(), expected | 0x80, "-{x:e}");
            }
        }
        let midpoints_5 =
            (0..0x7bu8).map(|c| (F8E5M2::from_bits(c).to_f32() + F8E5M2::from_bits(c + 1).to_f32()) / 2.0);
        for mid in midpoints_5 {
            for x in [mid, mid.next_up(), mid.next_down()] {
                let expected = nearest(x, |c| F8E5M2::from_bits(c).to_f32(), 0x7b);
                assert_eq!(F8E5M2::from_f32(x).to_bits(), expected, "{x:e}");
            }
        }
    }
}
