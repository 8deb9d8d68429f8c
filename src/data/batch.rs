//! Splits an epoch into packed batches.

use super::Dataset;

/// The label of a token without supervision (ignored by the loss).
pub const IGNORE: u32 = u32::MAX;

/// Examples are sorted by length within a window of this many batches: enough to fill batches well and evenly, few
/// enough to keep the order random.
const WINDOW: usize = 32;

/// Packed examples: no padding, and no attention across examples.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Batch {
    /// `[n_tokens]`.
    pub tokens: Vec<u32>,
    /// `[n_tokens]`: the next token to predict at each position, or [`IGNORE`]; always [`IGNORE`] at the end of an
    /// example.
    pub labels: Vec<u32>,
    /// `[n_examples + 1]`: the start of each example in `tokens`, then the end of the last one.
    pub starts: Vec<usize>,
}

impl Batch {
    /// The batch of the given examples of a dataset, in this order.
    pub fn of(dataset: &Dataset, examples: impl IntoIterator<Item = usize>) -> Self {
        let mut batch = Self { tokens: Vec::new(), labels: Vec::new(), starts: vec![0] };
        for i in examples {
            let example = dataset.example(i);
            batch.tokens.extend_from_slice(example.tokens);
            example.push_labels(&mut batch.labels);
            batch.starts.push(batch.tokens.len());
        }
        batch
    }

    /// Number of examples.
    pub fn n_examples(&self) -> usize {
        self.starts.len() - 1
    }

    /// Number of tokens.
    pub fn n_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Number of supervised tokens.
    pub fn n_supervised(&self) -> usize {
        self.labels.iter().filter(|&&label| label != IGNORE).count()
    }

    /// Number of tokens of its longest example.
    pub fn longest(&self) -> usize {
        self.starts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
    }
}

/// The limits of one batch.
///
/// An example longer than `max_tokens` is a batch of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchLimits {
    /// Maximum number of tokens; `usize::MAX` for no limit.
    pub max_tokens: usize,
    /// Maximum number of examples; `usize::MAX` for no limit.
    pub max_examples: usize,
}

/// The batches of one epoch: every example once, batches accessed by index.
///
/// The order is a pure function of the examples' lengths, the limits, the seed and the epoch. Memory: 8 bytes per
/// example; a batch's tokens are copied on access.
#[derive(Clone, Debug)]
pub struct Batches<'a> {
    dataset: &'a Dataset,
    /// Examples in training order.
    order: Vec<u32>,
    /// `[n_batches]`: the end of each batch in `order`.
    ends: Vec<u32>,
}

impl<'a> Batches<'a> {
    /// A shuffled epoch.
    ///
    /// With a limit on examples alone, batches are consecutive parts of the shuffled order. With a limit on tokens,
    /// batches are filled from examples of similar length, and remaining space with the longest example that fits;
    /// then the order of the batches is shuffled.
    ///
    /// # Panics
    /// If a limit is 0, or beyond 2^32 examples.
    pub fn shuffled(dataset: &'a Dataset, limits: BatchLimits, seed: u64, epoch: u64) -> Self {
        let mut random = Random::new(seed, epoch);
        let mut order = in_order(dataset);
        random.shuffle(&mut order);
        let lists = if limits.max_tokens == usize::MAX {
            split_by_limits(dataset, &order, limits)
        } else {
            fill(dataset, &order, limits)
        };
        // Also shuffle the last batch, which may not be full, so that epochs do not always end with a small step.
        let mut numbers: Vec<u32> = (0..lists.len() as u32).collect();
        if limits.max_tokens != usize::MAX {
            random.shuffle(&mut numbers);
        }
        Self::from_lists(dataset, numbers.iter().map(|&number| &lists[number as usize]))
    }

    /// Every example once, in file order.
    ///
    /// # Panics
    /// If a limit is 0, or beyond 2^32 examples.
    pub fn in_order(dataset: &'a Dataset, limits: BatchLimits) -> Self {
        let lists = split_by_limits(dataset, &in_order(dataset), limits);
        Self::from_lists(dataset, lists.iter())
    }

    /// Number of batches.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are no batches.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The dataset indices of the examples of batch `i`.
    ///
    /// # Panics
    /// If there is no such batch.
    pub fn examples(&self, i: usize) -> &[u32] {
        let begin = i.checked_sub(1).map_or(0, |before| self.ends[before] as usize);
        &self.order[begin..self.ends[i] as usize]
    }

    /// Batch `i`.
    ///
    /// # Panics
    /// If there is no such batch.
    pub fn get(&self, i: usize) -> Batch {
        Batch::of(self.dataset, self.examples(i).iter().map(|&example| example as usize))
    }

