//! Codes values plane by plane: sign, exponent, mantissa, each bit with odds that follow what was seen.
//!
//! Trained deltas differ widely in exponent and hardly in what their other bits look like. The exponent is told bit by bit
//! from the highest, the odds of each bit known by those before it; the first bit of the mantissa by the exponent, the
//! next two by those before them, every further bit and the sign by themselves. Odds begin at what the whole adapter has
//! on average ([`Planes::begin`]) and adapt within a block.
//!
//! Quantised values are whole numbers times a scale that `GROUP` of them share: the scale is told as the BF16 it is, the numbers
//! bit by bit from the highest, as exponents are.

use half::bf16;

use super::range_coder::{Bit, Coder};
use crate::tensor::Dtype;

/// Quantised values that share a scale.
pub(super) const GROUP: usize = 128;
/// How sure the odds are that a block begins with, in decisions.
const FIRST_WEIGHT: u8 = 24;

/// How the values of a target are told.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum ValueKind {
    /// Floats of 16 bits, 8 of them exponent.
    Bf16,
    /// Floats of 16 bits, 5 of them exponent.
    F16,
    /// Floats of 32 bits.
    F32,
    /// F32 values that are whole numbers of 8 bits, -127 to 127, times a scale.
    Int8,
    /// F32 values that are whole numbers of 4 bits, -7 to 7, times a scale.
    Int4,
}

impl ValueKind {
    pub(super) const ALL: [Self; 5] = [Self::Bf16, Self::F16, Self::F32, Self::Int8, Self::Int4];

    /// How values of a type are told as they are.
    pub(super) fn of(dtype: Dtype) -> Self {
        match dtype {
            Dtype::BF16 => Self::Bf16,
            Dtype::F16 => Self::F16,
            Dtype::F32 => Self::F32,
            other => unreachable!("values are F32, BF16 or F16, not {other:?}"),
        }
    }

    /// Bits of a whole number, where values are quantised.
    pub(super) fn quantised(self) -> Option<u32> {
        match self {
            Self::Int8 => Some(8),
            Self::Int4 => Some(4),
            _ => None,
        }
    }

    /// Bytes of a value as the adapter stores it.
    pub(super) fn width(self) -> usize {
        if matches!(self, Self::Bf16 | Self::F16) { 2 } else { 4 }
    }

    /// Bits of exponent and mantissa.
    fn planes(self) -> (u32, u32) {
        match self {
            Self::Bf16 => (8, 7),
            Self::F16 => (5, 10),
            Self::F32 => (8, 23),
            Self::Int8 | Self::Int4 => (0, 0),
        }
    }

    /// How many odds there are.
    pub(super) fn n_odds(self) -> usize {
        match (self.quantised(), self.planes()) {
            (Some(bits), _) => 1 << bits,
            // Sign, exponent, first bit of the mantissa by exponent, two more by those before, the others.
            (None, (exponent, mantissa)) => 1 + (2 << exponent) + 8 + mantissa as usize,
        }
    }

    /// Takes the decisions that tell a number: the bits of a float, or a whole number counted from the least.
    ///
    /// `decide` is given the place of the decision's odds and, where the number is known, the decision; the number that the
    /// decisions it returns make is returned.
    fn walk(self, number: u32, decide: &mut impl FnMut(usize, bool) -> bool) -> u32 {
        let mut tree = |first: usize, width: u32, number: u32| {
            let mut node = 1;
            for i in (0..width).rev() {
                node = node << 1 | usize::from(decide(first + node, number >> i & 1 == 1));
            }
            node as u32 - (1 << width)
        };
        if let Some(bits) = self.quantised() {
            return tree(0, bits, number);
        }
        let (exponent_bits, mantissa_bits) = self.planes();
        let exponents = 1usize << exponent_bits;
        let exponent = tree(1, exponent_bits, number >> mantissa_bits & ((1 << exponent_bits) - 1));
        let mut told = u32::from(decide(0, number >> (exponent_bits + mantissa_bits) & 1 == 1));
        told = told << exponent_bits | exponent;
        let mut node = 1;
        for i in (0..mantissa_bits).rev() {
            let at = match mantissa_bits - 1 - i {
                0 => 1 + exponents + exponent as usize,
                1 | 2 => 1 + 2 * exponents + node,
                done => 1 + 2 * exponents + 8 + done as usize,
            };
            let bit = decide(at, number >> i & 1 == 1);
            node = node << 1 | usize::from(bit);
            told = told << 1 | u32::from(bit);
        }
        told
    }
}

/// How often every decision was a zero and how often a one, over a whole adapter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Counts {
    kind: ValueKind,
    counts: Vec<[u64; 2]>,
}

