//! Training options: batches, learning rates, evaluation and stopping.

use serde::{Deserialize, Serialize};

use super::{TrainError, pass::Keep};
use crate::data::{BatchLimits, Batches, Dataset};

/// How the learning rate decays after the warm-up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Linearly to zero.
    #[default]
    Linear,
    /// Along half a cosine to zero.
    Cosine,
    /// Not at all.
    Constant,
}

impl Schedule {
    /// The learning rate of step `step` (from 0) of `n_steps`, as a fraction of the maximum: linear warm-up from 0 in
    /// `n_warmup` steps, then decay. Same schedule as in transformers, so that runs are comparable.
    pub fn fraction(self, step: u64, n_steps: u64, n_warmup: u64) -> f64 {
        if step < n_warmup {
            return step as f64 / n_warmup as f64;
        }
        let done = (step - n_warmup) as f64 / n_steps.saturating_sub(n_warmup).max(1) as f64;
        match self {
            Self::Linear => (1.0 - done).max(0.0),
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos()),
            Self::Constant => 1.0,
        }
    }
}

/// Length of the learning rate warm-up.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Warmup {
    /// A number of steps.
    Steps(u64),
    /// A fraction of all steps.
    Share(f64),
}

/// The options that determine the result of a run. Two runs with the same options, base, mask and data write the same
/// bytes.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TrainOptions {
    /// Passes over the data.
    pub epochs: u64,
    /// Maximum number of optimizer steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Maximum number of examples per batch.
    pub batch_examples: usize,
    /// Maximum number of tokens per batch; a longer example is a batch of its own.
    pub batch_tokens: usize,
    /// Batches per optimizer step.
    pub accumulate: u64,
    /// Whether examples are shuffled in every epoch; otherwise they come in file order.
    pub shuffle: bool,
    /// The seed of the shuffling.
    pub seed: u64,
    /// The maximum learning rate.
    pub learning_rate: f64,
    /// How the learning rate decays.
    pub schedule: Schedule,
    /// How the learning rate warms up.
    pub warmup: Warmup,
    /// Decay rates of AdamW's moments.
    pub betas: (f64, f64),
    /// Added to the square root of AdamW's second moment.
    pub eps: f64,
    /// AdamW's weight decay, applied to the deltas.
    pub weight_decay: f64,
    /// Maximum gradient norm; larger gradients are scaled down to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip: Option<f64>,
    /// Steps between evaluations; by default at the end of every epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_every: Option<u64>,
    /// Number of evaluations without improvement after which the run stops.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patience: Option<u64>,
    /// Whether the biases of the chosen projections are trained too, as a whole.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub train_bias: bool,
    /// Whether a layer's activations are recomputed in the backward pass (gradient checkpointing): less memory, a
    /// third more time, the same result.
    pub layer_checkpoints: bool,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            epochs: 3,
            max_steps: None,
            batch_examples: 16,
            batch_tokens: 4096,
            accumulate: 1,
            shuffle: true,
            seed: 0,
            learning_rate: 8e-3,
            schedule: Schedule::Linear,
            warmup: Warmup::Share(0.06),
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.0,
            clip: Some(1.0),
            eval_every: None,
            patience: None,
            train_bias: false,
            layer_checkpoints: false,
        }
    }
}

impl TrainOptions {
    /// Rejects invalid options.
    ///
    /// # Errors
    /// [`TrainError::Usage`] names the option.
    pub fn check(&self) -> Result<(), TrainError> {
        let positive = |x: f64| x > 0.0 && x.is_finite();
        let fraction = |x: f64| (0.0..1.0).contains(&x);
        let warmup = match self.warmup {
            Warmup::Steps(_) => true,
            Warmup::Share(warmup) => (0.0..=1.0).contains(&warmup),
        };
        let rules = [
            (self.epochs > 0, "epochs", "at least 1"),
            (self.max_steps != Some(0), "max steps", "at least 1"),
            (self.batch_examples > 0, "examples per batch", "at least 1"),
            (self.batch_tokens > 0, "tokens per batch", "at least 1"),
            (self.accumulate > 0, "batches per step", "at least 1"),
            (positive(self.learning_rate), "learning rate", "positive"),
            (warmup, "warm-up", "a number of steps, or a fraction from 0 to 1"),
            (fraction(self.betas.0) && fraction(self.betas.1), "betas", "at least 0 and less than 1"),
            (positive(self.eps), "eps", "positive"),
            (self.weight_decay >= 0.0 && self.weight_decay.is_finite(), "weight decay", "0 or more"),
            (self.clip.is_none_or(positive), "clip", "positive"),
            (self.eval_every != Some(0), "steps between evaluations", "at least 1"),
            (self.patience != Some(0), "patience", "at least 1"),
        ];
        match rules.into_iter().find(|(holds, ..)| !holds) {
            None => Ok(()),
            Some((_, what, needed)) => Err(TrainError::Usage(format!("{what} must be {needed}"))),
        }
    }