    /// The batches from index `first`.
    pub fn iter_from(&self, first: usize) -> impl Iterator<Item = Batch> + '_ {
        (first..self.len()).map(|i| self.get(i))
    }

    /// Number of tokens of the largest batch, which determines the memory.
    pub fn max_tokens(&self) -> usize {
        let tokens = |i| self.examples(i).iter().map(|&example| self.dataset.n_tokens_of(example as usize)).sum();
        (0..self.len()).map(tokens).max().unwrap_or(0)
    }

    fn from_lists<'l>(dataset: &'a Dataset, lists: impl Iterator<Item = &'l Vec<u32>>) -> Self {
        let (mut order, mut ends) = (Vec::with_capacity(dataset.len()), Vec::new());
        for list in lists {
            order.extend_from_slice(list);
            ends.push(order.len() as u32);
        }
        Self { dataset, order, ends }
    }
}

fn in_order(dataset: &Dataset) -> Vec<u32> {
    (0..u32::try_from(dataset.len()).expect("a dataset has fewer than 2^32 examples")).collect()
}

/// Splits `order` into runs as long as the limits allow.
fn split_by_limits(dataset: &Dataset, order: &[u32], limits: BatchLimits) -> Vec<Vec<u32>> {
    let mut open = Open::new(limits);
    for &example in order {
        let n_tokens = dataset.n_tokens_of(example as usize);
        if !open.has_room(n_tokens) {
            open.close();
        }
        open.push(example, n_tokens);
    }
    open.finish()
}

/// Fills batches with examples of similar length, one window of `order` at a time.
fn fill(dataset: &Dataset, order: &[u32], limits: BatchLimits) -> Vec<Vec<u32>> {
    let mut open = Open::new(limits);
    let mean = (dataset.n_tokens() / dataset.len().max(1) as u64).max(1) as usize;
    let per_batch = (limits.max_tokens / mean).clamp(1, limits.max_examples);
    for window in order.chunks(per_batch.saturating_mul(WINDOW)) {
        // Ascending, so that the longest is last; equal lengths keep their shuffled order.
        let mut left: Vec<(usize, u32)> =
            window.iter().map(|&example| (dataset.n_tokens_of(example as usize), example)).collect();
        left.sort_by_key(|&(n_tokens, _)| n_tokens);
        while !left.is_empty() {
            let n_fitting = left.partition_point(|&(n_tokens, _)| open.has_room(n_tokens));
            match n_fitting.checked_sub(1) {
                Some(longest) => {
                    let (n_tokens, example) = left.remove(longest);
                    open.push(example, n_tokens);
                }
                None => open.close(),
            }
        }
    }
    open.finish()
}

/// Finished batches, and the one being filled.
struct Open {
    limits: BatchLimits,
    closed: Vec<Vec<u32>>,
    examples: Vec<u32>,
    n_tokens: usize,
}

impl Open {
    fn new(limits: BatchLimits) -> Self {
        assert!(limits.max_tokens > 0 && limits.max_examples > 0, "batch limits are positive");
        Self { limits, closed: Vec::new(), examples: Vec::new(), n_tokens: 0 }
    }

    fn has_room(&self, n_tokens: usize) -> bool {
        let fits = self.n_tokens.saturating_add(n_tokens) <= self.limits.max_tokens;
        self.examples.is_empty() || fits && self.examples.len() < self.limits.max_examples
    }

    fn push(&mut self, example: u32, n_tokens: usize) {
        self.examples.push(example);
        self.n_tokens += n_tokens;
    }

    fn close(&mut self) {
        self.closed.push(std::mem::take(&mut self.examples));
        self.n_tokens = 0;
    }

    fn finish(mut self) -> Vec<Vec<u32>> {
        if !self.examples.is_empty() {
            self.close();
        }
        self.closed
    }
}

/// A stream of random numbers: the BLAKE3 XOF of seed and epoch (8 bytes each, little-endian).
struct Random(blake3::OutputReader);

