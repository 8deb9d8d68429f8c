//! The same weights in two checkpoints.

use std::collections::BTreeSet;

use super::WeightMap;
use crate::checkpoint::{CheckpointError, TensorRef};

/// A tensor of one checkpoint and the one of another that holds the same weight.
#[derive(Clone, Copy, Debug)]
pub struct Pairing<'a, 'b> {
    /// Of the first.
    pub a: TensorRef<'a>,
    /// Of the second.
    pub b: TensorRef<'b>,
}

/// Two checkpoints, weight by weight.
#[derive(Debug, Default)]
pub struct Pairs<'a, 'b> {
    /// In both, in the order of the first one's names.
    pub both: Vec<Pairing<'a, 'b>>,
    /// Tensors of the second that hold once more what one of `both` holds: a tied weight that the first stores less often.
    pub copies_b: Vec<Pairing<'a, 'b>>,
    /// In the first alone.
    pub only_a: Vec<TensorRef<'a>>,
    /// In the second alone.
    pub only_b: Vec<TensorRef<'b>>,
}

impl<'a> WeightMap<'a> {
    /// Pairs the weights of this checkpoint with those of another: by name, else by what the name means. A copy of a tied weight that
    /// only the first stores is paired with the second's one tensor. A quantized weight is one tensor of the numbers that it is decoded
    /// to; where it cannot be decoded, its stored tensors are paired like any others.
    ///
    /// # Errors
    /// A failure to read what decoding needs.
    pub fn pairs<'b>(&self, other: &WeightMap<'b>) -> Result<Pairs<'a, 'b>, CheckpointError> {
        let (all_a, all_b) = (self.checkpoint.weights()?, other.checkpoint.weights()?);
        let mut pairs = Pairs::default();
        let mut taken: BTreeSet<&str> = BTreeSet::new();
        let mut rest = Vec::new();
        for &a in &all_a {
            let found = all_b.binary_search_by(|b| b.info.name.cmp(&a.info.name));
            match found.ok().map(|at| all_b[at]) {
                Some(b) => {
                    taken.insert(&b.info.name);
                    pairs.both.push(Pairing { a, b });
                }
                None => rest.push(a),
            }
        }
        for a in rest {
            let name = &a.info.name;
            let same = |b: TensorRef<'b>| b.info.is_like(a.info);
            match other.find(name, same) {
                Ok(found)
                    if !taken.contains(found.tensor.info.name.as_str())
                        || other.tie(name).is_some_and(|tie| tie.holds(&found.tensor.info.name)) =>
                {
                    taken.insert(&found.tensor.info.name);
                    pairs.both.push(Pairing { a, b: found.tensor });
                }
                _ => pairs.only_a.push(a),
            }
        }
        for b in all_b.into_iter().filter(|b| !taken.contains(b.info.name.as_str())) {
            let same = |a: TensorRef<'a>| a.info.is_like(b.info);
            match self.tie(&b.info.name).and_then(|_| self.find(&b.info.name, same).ok()) {
                Some(found) => pairs.copies_b.push(Pairing { a: found.tensor, b }),
                None => pairs.only_b.push(b),
            }
        }
        pairs.both.sort_by(|x, y| x.a.info.name.cmp(&y.a.info.name));
        Ok(pairs)
    }
}