impl Counts {
    pub(super) fn new(kind: ValueKind) -> Self {
        Self { kind, counts: vec![[0; 2]; kind.n_odds()] }
    }

    /// Counts a number's decisions.
    pub(super) fn count(&mut self, number: u32) {
        self.kind.walk(number, &mut |at, bit| {
            self.counts[at][usize::from(bit)] += 1;
            bit
        });
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            mine[0] += theirs[0];
            mine[1] += theirs[1];
        }
    }

    /// The odds of a zero, in 2^-16, as a packed file holds them.
    pub(super) fn odds(&self) -> Vec<u16> {
        let odds = |[zeros, ones]: &[u64; 2]| {
            ((2 * u128::from(*zeros) + 1) * 0xffff / (2 * u128::from(zeros + ones) + 2)) as u16
        };
        self.counts.iter().map(odds).collect()
    }

    /// The information in all decisions if each has the odds that it has on the whole, in bits.
    pub(super) fn entropy(&self) -> f64 {
        let of = |[zeros, ones]: &[u64; 2]| {
            let (zeros, ones) = (*zeros as f64, *ones as f64);
            let part = |n: f64| if n == 0.0 { 0.0 } else { n * ((zeros + ones) / n).log2() };
            part(zeros) + part(ones)
        };
        self.counts.iter().map(of).sum()
    }
}

/// The odds of a run of values, which follow what was seen.
pub(super) struct Planes {
    kind: ValueKind,
    odds: Vec<Bit>,
}

impl Planes {
    /// Begins with the odds of [`Counts::odds`].
    ///
    /// # Panics
    /// Where there are not [`ValueKind::n_odds`] of them.
    pub(super) fn begin(kind: ValueKind, odds: &[u16]) -> Self {
        assert_eq!(odds.len(), kind.n_odds(), "every decision has its odds");
        Self { kind, odds: odds.iter().map(|&zero| Bit::new(zero, FIRST_WEIGHT)).collect() }
    }

    /// Codes a number: the bits of a float, or a whole number counted from the least.
    fn code(&mut self, coder: &mut impl Coder, number: u32) -> u32 {
        self.kind.walk(number, &mut |at, bit| coder.bit(&mut self.odds[at], bit))
    }

    /// Codes values as they are stored, little-endian.
    pub(super) fn code_stored(&mut self, coder: &mut impl Coder, stored: &mut [u8]) {
        for le in stored.chunks_exact_mut(self.kind.width()) {
            let told = self.code(coder, number_of(le));
            le.copy_from_slice(&told.to_le_bytes()[..le.len()]);
        }
    }

    /// Codes quantised values; a decoder returns them as stored.
    pub(super) fn code_quantised(&mut self, coder: &mut impl Coder, group: &mut Group) {
        let bits = self.kind.quantised().expect("the values are quantised");
        let scale = coder.even(1 << 16, group.scale.to_bits().into());
        group.scale = bf16::from_bits(scale as u16);
        if group.scale == bf16::ZERO {
            group.numbers.fill(0);
            return;
        }
        let half = 1i32 << (bits - 1);
        for number in &mut group.numbers {
            *number = self.code(coder, (*number + half) as u32) as i32 - half;
        }
    }
}

/// The bits of a stored value.
pub(super) fn number_of(le: &[u8]) -> u32 {
    le.iter().rev().fold(0, |number, &byte| number << 8 | u32::from(byte))
}

/// Values that share a scale.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Group {
    scale: bf16,
    numbers: Vec<i32>,
}

impl Group {
    /// Room for `n` values.
    pub(super) fn empty(n: usize) -> Self {
        Self { scale: bf16::ZERO, numbers: vec![0; n] }
    }

    /// Quantises finite values: the largest becomes the largest whole number, the others the nearest, halves to even.
    pub(super) fn quantise(kind: ValueKind, values: &[f32]) -> Self {
        let most = (1i32 << (kind.quantised().expect("the values are quantised") - 1)) - 1;
        let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let mut scale = bf16::from_f32(largest / most as f32);
        // Rounded down, the scale would cut the largest value off.
        if scale.to_f32() * (most as f32 + 0.5) < largest {
            scale = bf16::from_bits(scale.to_bits() + 1);
        }
        if !scale.is_finite() || scale == bf16::ZERO {
            scale = if scale == bf16::ZERO { bf16::ZERO } else { bf16::MAX };
        }
        let number = |value: f32| match scale.to_f32() {
            0.0 => 0,
            scale => ((value / scale).round_ties_even() as i32).clamp(-most, most),
        };
        Self { scale, numbers: values.iter().map(|&value| number(value)).collect() }
    }

