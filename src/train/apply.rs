//! Applies an adapter to a loaded model: the weights that a merge would write, without writing them.

use super::{
    TrainError,
    attach::{Entries, Targets, verified_originals},
    device::{Deltas, Device},
    model::{Linear, Model, Part},
};
use crate::{
    adapter::{Adapter, AdapterError},
    checkpoint::{Checkpoint, Context},
};

impl<D: Device> Model<D> {
    /// Adds an adapter's deltas, times `scale`, to weights and biases: `round(original + delta * scale)`, bit for bit
    /// what a merge of this adapter alone writes.
    ///
    /// `base` is the checkpoint that the model was loaded from. Memory: the deltas of one matrix at a time.
    ///
    /// # Errors
    /// [`AdapterError::WrongBase`] if the adapter was made from other weights; otherwise a list of all targets that
    /// the model does not have.
    pub fn apply(
        &mut self,
        ctx: &Context<'_>,
        device: &D,
        base: &Checkpoint,
        adapter: &Adapter,
        scale: f64,
    ) -> Result<(), TrainError> {
        self.check_targets(base, adapter.path(), adapter.targets(), Targets::WeightsAndBiases)?;
        let source = Source { ctx, device, base, adapter, scale: scale as f32 };
        for linear in self.linears_mut() {
            source.apply(linear)?;
        }
        adapter.shard().unchanged()?;
        Ok(base.unchanged()?)
    }
}

/// The source of the deltas.
struct Source<'a, D: Device> {
    ctx: &'a Context<'a>,
    device: &'a D,
    base: &'a Checkpoint,
    adapter: &'a Adapter,
    scale: f32,
}

impl<D: Device> Source<'_, D> {
    fn apply(&self, linear: &mut Linear<D>) -> Result<(), TrainError> {
        if let Some(deltas) = self.deltas(Entries::new(linear.dtype), &linear.parts)? {
            self.device.patch(&mut linear.weight, &deltas)?;
        }
        if let Some(bias) = &mut linear.bias
            && linear.bias_parts.iter().any(|part| self.adapter.target(&part.name).is_some())
        {
            let entries = Entries::of_biases(self.base, &linear.bias_parts)?;
            if let Some(deltas) = self.deltas(entries, &linear.bias_parts)? {
                self.device.patch_bias(bias, &deltas)?;
            }
        }
        Ok(())
    }

    /// The scaled deltas of these parts.
    fn deltas(&self, mut entries: Entries, parts: &[Part]) -> Result<Option<Deltas<D>>, TrainError> {
        let Self { ctx, device, base, adapter, scale } = self;
        let mut theta = Vec::new();
        for part in parts {
            let Some(target) = adapter.target(&part.name) else {
                entries.skip(part);
                continue;
            };
            let deltas = adapter.read_rows(ctx, target, 0..target.layout.n_rows())?;
            let stored = verified_originals(ctx, base, target, &deltas.columns)?.ok_or_else(|| {
                AdapterError::other_base("the adapter", adapter.path(), &target.name, adapter.base(), base)
            })?;
            entries.push(part, &deltas.columns, stored);
            theta.extend(deltas.values.iter().map(|value| value * scale));
        }
        // Nothing is trained here, so no optimizer state is needed.
        let Some(mut deltas) = entries.upload(*device, 1)? else { return Ok(None) };
        device.write(&theta, &mut deltas.theta)?;
        Ok(Some(deltas))
    }
}
