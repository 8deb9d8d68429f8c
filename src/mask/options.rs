//! Options of a mask.

use std::{collections::BTreeMap, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{MaskError, Partition, Recipe};
use crate::{
    backend::{Chooser, ScoreKind},
    checkpoint::Checkpoint,
    weights::KindAxes,
};

/// The scope in which weights compete.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Scope {
    /// Within each row: every neuron gets its share.
    #[default]
    Row,
    /// Within each tensor.
    Tensor,
    /// Across all targets.
    Global,
}

impl Scope {
    /// The name in recipes and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Row => "row",
            Self::Tensor => "tensor",
            Self::Global => "global",
        }
    }
}

/// How much to choose.
#[derive(Clone, Copy, PartialEq, Debug)]
#[non_exhaustive]
pub enum Amount {
    /// Entries per row; in wider scopes, the same total number.
    K(u64),
    /// A fraction of all parameters of the model, 0 to 1.
    Share(f64),
    /// Total number of entries.
    Count(u64),
}

impl FromStr for Amount {
    type Err = MaskError;

    /// Parses a budget: `0.02%`, a fraction such as `0.0002`, or a count such as `1000000`.
    fn from_str(text: &str) -> Result<Self, MaskError> {
        let bad =
            || MaskError::Usage(format!("budget {text:?}: expected a percentage, a fraction below 1, or a count"));
        if let Some(percent) = text.strip_suffix('%') {
            let share = percent.trim().parse::<f64>().map_err(|_| bad())? / 100.0;
            return if share > 0.0 && share <= 1.0 { Ok(Self::Share(share)) } else { Err(bad()) };
        }
        if let Ok(count) = text.parse::<u64>() {
            return if count > 0 { Ok(Self::Count(count)) } else { Err(bad()) };
        }
        match text.parse::<f64>() {
            Ok(share) if share > 0.0 && share < 1.0 => Ok(Self::Share(share)),
            _ => Err(bad()),
        }
    }
}

/// Options of the selection. [`MaskOptions::new`] gives the paper's mask.
#[derive(Clone, Debug)]
pub struct MaskOptions<'a> {
    /// How much to choose.
    pub amount: Amount,
    /// The score that ranks the weights.
    pub score: ScoreKind,
    /// The scope in which they compete.
    pub scope: Scope,
    /// The seed of random scores and of the neuron fraction.
    pub seed: u64,
    /// The fraction of each tensor's rows that take part; 1 for all.
    pub neuron_fraction: f64,
    /// Patterns of the tensors that take part; if empty, the seven Llama projections.
    pub targets: Vec<String>,
    /// Patterns of targets stored as `[d_in, d_out]`, in addition to those that the weight map knows.
    pub transposed: Vec<String>,
    /// The orientation of kinds of weights for which neither shape nor model type determines it.
    pub axes: Vec<KindAxes>,
    /// Exact targets, instead of patterns, each with whether it is read as `[d_in, d_out]`.
    pub named: Option<BTreeMap<String, bool>>,
    /// Gradients, with the names and shapes of the weights, for scores that need them.
    pub gradients: Option<&'a Checkpoint>,
    /// Activation norms per column, `[d_in]` (or `[E, d_in]` for stacks), under the names of weights or their modules,
    /// for `wanda`.
    pub activations: Option<&'a Checkpoint>,
    /// The partition of the targets to process; `None` for all. The parts of a mask can be made on different machines,
    /// in any order, and joined by [`join_masks`](super::join_masks).
    pub partition: Option<Partition>,
    /// Whether the mask records the BLAKE3 of each whole target.
    pub hash: bool,
    /// The device that chooses within rows; wider scopes always run on the CPU. The mask is the same.
    pub chooser: Chooser<'a>,
}

impl MaskOptions<'_> {
    /// The `k` entries of largest magnitude in each row of the seven Llama projections.
    pub fn new(k: u64) -> Self {
        Self {
            amount: Amount::K(k),
            score: ScoreKind::Magnitude,
            scope: Scope::Row,
            seed: 0,
            neuron_fraction: 1.0,
            targets: Vec::new(),
            transposed: Vec::new(),
            axes: Vec::new(),
            named: None,
            gradients: None,
            activations: None,
            partition: None,
            hash: false,
            chooser: Chooser::cpu(),
        }
    }

    /// The options that repeat the choice of `recipe` in targets of these names, each with whether it is read as
    /// `[d_in, d_out]`; `None` if that needs more than the base, or if rows compete with each other. Targets and
    /// orientation are not derived from the recipe again, because what is known about models may have changed.
    pub(crate) fn following(recipe: &Recipe, targets: BTreeMap<String, bool>) -> Option<MaskOptions<'static>> {
        let score = match recipe.score.as_str() {
            "magnitude" => ScoreKind::Magnitude,
            "smallest" => ScoreKind::Smallest,
            "random" => ScoreKind::Random,
            _ => return None,
        };
        let k = recipe.k.filter(|&k| k > 0 && recipe.scope == Scope::Row.name())?;
        let neuron_fraction = recipe.neuron_fraction.unwrap_or(1.0);
        (neuron_fraction > 0.0 && neuron_fraction <= 1.0).then(|| MaskOptions {
            score,
            seed: recipe.seed.unwrap_or(0),
            neuron_fraction,
            named: Some(targets),
            ..MaskOptions::new(k)
        })
    }

    /// Rejects invalid combinations.
    pub(super) fn check(&self) -> Result<(), MaskError> {
        let usage = |what: &str| Err(MaskError::Usage(what.to_owned()));
        if self.amount == Amount::K(0) {
            return usage("k is 0: nothing would be chosen");
        }
        if !(self.neuron_fraction > 0.0 && self.neuron_fraction <= 1.0) {
            return usage("the neuron fraction must be above 0 and at most 1");
        }
        if self.score.needs_gradients() != self.gradients.is_some() {
            let need = if self.gradients.is_some() { "takes no" } else { "needs" };
            return usage(&format!("score {} {need} gradients", self.score.name()));
        }
        if (self.score == ScoreKind::Wanda) != self.activations.is_some() {
            let need = if self.activations.is_some() { "takes no" } else { "needs" };
            return usage(&format!("score {} {need} activations", self.score.name()));
        }
        if let (Some(partition), Scope::Global) = (self.partition, self.scope) {
            let what = format!(
                "partition {partition}: in global scope all weights compete, so parts cannot be made separately"
            );
            return Err(MaskError::Usage(what));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_percentages_fractions_or_counts() {
        let amount = |text: &str| text.parse::<Amount>().ok();
        assert_eq!(amount("0.02%"), Some(Amount::Share(0.0002)));
        assert_eq!(amount("100 %"), Some(Amount::Share(1.0)));
        assert_eq!(amount("0.5"), Some(Amount::Share(0.5)));
        assert_eq!(amount("1000"), Some(Amount::Count(1000)));
        for bad in ["", "0", "0%", "101%", "1.5", "-1", "nan", "inf%", "x"] {
            assert_eq!(amount(bad), None, "{bad}");
        }
    }
}
