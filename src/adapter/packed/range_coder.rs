//! A binary and multi-symbol range coder with carry, 32 bits wide.
//!
//! [`Encoder`] and [`Decoder`] are two sides of one [`Coder`]: what is coded is written once, as a walk that hands every
//! decision to the coder and goes on with what the coder returns. All arithmetic is on integers, so that the same
//! decisions give the same bytes on every machine.
//!
//! A code is what the carries settle of `low`, byte by byte, and four bytes more; the decoder reads exactly as many.
//! Source: G. N. N. Martin, "Range encoding" (1979), with the carry handling of LZMA.

/// The range is kept at or above this: at least 8 bits are left of every subdivision into 2^16.
const MIN_RANGE: u32 = 1 << 24;
/// The largest total of [`Coder::symbol`].
pub(super) const MAX_TOTAL: u32 = 1 << 16;

/// One decision's odds, which follow what was seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Bit {
    /// The odds of a zero, in 2^-16.
    zero: u16,
    /// How many decisions they rest on; more do not count.
    weight: u8,
}

impl Bit {
    /// The odds stay this far from certainty, in 2^-16.
    const FLOOR: u16 = 32;
    /// Decisions that are remembered.
    const MAX_WEIGHT: u8 = 254;

    /// Odds known beforehand, in 2^-16, as sure as `weight` decisions.
    pub(super) fn new(zero: u16, weight: u8) -> Self {
        Self { zero: zero.clamp(Self::FLOOR, u16::MAX - Self::FLOOR), weight }
    }

    /// Learns from a decision: a share of `1 / (weight + 1.5)` of the way towards it.
    fn learn(&mut self, bit: bool) {
        let step = |distance: u32| (2 * distance / (2 * u32::from(self.weight) + 3)) as u16;
        let zero =
            if bit { self.zero - step(u32::from(self.zero)) } else { self.zero + step(0xffff - u32::from(self.zero)) };
        *self = Self::new(zero, (self.weight + 1).min(Self::MAX_WEIGHT));
    }
}

/// Either side of a code. What is handed in counts for the encoder alone; what comes back is the decision.
pub(super) trait Coder {
    /// A decision with odds that learn.
    fn bit(&mut self, odds: &mut Bit, bit: bool) -> bool;

    /// A number below `cumulative.len() - 1`, the odds of `i` being `cumulative[i + 1] - cumulative[i]` in the last, which is
    /// at most [`MAX_TOTAL`].
    fn symbol(&mut self, cumulative: &[u32], symbol: u32) -> u32;

    /// A number below `n`, all alike; `n` is at most [`MAX_TOTAL`].
    fn even(&mut self, n: u32, number: u32) -> u32;

    /// A number below `n`, all alike but for what rounding `n` up to 17 significant bits takes away. A decoder may return `n`
    /// or more where the code is no encoder's.
    fn below(&mut self, n: u64, number: u64) -> u64 {
        debug_assert!(n >= 1 && number < n, "the number is below n");
        let mut shift = (64 - (n - 1).leading_zeros()).saturating_sub(16);
        let mut found = u64::from(self.even((((n - 1) >> shift) + 1) as u32, (number >> shift) as u32)) << shift;
        while shift > 0 {
            let width = shift.min(16);
            shift -= width;
            found |= u64::from(self.even(1 << width, (number >> shift) as u32 & ((1 << width) - 1))) << shift;
        }
        found
    }
}

/// Writes a code.
pub(super) struct Encoder {
    low: u64,
    range: u32,
    /// The last byte that a carry may still change, and how many 0xff follow it; none before the first byte.
    cache: Option<u8>,
    n_pending: u64,
    bytes: Vec<u8>,
}

impl Encoder {
    pub(super) fn new() -> Self {
        Self { low: 0, range: u32::MAX, cache: None, n_pending: 0, bytes: Vec::new() }
    }

    /// Bytes so far, about.
    pub(super) fn n_bytes(&self) -> usize {
        self.bytes.len() + self.n_pending as usize
    }

    fn narrow(&mut self, start: u32, size: u32) {
        self.low += u64::from(start);
        self.range = size;
        while self.range < MIN_RANGE {
            self.range <<= 8;
            self.shift_low();
        }
    }

