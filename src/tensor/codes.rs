//! Elements of quantized weights: what a code stands for before its scale.
//!
//! Everything here is exact: a code's number has few bits, and float32 holds it.
//!
//! Sources: OCP Microscaling Formats 1.0 (E2M1, E2M3, E8M0), <https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf>;
//! for E4M3 and E5M2 see [`F8E4M3`] and [`F8E5M2`].

use super::{F8E4M3, F8E5M2};

/// The number of a 6-bit float E2M3, in the low six bits of `code`; the largest is 7.5.
pub fn e2m3(code: u8) -> f32 {
    let (exponent, mantissa) = (code >> 3 & 3, f32::from(code & 7));
    let magnitude =
        if exponent == 0 { mantissa / 8.0 } else { (1.0 + mantissa / 8.0) * f32::from(1u8 << (exponent - 1)) };
    if code & 0x20 == 0 { magnitude } else { -magnitude }
}

/// The power of two of an 8-bit exponent: `2^(code - 127)`, NaN for 255.
pub fn e8m0(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

/// The `n_bits` from bit `at` of a little-endian stream, at most 32; bits past its end are zero.
pub fn bits_at(stream: &[u8], at: u64, n_bits: u32) -> u32 {
    let (first, shift) = ((at / 8) as usize, (at % 8) as u32);
    let mut bytes = [0; 8];
    let rest = stream.get(first..).unwrap_or_default();
    let n = rest.len().min(8);
    bytes[..n].copy_from_slice(&rest[..n]);
    (u64::from_le_bytes(bytes) >> shift & ((1 << n_bits) - 1)) as u32
}

/// The type of the elements of a quantized weight.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CodeType {
    /// 8-bit floats, one in a byte.
    E4M3,
    /// The same with five bits of exponent.
    E5M2,
    /// 4-bit floats, two in a byte, the first in the low half.
    E2M1,
    /// 6-bit floats in a little-endian stream of bits.
    E2M3,
    /// Signed 8-bit integers.
    I8,
    /// Integers of so many bits in a little-endian stream of bits. Half of their range is to be subtracted.
    Int(u32),
}

impl CodeType {
    /// Bits of an element.
    pub fn n_bits(self) -> u32 {
        match self {
            Self::E4M3 | Self::E5M2 | Self::I8 => 8,
            Self::E2M1 => 4,
            Self::E2M3 => 6,
            Self::Int(n_bits) => n_bits,
        }
    }

    /// Writes the numbers of the elements from `first` on of a row, whose codes begin at `codes[0]`, to `numbers`. A row that ends too
    /// early is a broken invariant of the caller.
    ///
    /// # Panics
    /// Where a row of whole bytes ends before its last element.
    pub fn numbers(self, codes: &[u8], first: usize, numbers: &mut [f32]) {
        let n = numbers.len();
        match self {
            Self::E4M3 => each(numbers, &codes[first..first + n], |code| E4M3_NUMBERS[usize::from(code)]),
            Self::E5M2 => each(numbers, &codes[first..first + n], |code| F8E5M2::from_bits(code).to_f32()),
            Self::I8 => each(numbers, &codes[first..first + n], |code| f32::from(code.cast_signed())),
            Self::E2M1 => halves(numbers, codes, first, &E2M1_PAIRS),
            Self::E2M3 => {
                for (j, number) in (first..).zip(numbers) {
                    *number = e2m3(bits_at(codes, 6 * j as u64, 6) as u8);
                }
            }
            Self::Int(4) => halves(numbers, codes, first, &INT4_PAIRS),
            Self::Int(n_bits) => {
                let half = 1i32 << (n_bits - 1);
                for (j, number) in (first..).zip(numbers) {
                    let code = bits_at(codes, u64::from(n_bits) * j as u64, n_bits);
                    *number = (code.cast_signed() - half) as f32;
                }
            }
        }
    }
}

fn each(numbers: &mut [f32], codes: &[u8], number: impl Fn(u8) -> f32) {
    for (to, &code) in numbers.iter_mut().zip(codes) {
        *to = number(code);
    }
}

