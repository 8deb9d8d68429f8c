//! The integer keys by which weights are ranked.

use crate::tensor::{Dtype, Float};

/// An unsigned integer that holds keys.
pub trait Key: Copy + Ord + Default + Send + Sync + 'static {
    /// Width in bits.
    const BITS: u32;
    /// The low bits of `bits`.
    fn from_u64(bits: u64) -> Self;
    /// Widens.
    fn to_u64(self) -> u64;
    /// Reverses the order of keys.
    fn reversed(self) -> Self;
}

macro_rules! impl_key {
    ($($t:ty),*) => {$(
        impl Key for $t {
            const BITS: u32 = <$t>::BITS;
            #[inline(always)]
            fn from_u64(bits: u64) -> Self {
                bits as $t
            }
            #[inline(always)]
            fn to_u64(self) -> u64 {
                u64::from(self)
            }
            #[inline(always)]
            fn reversed(self) -> Self {
                !self
            }
        }
    )*};
}
impl_key!(u8, u16, u32, u64);

/// The meaning of keys. Only keys of the same space can be compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeySpace {
    /// The stored bits of the element without its sign, for elements of 8 or 16 bits.
    Stored(Dtype),
    /// The bits of a non-negative `f32`.
    F32,
    /// The bits of a non-negative `f64`.
    F64,
    /// 64 random bits.
    Random,
}

impl KeySpace {
    /// The space for magnitudes of elements of a float dtype.
    ///
    /// # Panics
    /// If the dtype is not a float that can be scored.
    pub fn of_magnitudes(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F64 => Self::F64,
            Dtype::F32 => Self::F32,
            Dtype::F16 | Dtype::BF16 | Dtype::F8_E4M3 | Dtype::F8_E5M2 => Self::Stored(dtype),
            other => panic!("only floats can be scored, not {other:?}"),
        }
    }

    /// Width of a key in bits.
    pub fn bits(self) -> u32 {
        match self {
            Self::Stored(dtype) => dtype.bitsize() as u32,
            Self::F32 => 32,
            Self::F64 | Self::Random => 64,
        }
    }

    /// The narrowest space in which keys of both can be compared; the conversion is exact and keeps the order.
    pub fn common(self, other: Self) -> Self {
        match (self, other) {
            _ if self == other => self,
            (Self::Random, _) | (_, Self::Random) => Self::Random,
            (Self::F64, _) | (_, Self::F64) => Self::F64,
            _ => Self::F32,
        }
    }
}

/// The magnitude of `w` as a key: the stored bits without the sign if the key is as wide as the element, otherwise
/// those of the widened number.
#[inline(always)]
pub(super) fn magnitude_key<T: Float, K: Key>(w: T) -> K {
    if K::BITS as usize == 8 * T::BYTES {
        K::from_u64(w.magnitude_key().into())
    } else {
        score_key(crate::tensor::Accumulator::to_f64(w.widen()))
    }
}

/// The magnitude of a number as a key of 32 bits, for which it must be an `f32`, or of 64 bits.
#[inline(always)]
pub(super) fn score_key<K: Key>(score: f64) -> K {
    if K::BITS == 32 {
        K::from_u64(u64::from((score as f32).abs().to_bits()))
    } else {
        K::from_u64(score.abs().to_bits())
    }
}

/// Sixteen bits of a key after a known prefix: a cut is found digit by digit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Digit {
    /// Number of key bits below this digit.
    pub shift: u32,
    /// The key bits above this digit.
    pub prefix: u64,
}

impl Digit {
    /// Width of a digit in bits.
    pub const BITS: u32 = 16;
    /// Number of values of a digit.
    pub const VALUES: usize = 1 << Self::BITS;

    /// The first digit of the keys of a space.
    pub fn first(space: KeySpace) -> Self {
        Self { shift: space.bits().saturating_sub(Self::BITS), prefix: 0 }
    }

    /// The digit's value in `key`, if the key begins with the prefix.
    #[inline(always)]
    pub fn of(self, key: u64) -> Option<usize> {
        let upper = key >> self.shift;
        (upper >> Self::BITS == self.prefix).then_some(upper as usize % Self::VALUES)
    }

    /// The smallest key that begins with the prefix.
    pub fn floor(self) -> u64 {
        self.prefix.checked_shl(self.shift + Self::BITS).unwrap_or(0)
    }

    /// The key up to this digit, if it is `value`, and the next lower digit.
    pub fn then(self, value: usize) -> (u64, Option<Self>) {
        let prefix = self.prefix << Self::BITS | value as u64;
        let below = self.shift.checked_sub(Self::BITS).map(|shift| Self { shift, prefix });
        (prefix << self.shift, below)
    }
}

/// Evaluates an expression with `$k` as the integer type of a [`KeySpace`]'s keys.
macro_rules! with_key {
    ($space:expr, $k:ident => $body:expr) => {
        match $space.bits() {
            8 => {
                type $k = u8;
                $body
            }
            16 => {
                type $k = u16;
                $body
            }
            32 => {
                type $k = u32;
                $body
            }
            _ => {
                type $k = u64;
                $body
            }
        }
    };
}
pub(super) use with_key;

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn the_common_space_of_two_dtypes_keeps_their_order() {
        let bf = KeySpace::of_magnitudes(Dtype::BF16);
        assert_eq!(bf.common(bf), KeySpace::Stored(Dtype::BF16));
        assert_eq!(bf.common(KeySpace::of_magnitudes(Dtype::F16)), KeySpace::F32);
        assert_eq!(bf.common(KeySpace::F64), KeySpace::F64);
        let (small, large) = (f16::from_f32(-0.5), bf16::from_f32(0.75));
        assert!(magnitude_key::<_, u32>(small) < magnitude_key::<_, u32>(large));
        assert!(magnitude_key::<_, u64>(small) < magnitude_key::<_, u64>(large));
        assert_eq!(magnitude_key::<_, u16>(large), 0x3f40);
    }

    #[test]
    fn digits_form_the_key() {
        let key = 0x0123_4567_89ab_cdef;
        let mut digit = Digit::first(KeySpace::F64);
        let mut spelled = 0;
        for _ in 0..4 {
            let (so_far, below) = digit.then(digit.of(key).unwrap());
            spelled = so_far;
            digit = below.unwrap_or(digit);
        }
        assert_eq!(spelled, key);
        assert_eq!(digit.of(0), None);
        assert_eq!(Digit::first(KeySpace::Stored(Dtype::F8_E4M3)).of(0x7e), Some(0x7e));
    }
}