    fn shift_low(&mut self) {
        let carry = (self.low >> 32) as u8;
        let byte = (self.low >> 24) as u8;
        if carry == 1 || byte != 0xff {
            if let Some(cache) = self.cache {
                self.bytes.push(cache.wrapping_add(carry));
            }
            self.bytes.extend(std::iter::repeat_n(0xffu8.wrapping_add(carry), self.n_pending as usize));
            (self.cache, self.n_pending) = (Some(byte), 0);
        } else {
            self.n_pending += 1;
        }
        self.low = (self.low & 0x00ff_ffff) << 8;
    }

    /// Ends the code.
    pub(super) fn finish(mut self) -> Vec<u8> {
        // Four bytes of low, and one shift that settles the last of them.
        for _ in 0..5 {
            self.shift_low();
        }
        self.bytes
    }
}

impl Coder for Encoder {
    fn bit(&mut self, odds: &mut Bit, bit: bool) -> bool {
        let bound = (self.range >> 16) * u32::from(odds.zero);
        let (start, size) = if bit { (bound, self.range - bound) } else { (0, bound) };
        self.narrow(start, size);
        odds.learn(bit);
        bit
    }

    fn symbol(&mut self, cumulative: &[u32], symbol: u32) -> u32 {
        let unit = self.range / cumulative[cumulative.len() - 1];
        let (start, end) = (cumulative[symbol as usize], cumulative[symbol as usize + 1]);
        self.narrow(unit * start, unit * (end - start));
        symbol
    }

    fn even(&mut self, n: u32, number: u32) -> u32 {
        let unit = self.range / n;
        self.narrow(unit * number, unit);
        number
    }
}

/// Reads a code. Past its end it reads zeros, and remembers that it did.
pub(super) struct Decoder<'a> {
    /// How far the code lies above `low`.
    code: u32,
    range: u32,
    bytes: &'a [u8],
    /// Bytes taken, those past the end counted.
    n_taken: usize,
}

impl<'a> Decoder<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        let mut decoder = Self { code: 0, range: u32::MAX, bytes, n_taken: 0 };
        for _ in 0..4 {
            decoder.take();
        }
        decoder
    }

    fn take(&mut self) {
        let byte = self.bytes.get(self.n_taken).copied().unwrap_or(0);
        self.n_taken += 1;
        self.code = self.code << 8 | u32::from(byte);
    }

    fn narrow(&mut self, start: u32, size: u32) {
        // A damaged code may lie outside of every symbol; whatever comes of it is caught by its length or its digest.
        self.code = self.code.wrapping_sub(start);
        self.range = size;
        while self.range < MIN_RANGE {
            self.range <<= 8;
            self.take();
        }
    }

    /// Whether the code ended before what was asked of it.
    pub(super) fn is_exhausted(&self) -> bool {
        self.n_taken > self.bytes.len()
    }

    /// Whether exactly the bytes that there are were taken.
    pub(super) fn is_finished(&self) -> bool {
        self.n_taken == self.bytes.len()
    }
}