impl Random {
    fn new(seed: u64, epoch: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes()).update(&epoch.to_le_bytes());
        Self(hasher.finalize_xof())
    }

    /// A number below `n`; 64 random bits leave a bias below 2^-32 for `n` below 2^32.
    fn below(&mut self, n: usize) -> usize {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        ((u128::from(u64::from_le_bytes(bytes)) * n as u128) >> 64) as usize
    }

    /// The Fisher-Yates shuffle, from the end.
    fn shuffle(&mut self, items: &mut [u32]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NONE: usize = usize::MAX;

    fn dataset(lengths: &[usize]) -> Dataset {
        let mut dataset = Dataset::new();
        for (i, &length) in lengths.iter().enumerate() {
            dataset.push(&vec![i as u32; length], length / 2);
        }
        dataset
    }

    fn plan(batches: &Batches<'_>) -> Vec<Vec<u32>> {
        (0..batches.len()).map(|i| batches.examples(i).to_vec()).collect()
    }

    #[test]
    fn a_batch_packs_examples_without_padding() {
        let mut dataset = Dataset::new();
        dataset.push(&[1, 2, 3], 1);
        dataset.push(&[4, 5], 1);
        let batch = Batch::of(&dataset, [1, 0]);
        assert_eq!(batch.tokens, [4, 5, 1, 2, 3]);
        assert_eq!(batch.labels, [5, IGNORE, 2, 3, IGNORE]);
        assert_eq!(batch.starts, [0, 2, 5]);
        assert_eq!((batch.n_examples(), batch.n_tokens(), batch.n_supervised(), batch.longest()), (2, 5, 3, 3));
    }

    #[test]
    fn batches_in_order_keep_the_file_order() {
        let dataset = dataset(&[3, 3, 5, 9, 1]);
        let batches = Batches::in_order(&dataset, BatchLimits { max_tokens: 6, max_examples: NONE });
        assert_eq!(plan(&batches), [vec![0, 1], vec![2], vec![3], vec![4]]);
        let batches = Batches::in_order(&dataset, BatchLimits { max_tokens: NONE, max_examples: 2 });
        assert_eq!(plan(&batches), [vec![0, 1], vec![2, 3], vec![4]]);
        assert_eq!(batches.max_tokens(), 14);
    }

    #[test]
    fn seed_and_epoch_decide_the_order() {
        let dataset = dataset(&[5; 100]);
        let limits = BatchLimits { max_tokens: NONE, max_examples: 8 };
        let of = |seed, epoch| plan(&Batches::shuffled(&dataset, limits, seed, epoch));
        assert_eq!(of(1, 0), of(1, 0));
        assert_ne!(of(1, 0), of(2, 0));
        assert_ne!(of(1, 0), of(1, 1));
        assert_eq!(of(1, 0).len(), 13, "no example is dropped");
    }

    #[test]
    fn the_order_is_the_same_on_every_machine() {
        let dataset = dataset(&[2; 8]);
        let batches = Batches::shuffled(&dataset, BatchLimits { max_tokens: NONE, max_examples: 8 }, 0, 0);
        assert_eq!(batches.examples(0), [1, 6, 5, 4, 7, 2, 3, 0]);
    }

    #[test]
    fn token_budgets_are_filled_with_examples_of_similar_length() {
        let lengths: Vec<usize> = (0..1000).map(|i| 20 + i * 37 % 180).collect();
        let dataset = dataset(&lengths);
        let batches = Batches::shuffled(&dataset, BatchLimits { max_tokens: 2048, max_examples: NONE }, 3, 1);
        let minimum = dataset.n_tokens().div_ceil(2048) as usize;
        assert!(batches.len() <= minimum + 1, "{} batches where {minimum} would suffice", batches.len());
    }

    #[test]
    fn an_epoch_resumes_where_it_stopped() {
        let dataset = dataset(&[4, 9, 2, 7, 7, 1, 3]);
        let batches = Batches::shuffled(&dataset, BatchLimits { max_tokens: 10, max_examples: NONE }, 5, 2);
        let all: Vec<Batch> = batches.iter_from(0).collect();
        assert_eq!(batches.iter_from(2).collect::<Vec<_>>(), all[2..]);
    }

    proptest! {
        #[test]
        fn every_example_comes_once_within_the_limits(
            lengths in prop::collection::vec(1usize..50, 0..200),
            max_tokens in prop_oneof![Just(NONE), 1usize..300],
            max_examples in prop_oneof![Just(NONE), 1usize..20],
            seed: u64,
        ) {
            let dataset = dataset(&lengths);
            let limits = BatchLimits { max_tokens, max_examples };
            for batches in [Batches::shuffled(&dataset, limits, seed, 1), Batches::in_order(&dataset, limits)] {
                let mut seen = Vec::new();
                for i in 0..batches.len() {
                    let examples = batches.examples(i);
                    let batch = batches.get(i);
                    prop_assert!(examples.len() <= max_examples);
                    prop_assert!(batch.n_tokens() <= max_tokens || examples.len() == 1);
                    prop_assert_eq!(batch.labels.len(), batch.n_tokens());
                    seen.extend_from_slice(examples);
                }
                seen.sort_unstable();
                prop_assert_eq!(seen, (0..lengths.len() as u32).collect::<Vec<_>>());
            }
        }
    }
}
