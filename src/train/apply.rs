//! An adapter on a model that is loaded: the weights that a merge would write, without writing them.

use super::{
    TrainError,
    device::{Deltas, Device},
    model::{Linear, Model, anchored},
};
use crate::{
    adapter::{Adapter, AdapterError},
    checkpoint::{Checkpoint, Context},
};

impl<D: Device> Model<D> {
    /// Adds an adapter's deltas, times `scale`, to the weights: `round(original + delta * scale)`, bit for bit what a merge of
    /// this adapter alone writes.
    ///
    /// `base` is the checkpoint that the model was loaded from. Memory: the deltas of one matrix at a time.
    ///
    /// # Errors
    /// [`AdapterError::WrongBase`] where the adapter was made from other weights; a list of all targets that the model has not.
    pub fn apply(
        &mut self,
        ctx: &Context<'_>,
        device: &D,
        base: &Checkpoint,
        adapter: &Adapter,
        scale: f64,
    ) -> Result<(), TrainError> {
        self.check_targets(base, adapter.path(), adapter.targets())?;
        for linear in self.linears_mut() {
            linear.apply(ctx, device, base, adapter, scale as f32)?;
        }
        adapter.shard().unchanged()?;
        Ok(base.unchanged()?)
    }
}

impl<D: Device> Linear<D> {
    fn apply(
        &mut self,
        ctx: &Context<'_>,
        device: &D,
        base: &Checkpoint,
        adapter: &Adapter,
        scale: f32,
    ) -> Result<(), TrainError> {
        let (mut offsets, mut columns, mut originals, mut theta) = (vec![0], Vec::new(), Vec::new(), Vec::new());
        for part in &self.parts {
            let first = columns.len();
            let Some(target) = adapter.target(&part.name) else {
                offsets.resize(offsets.len() + part.rows.len(), first as u32);
                continue;
            };
            let deltas = adapter.read_rows(ctx, target, 0..target.layout.n_rows())?;
            let stored = anchored(ctx, base, target, &deltas.columns)?.ok_or_else(|| {
                AdapterError::other_base("the adapter", adapter.path(), &target.name, adapter.base(), base)
            })?;
            offsets.extend(deltas.columns.offsets()[1..].iter().map(|&end| (first + end) as u32));
            columns.extend_from_slice(deltas.columns.columns());
            theta.extend(deltas.values.iter().map(|value| value * scale));
            originals.extend(stored);
        }
        let nnz = columns.len();
        if nnz == 0 {
            return Ok(());
        }
        if u32::try_from(nnz).is_err() {
            return Err(TrainError::Usage(format!("{nnz} deltas of one matrix, at most 2^32 can be added")));
        }
        let mut on_device = device.weight(self.dtype, 1, nnz)?;
        device.write_rows(&mut on_device, 0, &originals)?;
        let mut deltas = Deltas {
            nnz,
            offsets: device.ids(&offsets)?,
            columns: device.ids(&columns)?,
            originals: on_device,
            theta: device.zeros(nnz)?,
            // Nothing is trained.
            grad: device.zeros(1)?,
            mean: device.zeros(1)?,
            variance: device.zeros(1)?,
        };
        device.write(&theta, &mut deltas.theta)?;
        Ok(device.patch(&mut self.weight, &deltas)?)
    }
}