    /// The whole numbers, counted from the least; empty where all are zero and none is told.
    pub(super) fn told(&self, kind: ValueKind) -> impl Iterator<Item = u32> {
        let half = 1i32 << (kind.quantised().expect("the values are quantised") - 1);
        let n = if self.scale == bf16::ZERO { 0 } else { self.numbers.len() };
        self.numbers[..n].iter().map(move |&number| (number + half) as u32)
    }

    /// The values: whole numbers times the scale, exact in f32.
    pub(super) fn values(&self) -> impl Iterator<Item = f32> {
        let scale = self.scale.to_f32();
        // Zero has no sign.
        self.numbers.iter().map(move |&number| if number == 0 { 0.0 } else { number as f32 * scale })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::range_coder::{Decoder, Encoder},
        *,
    };

    fn counted(kind: ValueKind, stored: &[u8]) -> Counts {
        let mut counts = Counts::new(kind);
        stored.chunks_exact(kind.width()).for_each(|le| counts.count(number_of(le)));
        counts
    }

    fn encode(kind: ValueKind, odds: &[u16], stored: &[u8]) -> Vec<u8> {
        let mut encoder = Encoder::new();
        Planes::begin(kind, odds).code_stored(&mut encoder, &mut stored.to_vec());
        encoder.finish()
    }

    proptest! {
        #[test]
        fn every_bit_comes_back(bits in prop::collection::vec(any::<u32>(), 0..200), kind in 0usize..3) {
            let kind = ValueKind::ALL[kind];
            let stored: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()[..kind.width()].to_vec()).collect();
            let odds = counted(kind, &stored).odds();
            let code = encode(kind, &odds, &stored);
            let mut found = vec![0; stored.len()];
            let mut decoder = Decoder::new(&code);
            Planes::begin(kind, &odds).code_stored(&mut decoder, &mut found);
            prop_assert_eq!(found, stored);
            prop_assert!(decoder.is_finished());
        }

        #[test]
        fn quantised_values_come_back_and_are_near(values in prop::collection::vec(-1e4f32..1e4, 1..GROUP), is_int4: bool) {
            let kind = if is_int4 { ValueKind::Int4 } else { ValueKind::Int8 };
            let group = Group::quantise(kind, &values);
            let mut counts = Counts::new(kind);
            group.told(kind).for_each(|number| counts.count(number));
            let mut encoder = Encoder::new();
            Planes::begin(kind, &counts.odds()).code_quantised(&mut encoder, &mut group.clone());
            let code = encoder.finish();
            let mut found = Group::empty(values.len());
            Planes::begin(kind, &counts.odds()).code_quantised(&mut Decoder::new(&code), &mut found);
            prop_assert_eq!(&found, &group);
            let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
            let step = largest / if is_int4 { 7.0 } else { 127.0 };
            for (value, near) in values.iter().zip(found.values()) {
                // Half a step, and the rounding of the scale to 8 bits.
                prop_assert!((value - near).abs() <= 0.51 * step + largest / 128.0, "{value} became {near}, step {step}");
            }
        }
    }

    #[test]
    fn nothing_but_zeros_is_told_in_a_scale() {
        let mut encoder = Encoder::new();
        let mut group = Group::quantise(ValueKind::Int8, &[0.0, -0.0, 0.0]);
        Planes::begin(ValueKind::Int8, &Counts::new(ValueKind::Int8).odds()).code_quantised(&mut encoder, &mut group);
        assert_eq!(encoder.finish().len(), 6);
        assert!(group.values().all(|value| value.to_bits() == 0));
        // Subnormal values are below every scale, the largest values above.
        assert!(Group::quantise(ValueKind::Int8, &[1e-44]).values().all(f32::is_finite));
        assert!(Group::quantise(ValueKind::Int4, &[f32::MAX, -1.0]).values().all(f32::is_finite));
    }

    #[test]
    fn what_is_alike_costs_little() {
        let stored: Vec<u8> =
            (0..10_000u32).flat_map(|i| bf16::from_f32(0.01 + i as f32 * 1e-6).to_le_bytes()).collect();
        let code = encode(ValueKind::Bf16, &counted(ValueKind::Bf16, &stored).odds(), &stored);
        // An exponent of two values at most, and all but the last bits of the mantissa are alike for long.
        assert!(code.len() < 7_000, "{}", code.len());
        let zeros = vec![0; 20_000];
        assert!(encode(ValueKind::Bf16, &counted(ValueKind::Bf16, &zeros).odds(), &zeros).len() < 40);
    }
}