impl Coder for Decoder<'_> {
    fn bit(&mut self, odds: &mut Bit, _: bool) -> bool {
        let bound = (self.range >> 16) * u32::from(odds.zero);
        let bit = self.code >= bound;
        let (start, size) = if bit { (bound, self.range - bound) } else { (0, bound) };
        self.narrow(start, size);
        odds.learn(bit);
        bit
    }

    fn symbol(&mut self, cumulative: &[u32], _: u32) -> u32 {
        let unit = self.range / cumulative[cumulative.len() - 1];
        let at = self.code / unit;
        let symbol = (cumulative.partition_point(|&start| start <= at) - 1).min(cumulative.len() - 2);
        self.narrow(unit * cumulative[symbol], unit * (cumulative[symbol + 1] - cumulative[symbol]));
        symbol as u32
    }

    fn even(&mut self, n: u32, _: u32) -> u32 {
        let unit = self.range / n;
        let number = (self.code / unit).min(n - 1);
        self.narrow(unit * number, unit);
        number
    }

    fn below(&mut self, n: u64, _: u64) -> u64 {
        let mut shift = (64 - (n - 1).leading_zeros()).saturating_sub(16);
        let mut found = u64::from(self.even((((n - 1) >> shift) + 1) as u32, 0)) << shift;
        while shift > 0 {
            let width = shift.min(16);
            shift -= width;
            found |= u64::from(self.even(1 << width, 0)) << shift;
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Decision {
        Bit(usize, bool),
        Even(u32, u32),
        Below(u64, u64),
        Symbol(Vec<u32>, u32),
    }

    fn decision() -> impl Strategy<Value = Decision> {
        let symbol = prop::collection::vec(1u32..2000, 1..9).prop_flat_map(|odds| {
            let mut cumulative = vec![0];
            odds.iter().for_each(|odds| cumulative.push(cumulative[cumulative.len() - 1] + odds));
            (Just(cumulative), 0..odds.len() as u32)
        });
        prop_oneof![
            4 => (0usize..3, prop::bool::weighted(0.02)).prop_map(|(at, bit)| Decision::Bit(at, bit)),
            1 => (1u32..=MAX_TOTAL).prop_flat_map(|n| (Just(n), 0..n)).prop_map(|(n, x)| Decision::Even(n, x)),
            1 => (1u64..1 << 45).prop_flat_map(|n| (Just(n), 0..n)).prop_map(|(n, x)| Decision::Below(n, x)),
            1 => symbol.prop_map(|(cumulative, x)| Decision::Symbol(cumulative, x)),
        ]
    }

    fn walk(coder: &mut impl Coder, decisions: &[Decision]) -> Vec<u64> {
        let mut odds = [Bit::new(0x8000, 0); 3];
        let decide = |decision: &Decision| match decision {
            Decision::Bit(at, bit) => coder.bit(&mut odds[*at], *bit).into(),
            Decision::Even(n, x) => coder.even(*n, *x).into(),
            Decision::Below(n, x) => coder.below(*n, *x),
            Decision::Symbol(cumulative, x) => coder.symbol(cumulative, *x).into(),
        };
        decisions.iter().map(decide).collect()
    }

    /// The same decisions, forgotten: all that is not known is zero.
    fn asked(decision: &Decision) -> Decision {
        match decision {
            Decision::Bit(at, _) => Decision::Bit(*at, false),
            Decision::Even(n, _) => Decision::Even(*n, 0),
            Decision::Below(n, _) => Decision::Below(*n, 0),
            Decision::Symbol(cumulative, _) => Decision::Symbol(cumulative.clone(), 0),
        }
    }

    proptest! {
        #[test]
        fn decisions_come_back_and_every_byte_is_taken(decisions in prop::collection::vec(decision(), 0..400)) {
            let mut encoder = Encoder::new();
            let told = walk(&mut encoder, &decisions);
            let code = encoder.finish();
            let mut decoder = Decoder::new(&code);
            let asked: Vec<Decision> = decisions.iter().map(asked).collect();
            prop_assert_eq!(walk(&mut decoder, &asked), told);
            prop_assert!(decoder.is_finished());
        }

        #[test]
        fn whatever_the_bytes_say_decoding_ends(code in prop::collection::vec(any::<u8>(), 0..40), decisions in prop::collection::vec(decision(), 0..200)) {
            let mut decoder = Decoder::new(&code);
            for (decision, found) in decisions.iter().zip(walk(&mut decoder, &decisions)) {
                match decision {
                    Decision::Even(n, _) => prop_assert!(found < u64::from(*n)),
                    Decision::Symbol(cumulative, _) => prop_assert!(found < cumulative.len() as u64 - 1),
                    _ => {}
                }
            }
        }
    }

    #[test]
    fn rare_decisions_cost_little() {
        let mut encoder = Encoder::new();
        let mut odds = Bit::new(0x8000, 0);
        (0..100_000).for_each(|_| assert!(!encoder.bit(&mut odds, false)));
        // Odds of 1 in 256 remain, where steps round to nothing: 100,000 * log2(256 / 255) bits are 71 bytes.
        assert!(encoder.finish().len() < 80);
    }
}