/// The numbers of two codes in a byte, the first in the low half.
type Pairs = std::sync::LazyLock<[[f32; 2]; 256]>;

/// Writes the numbers of codes of four bits, from element `first` on. A byte is looked up once for both of its codes.
fn halves(numbers: &mut [f32], codes: &[u8], first: usize, pairs: &Pairs) {
    let odd = (first % 2).min(numbers.len());
    let (head, numbers) = numbers.split_at_mut(odd);
    head.iter_mut().for_each(|number| *number = pairs[usize::from(codes[first / 2])][1]);
    let (first, n) = (first + odd, numbers.len());
    let codes = &codes[first / 2..(first + n).div_ceil(2)];
    let pairs: &[[f32; 2]; 256] = pairs;
    let mut whole = numbers.chunks_exact_mut(2);
    for (to, &code) in whole.by_ref().zip(codes) {
        to.copy_from_slice(&pairs[usize::from(code)]);
    }
    if let ([number], Some(&code)) = (whole.into_remainder(), codes.last()) {
        *number = pairs[usize::from(code)][0];
    }
}

static E2M1_PAIRS: Pairs =
    std::sync::LazyLock::new(|| std::array::from_fn(|code| [code & 15, code >> 4].map(|code| E2M1_NUMBERS[code])));
static INT4_PAIRS: Pairs =
    std::sync::LazyLock::new(|| std::array::from_fn(|code| [code & 15, code >> 4].map(|code| code as f32 - 8.0)));

/// The numbers of all codes of E4M3.
static E4M3_NUMBERS: std::sync::LazyLock<[f32; 256]> =
    std::sync::LazyLock::new(|| std::array::from_fn(|code| F8E4M3::from_bits(code as u8).to_f32()));
/// The numbers of all codes of E2M1; code 8 is -0.
const E2M1_NUMBERS: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_4_and_6_bits_are_those_of_the_specification() {
        for code in 0..16u8 {
            let (exponent, mantissa) = (i32::from(code >> 1 & 3), f32::from(code & 1));
            let magnitude =
                if exponent == 0 { mantissa / 2.0 } else { (1.0 + mantissa / 2.0) * 2f32.powi(exponent - 1) };
            let number = if code < 8 { magnitude } else { -magnitude };
            assert_eq!(E2M1_NUMBERS[usize::from(code)].to_bits(), number.to_bits());
        }
        // Smallest subnormal, largest subnormal, smallest normal, largest.
        assert_eq!([1, 7, 8, 31].map(e2m3), [0.125, 0.875, 1.0, 7.5]);
        assert_eq!([0x21, 0x3f].map(e2m3), [-0.125, -7.5]);
        assert_eq!([0, 1, 127, 128, 254].map(e8m0), [2f32.powi(-127), 2f32.powi(-126), 1.0, 2.0, 2f32.powi(127)]);
        assert!(e8m0(255).is_nan());
    }

    #[test]
    fn integers_of_every_width_come_out_of_a_stream() {
        for n_bits in 1..=8u32 {
            let values: Vec<u32> = (0..40u32).map(|i| i.wrapping_mul(2_654_435_761) >> (32 - n_bits)).collect();
            let mut stream = vec![0u8; 40];
            for (i, value) in values.iter().enumerate() {
                for bit in (0..n_bits).filter(|bit| value >> bit & 1 == 1) {
                    let at = i as u32 * n_bits + bit;
                    stream[at as usize / 8] |= 1 << (at % 8);
                }
            }
            let mut numbers = [0.0; 37];
            CodeType::Int(n_bits).numbers(&stream, 3, &mut numbers);
            let half = f64::from(1u32 << (n_bits - 1));
            assert!(
                numbers.iter().zip(&values[3..]).all(|(&found, &value)| f64::from(found) == f64::from(value) - half)
            );
        }
        assert_eq!(bits_at(&[0xff], 4, 8), 0x0f);
        assert_eq!(bits_at(&[], 4, 8), 0);
    }
}