    /// The limits of one batch.
    pub fn limits(&self) -> BatchLimits {
        BatchLimits { max_tokens: self.batch_tokens, max_examples: self.batch_examples }
    }

    /// What a forward pass keeps.
    pub fn keep(&self) -> Keep {
        if self.layer_checkpoints { Keep::Inputs } else { Keep::All }
    }

    /// The batches of an epoch (from 0).
    pub fn epoch<'d>(&self, data: &'d Dataset, epoch: u64) -> Batches<'d> {
        if self.shuffle {
            Batches::shuffled(data, self.limits(), self.seed, epoch)
        } else {
            Batches::in_order(data, self.limits())
        }
    }
}

/// The length of a run.
#[derive(Clone, PartialEq, Debug)]
pub struct RunLength {
    /// `[epochs]`: number of batches in each epoch.
    pub n_batches: Vec<u64>,
    /// Total number of optimizer steps.
    pub n_steps: u64,
    /// The number of warm-up steps among them.
    pub n_warmup: u64,
    /// Tokens of the largest batch.
    pub max_tokens: usize,
    /// The largest number of labeled tokens in a batch.
    pub max_supervised: usize,
    /// Mean number of tokens per step.
    pub tokens_per_step: f64,
}

impl RunLength {
    /// Lays out all epochs. Memory: the order of one epoch at a time.
    pub fn new(options: &TrainOptions, data: &Dataset) -> Self {
        let (mut n_batches, mut max_tokens, mut max_supervised) = (Vec::new(), 0, 0);
        for epoch in 0..options.epochs {
            // Without shuffling all epochs are the same.
            if epoch == 0 || options.shuffle {
                let batches = options.epoch(data, epoch);
                n_batches.push(batches.len() as u64);
                max_tokens = max_tokens.max(batches.max_tokens());
                let of_batch = |i| batches.examples(i).iter().map(|&i| data.example(i as usize).n_supervised()).sum();
                max_supervised = (0..batches.len()).map(of_batch).max().unwrap_or(0).max(max_supervised);
            } else {
                n_batches.push(n_batches[0]);
            }
        }
        let all: u64 = n_batches.iter().map(|n_batches| n_batches.div_ceil(options.accumulate)).sum();
        let n_steps = options.max_steps.map_or(all, |most| most.min(all));
        let n_warmup = match options.warmup {
            Warmup::Steps(n_steps) => n_steps,
            Warmup::Share(fraction) => (fraction * n_steps as f64).ceil() as u64,
        };
        let tokens_per_step = data.n_tokens() as f64 * options.epochs as f64 / all.max(1) as f64;
        Self { n_batches, n_steps, n_warmup, max_tokens, max_supervised, tokens_per_step }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learning_rates_warm_up_and_decay() {
        let of = |schedule: Schedule| -> Vec<f64> { (0..6).map(|step| schedule.fraction(step, 6, 2)).collect() };
        assert_eq!(of(Schedule::Linear), [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]);
        assert_eq!(of(Schedule::Constant), [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]);
        assert!((of(Schedule::Cosine)[4] - 0.5).abs() < 1e-12);
        assert_eq!(Schedule::Linear.fraction(0, 1, 0), 1.0);
    }

    #[test]
    fn invalid_options_are_named() {
        let message = |options: TrainOptions| options.check().unwrap_err().to_string();
        let default = TrainOptions::default;
        assert!(default().check().is_ok());
        assert_eq!(message(TrainOptions { epochs: 0, ..default() }), "epochs must be at least 1");
        assert_eq!(message(TrainOptions { learning_rate: f64::NAN, ..default() }), "learning rate must be positive");
        assert_eq!(
            message(TrainOptions { betas: (0.9, 1.0), ..default() }),
            "betas must be at least 0 and less than 1"
        );
        assert_eq!(message(TrainOptions { clip: Some(0.0), ..default() }), "clip must be positive");
    }

    #[test]
    fn a_plan_counts_steps_over_all_epochs() {
        let mut data = Dataset::new();
        for _ in 0..10 {
            data.push(&[1, 2, 3, 4], 2);
        }
        let options = TrainOptions { batch_examples: 3, accumulate: 2, epochs: 2, ..TrainOptions::default() };
        let plan = RunLength::new(&options, &data);
        // 3 + 3 + 3 + 1 examples are four batches, two steps.
        assert_eq!((plan.n_batches, plan.n_steps, plan.n_warmup, plan.max_tokens), (vec![4, 4], 4, 1, 12));
        let short = TrainOptions { max_steps: Some(3), warmup: Warmup::Steps(2), ..options };
        let plan = RunLength::new(&short, &data);
        assert_eq!((plan.n_steps, plan.n_warmup, plan.tokens_per_step), (3, 2, 20.0));
    }
}
