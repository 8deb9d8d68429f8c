//! Partitions that split a job into independent parts.

use std::{cmp::Reverse, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::MaskError;

/// One of several similar parts of the targets, written `2/8`: the second of eight.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Partition {
    number: usize,
    count: usize,
}

impl Partition {
    /// Part `number` (1 to `count`) of `count`.
    ///
    /// # Errors
    /// [`MaskError::Usage`] if there is no such part.
    pub fn new(number: usize, count: usize) -> Result<Self, MaskError> {
        if number == 0 || number > count {
            return Err(MaskError::Usage(format!("partition {number}/{count}: parts are numbered from 1 to {count}")));
        }
        Ok(Self { number, count })
    }

    /// The number of this part, from 1.
    pub fn number(self) -> usize {
        self.number
    }
    /// The number of parts.
    pub fn count(self) -> usize {
        self.count
    }

    /// The indices of `sizes` that belong to this part, ascending. Items are assigned from the largest down, each to
    /// the part with the smallest total (ties: the first), so that all parts have a similar amount of work.
    ///
    /// # Errors
    /// [`MaskError::Usage`] if there are more parts than sizes.
    pub(super) fn of(self, sizes: &[u64]) -> Result<Vec<usize>, MaskError> {
        if self.count > sizes.len() {
            let what = format!("partition {self}: there are {} targets, use at most as many parts", sizes.len());
            return Err(MaskError::Usage(what));
        }
        let mut order: Vec<usize> = (0..sizes.len()).collect();
        order.sort_by_key(|&i| (Reverse(sizes[i]), i));
        let mut loads = vec![(0u64, 0usize); self.count];
        let mut mine = Vec::new();
        for i in order {
            let lightest = (0..self.count).min_by_key(|&part| loads[part]).expect("there is a part");
            // Empty items count too, so that they are spread over the parts.
            loads[lightest] = (loads[lightest].0 + sizes[i], loads[lightest].1 + 1);
            if lightest + 1 == self.number {
                mine.push(i);
            }
        }
        mine.sort_unstable();
        Ok(mine)
    }
}

impl fmt::Display for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.number, self.count)
    }
}

impl FromStr for Partition {
    type Err = MaskError;

    fn from_str(text: &str) -> Result<Self, MaskError> {
        let parse = |(number, count): (&str, &str)| Some((number.parse().ok()?, count.parse().ok()?));
        match text.split_once('/').and_then(parse) {
            Some((number, count)) => Self::new(number, count),
            None => Err(MaskError::Usage(format!(
                "partition {text:?}: expected a part and the number of parts, such as 2/8"
            ))),
        }
    }
}

impl TryFrom<String> for Partition {
    type Error = MaskError;

    fn try_from(text: String) -> Result<Self, MaskError> {
        text.parse()
    }
}

impl From<Partition> for String {
    fn from(partition: Partition) -> Self {
        partition.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_complete_disjoint_and_balanced() {
        let sizes: Vec<u64> = (0..100).map(|i| 1000 + i * 37 % 900).collect();
        for count in [1, 2, 7, 100] {
            let parts: Vec<Vec<usize>> =
                (1..=count).map(|number| Partition::new(number, count).unwrap().of(&sizes).unwrap()).collect();
            let mut all: Vec<usize> = parts.concat();
            all.sort_unstable();
            assert_eq!(all, (0..100).collect::<Vec<_>>());
            let loads = parts.iter().map(|part| part.iter().map(|&i| sizes[i]).sum::<u64>());
            let (lightest, most) = (loads.clone().min().unwrap(), loads.max().unwrap());
            assert!(most - lightest <= 1900, "{lightest} {most}");
        }
        assert!(Partition::new(1, 4).unwrap().of(&[0, 0, 0, 0]).unwrap() == [0]);
        assert!(Partition::new(1, 4).unwrap().of(&[5, 5, 5]).is_err());
    }

    #[test]
    fn parts_are_numbered_from_one() {
        let partition: Partition = "2/8".parse().unwrap();
        assert_eq!((partition.number(), partition.count(), partition.to_string()), (2, 8, "2/8".to_owned()));
        for bad in ["", "1", "0/4", "5/4", "1/0", "a/b", "1/2/3", "-1/4"] {
            assert!(bad.parse::<Partition>().is_err(), "{bad}");
        }
    }
}
