//! The examples of a file, as token ids.

use std::ops::Range;

use super::IGNORE;

/// Examples in file order.
///
/// Memory: 4 bytes per token, 8 per example and 8 per supervised span.
#[derive(Clone, Default, Debug)]
pub struct Dataset {
    tokens: Vec<u32>,
    /// `[n_examples]`: the ends of each example's tokens and spans.
    ends: Vec<(usize, usize)>,
    /// Supervised spans as `(begin, end)` within the example; ascending, disjoint.
    spans: Vec<(u32, u32)>,
    longest: usize,
    n_supervised: u64,
}

/// One example of a [`Dataset`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Example<'a> {
    /// Its token ids, starting with the prompt.
    pub tokens: &'a [u32],
    /// The supervised tokens, as `(begin, end)`; ascending, disjoint. None begins at 0, because no token precedes the
    /// first one to predict it.
    pub spans: &'a [(u32, u32)],
}

impl Example<'_> {
    /// Number of tokens before the first supervised one.
    pub fn n_prompt(&self) -> usize {
        self.spans.first().map_or(self.tokens.len(), |span| span.0 as usize)
    }

    /// Number of supervised tokens.
    pub fn n_supervised(&self) -> usize {
        self.spans.iter().map(|(begin, end)| (end - begin) as usize).sum()
    }

    /// Appends the labels, `[n_tokens]`: the next token at each position, or [`IGNORE`].
    pub(super) fn push_labels(&self, labels: &mut Vec<u32>) {
        let start = labels.len();
        labels.resize(start + self.tokens.len(), IGNORE);
        for &(begin, end) in self.spans {
            let (begin, end) = (begin as usize, end as usize);
            labels[start + begin - 1..start + end - 1].copy_from_slice(&self.tokens[begin..end]);
        }
    }
}

impl Dataset {
    /// An empty dataset.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an example; all tokens after the first `n_prompt` are supervised.
    ///
    /// # Panics
    /// If the example has 2^32 tokens or more.
    pub fn push(&mut self, tokens: &[u32], n_prompt: usize) {
        self.push_spans(tokens, std::slice::from_ref(&(n_prompt..tokens.len())));
    }

    /// Adds an example with its supervised spans.
    ///
    /// Spans are cut to the available tokens, and never include the first token, which no token precedes.
    ///
    /// # Panics
    /// If spans overlap or descend, or if the example has 2^32 tokens or more.
    pub fn push_spans(&mut self, tokens: &[u32], supervised: &[Range<usize>]) {
        let n_tokens = u32::try_from(tokens.len()).expect("an example has fewer than 2^32 tokens");
        self.tokens.extend_from_slice(tokens);
        let mut last = 1;
        for span in supervised {
            let (begin, end) = (span.start.max(1) as u32, span.end.min(tokens.len()) as u32);
            if begin >= end {
                continue;
            }
            assert!(begin >= last, "spans ascend and do not overlap");
            last = end;
            self.n_supervised += u64::from(end - begin);
            self.spans.push((begin, end));
        }
        self.ends.push((self.tokens.len(), self.spans.len()));
        self.longest = self.longest.max(n_tokens as usize);
    }

    /// Number of examples.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are no examples.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Total number of tokens.
    pub fn n_tokens(&self) -> u64 {
        self.tokens.len() as u64
    }

    /// Total number of supervised tokens.
    pub fn n_supervised(&self) -> u64 {
        self.n_supervised
    }

    /// Number of tokens of the longest example.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Number of tokens of example `i`.
    pub fn n_tokens_of(&self, i: usize) -> usize {
        self.ends[i].0 - self.start(i).0
    }

    /// Example `i`.
    ///
    /// # Panics
    /// If there is no such example.
    pub fn example(&self, i: usize) -> Example<'_> {
        let ((token, span), (token_end, span_end)) = (self.start(i), self.ends[i]);
        Example { tokens: &self.tokens[token..token_end], spans: &self.spans[span..span_end] }
    }

    /// All examples, in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Example<'_>> {
        (0..self.len()).map(|i| self.example(i))
    }

    /// The BLAKE3 of all examples in order: equal digests mean equal training.
    pub fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        let mut bytes = Vec::new();
        for example in self.iter() {
            bytes.clear();
            bytes.extend((example.tokens.len() as u64).to_le_bytes());
            bytes.extend(example.tokens.iter().flat_map(|token| token.to_le_bytes()));
            bytes.extend((example.spans.len() as u64).to_le_bytes());
            bytes.extend(
                example.spans.iter().flat_map(|(begin, end)| [begin.to_le_bytes(), end.to_le_bytes()].concat()),
            );
            hasher.update(&bytes);
        }
        hasher.finalize()
    }

    fn start(&self, i: usize) -> (usize, usize) {
        i.checked_sub(1).map_or((0, 0), |before| self.ends[before])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_the_next_tokens() {
        let mut dataset = Dataset::new();
        dataset.push(&[10, 11, 12, 13], 2);
        let example = dataset.example(0);
        let mut labels = vec![7];
        example.push_labels(&mut labels);
        assert_eq!(labels, [7, IGNORE, 12, 13, IGNORE]);
        assert_eq!((example.n_prompt(), example.n_supervised()), (2, 2));
    }

    #[test]
    fn the_first_token_is_never_supervised_and_spans_end_with_the_tokens() {
        let mut dataset = Dataset::new();
        dataset.push_spans(&[1, 2, 3], &[0..2, 2..9]);
        assert_eq!(dataset.example(0).spans, [(1, 2), (2, 3)]);
        dataset.push(&[1], 0);
        assert_eq!(dataset.example(1).spans, []);
        assert_eq!((dataset.n_supervised(), dataset.n_tokens(), dataset.longest()), (2, 4, 3));
    }

    #[test]
    fn the_digest_depends_on_tokens_spans_and_order() {
        let of = |examples: &[(&[u32], usize)]| {
            let mut dataset = Dataset::new();
            for &(tokens, n_prompt) in examples {
                dataset.push(tokens, n_prompt);
            }
            dataset.digest()
        };
        let (a, b): (&[u32], &[u32]) = (&[1, 2, 3], &[4, 5]);
        let whole = of(&[(a, 1), (b, 1)]);
        assert_eq!(whole, of(&[(a, 1), (b, 1)]));
        assert_ne!(whole, of(&[(b, 1), (a, 1)]));
        assert_ne!(whole, of(&[(a, 2), (b, 1)]));
        assert_ne!(whole, of(&[(&[1, 2], 1), (&[3, 4, 5], 1)]));
    }
}
