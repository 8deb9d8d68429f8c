//! How to train: batches, learning rates, when to look and when to stop.

use serde::{Deserialize, Serialize};

use super::{TrainError, pass::Keep};
use crate::data::{BatchLimits, Batches, Dataset};

/// How the learning rate goes down after the warm-up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// In a straight line, to zero.
    #[default]
    Linear,
    /// Along half a cosine, to zero.
    Cosine,
    /// Not at all.
    Constant,
}

impl Schedule {
    /// The learning rate of step `step` (from 0) of `n_steps`, as a share of the highest: up from 0 in `n_warmup` steps, then down.
    /// As transformers has it, so that runs compare.
    pub fn share(self, step: u64, n_steps: u64, n_warmup: u64) -> f64 {
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

/// Steps in which the learning rate goes up.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Warmup {
    /// So many.
    Steps(u64),
    /// A share of all steps.
    Share(f64),
}

/// What decides the outcome of a run, beside base, mask and data: two runs that agree in it give the same bytes.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TrainOptions {
    /// Passes over the data.
    pub epochs: u64,
    /// Optimizer steps at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Most examples of a batch.
    pub batch_examples: usize,
    /// Most tokens of a batch; a longer example is a batch of its own.
    pub batch_tokens: usize,
    /// Batches of an optimizer step.
    pub accumulate: u64,
    /// Whether examples are shuffled, each epoch anew; else they come in file order.
    pub shuffle: bool,
    /// Decides the order of the examples.
    pub seed: u64,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// How it goes down.
    pub schedule: Schedule,
    /// How it goes up.
    pub warmup: Warmup,
    /// AdamW's decays.
    pub betas: (f64, f64),
    /// Added to the root of AdamW's mean square.
    pub eps: f64,
    /// AdamW's weight decay, of the deltas.
    pub weight_decay: f64,
    /// Gradients whose norm is larger are scaled down to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip: Option<f64>,
    /// Steps between evaluations; at the end of every epoch where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_every: Option<u64>,
    /// Evaluations without a better loss after which the run stops.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patience: Option<u64>,
    /// Whether the biases of the chosen projections are trained too, whole.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub train_bias: bool,
    /// Whether a layer's activations are made again on the way back: less memory, a third more time. The result is the same.
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
    /// Refuses what makes no sense.
    ///
    /// # Errors
    /// [`TrainError::Usage`] names the option.
    pub fn check(&self) -> Result<(), TrainError> {
        let positive = |x: f64| x > 0.0 && x.is_finite();
        let share = |x: f64| (0.0..1.0).contains(&x);
        let warmup = match self.warmup {
            Warmup::Steps(_) => true,
            Warmup::Share(warmup) => (0.0..=1.0).contains(&warmup),
        };
        let rules = [
            (self.epochs > 0, "epochs", "at least 1"),
            (self.max_steps != Some(0), "max steps", "at least 1"),
            (self.batch_examples > 0, "examples of a batch", "at least 1"),
            (self.batch_tokens > 0, "tokens of a batch", "at least 1"),
            (self.accumulate > 0, "batches of a step", "at least 1"),
            (positive(self.learning_rate), "learning rate", "positive"),
            (warmup, "warm-up", "a number of steps, or a share from 0 to 1"),
            (share(self.betas.0) && share(self.betas.1), "betas", "from 0 to below 1"),
            (positive(self.eps), "eps", "positive"),
            (self.weight_decay >= 0.0 && self.weight_decay.is_finite(), "weight decay", "0 or more"),
            (self.clip.is_none_or(positive), "clip", "positive"),
            (self.eval_every != Some(0), "steps between evaluations", "at least 1"),
            (self.patience != Some(0), "patience", "at least 1"),
        ];
        match rules.into_iter().find(|(holds, ..)| !holds) {
            None => Ok(()),
            Some((_, what, needed)) => Err(TrainError::Usage(format!("{what}: {needed} is needed"))),
        }
    }

    /// What one batch may hold.
    pub fn limits(&self) -> BatchLimits {
        BatchLimits { max_tokens: self.batch_tokens, max_examples: self.batch_examples }
    }

    /// What passes keep.
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

/// How long a run is.
#[derive(Clone, PartialEq, Debug)]
pub struct RunLength {
    /// `[epochs]`: batches of each epoch.
    pub n_batches: Vec<u64>,
    /// Optimizer steps in all.
    pub n_steps: u64,
    /// Of those, steps in which the learning rate goes up.
    pub n_warmup: u64,
    /// Tokens of the largest batch.
    pub max_tokens: usize,
    /// Tokens with a label, of the batch that has most.
    pub max_supervised: usize,
    /// Tokens of a step in the mean.
    pub tokens_per_step: f64,
}

impl RunLength {
    /// Lays out all epochs. Memory: one epoch's order at a time.
    pub fn new(options: &TrainOptions, data: &Dataset) -> Self {
        let (mut n_batches, mut max_tokens, mut max_supervised) = (Vec::new(), 0, 0);
        for epoch in 0..options.epochs {
            // Unshuffled epochs are alike.
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
            Warmup::Share(share) => (share * n_steps as f64).ceil() as u64,
        };
        let tokens_per_step = data.n_tokens() as f64 * options.epochs as f64 / all.max(1) as f64;
        Self { n_batches, n_steps, n_warmup, max_tokens, max_supervised, tokens_per_step }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learning_rates_go_up_and_down() {
        let of = |schedule: Schedule| -> Vec<f64> { (0..6).map(|step| schedule.share(step, 6, 2)).collect() };
        assert_eq!(of(Schedule::Linear), [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]);
        assert_eq!(of(Schedule::Constant), [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]);
        assert!((of(Schedule::Cosine)[4] - 0.5).abs() < 1e-12);
        assert_eq!(Schedule::Linear.share(0, 1, 0), 1.0);
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let said = |options: TrainOptions| options.check().unwrap_err().to_string();
        let default = TrainOptions::default;
        assert!(default().check().is_ok());
        assert_eq!(said(TrainOptions { epochs: 0, ..default() }), "epochs: at least 1 is needed");
        assert_eq!(said(TrainOptions { learning_rate: f64::NAN, ..default() }), "learning rate: positive is needed");
        assert_eq!(said(TrainOptions { betas: (0.9, 1.0), ..default() }), "betas: from 0 to below 1 is needed");
        assert_eq!(said(TrainOptions { clip: Some(0.0), ..default() }), "clip: positive is needed");
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
