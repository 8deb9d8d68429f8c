//! Tensors that an adapter brings along.

use std::collections::BTreeMap;

use super::term::{Does, MergeTarget, Term};
use crate::{
    backend::replace_values,
    checkpoint::{Checkpoint, Context, Printable, Shard, TensorInfo},
    merge::{MergeError, factors::read_f32, ledger::LedgerAdded, source::Source},
    tensor::{Dtype, dtype_name, parse_dtype, widened},
};

/// A tensor that the base has not, or has in another size.
#[derive(Clone, Debug)]
pub(in crate::merge) struct Added<'a> {
    pub(in crate::merge) source: &'a Source,
    /// Where its values are.
    pub(in crate::merge) from: (&'a Shard, &'a TensorInfo),
    /// Its type in the checkpoint.
    pub(in crate::merge) dtype: Dtype,
    /// Which of the checkpoint's shards it belongs to.
    pub(in crate::merge) shard_index: usize,
    /// PEFT's `task_type` of its adapter.
    pub(in crate::merge) task: Option<String>,
    /// Type and shape of the base's tensor that it takes the place of.
    pub(in crate::merge) replaces: Option<(Dtype, Vec<u64>)>,
}

/// By name.
pub(in crate::merge) type AddedTensors<'a> = BTreeMap<String, Added<'a>>;

impl<'a> Added<'a> {
    /// The tensor that a target is, where one adapter holds it in full.
    pub(in crate::merge) fn of_full(target: &MergeTarget<'a>) -> Option<Self> {
        let [Term { source, does: Does::Full { shard, info } }] = target.terms[..] else { return None };
        let tensor = target.tensor;
        let (dtype, shard_index) = (tensor.info.dtype, tensor.shard_index);
        Some(Self { source, from: (shard, info), dtype, shard_index, task: None, replaces: None })
    }

    pub(in crate::merge) fn shape(&self) -> &'a [u64] {
        &self.from.1.shape
    }

    pub(in crate::merge) fn n_bytes(&self) -> u64 {
        self.from.1.n_elements() * (self.dtype.bitsize() as u64 / 8)
    }

    /// Whether the other is the same tensor of the same adapter.
    pub(in crate::merge) fn is_same_as(&self, other: &Self) -> bool {
        (self.source.id, self.shard_index, self.dtype) == (other.source.id, other.shard_index, other.dtype)
            && (self.shape(), &self.replaces) == (other.shape(), &other.replaces)
    }

    /// Its bytes in the checkpoint, one run after the other. Memory: a window.
    ///
    /// # Errors
    /// As [`Self::read`], and what `sink` returns.
    pub(in crate::merge) fn for_each_run(
        &self,
        ctx: &Context<'_>,
        name: &str,
        mut sink: impl FnMut(&[u8]) -> Result<(), MergeError>,
    ) -> Result<(), MergeError> {
        let (n, step) = (self.from.1.n_elements(), ctx.window_bytes() / 8);
        for start in (0..n).step_by(step as usize) {
            ctx.check()?;
            sink(&self.read(name, start, step.min(n - start))?)?;
        }
        Ok(())
    }

    /// Elements from `start` on, `n` of them, rounded to its type.
    ///
    /// # Errors
    /// Values that are infinite or NaN once they are rounded.
    fn read(&self, name: &str, start: u64, n: u64) -> Result<Vec<u8>, MergeError> {
        let values = read_f32(self.from.0, self.from.1, start..start + n)?;
        let mut bytes = vec![0; values.len() * self.dtype.bitsize() / 8];
        match replace_values(self.dtype, &mut bytes, &values).overflowed {
            0 => Ok(bytes),
            n_overflowed => {
                let n_columns = self.shape().last().copied().unwrap_or(1).max(1);
                let rounded = widened(self.dtype, &bytes);
                let at = start + rounded.iter().position(|value| !value.is_finite()).unwrap_or(0) as u64;
                Err(MergeError::Overflow {
                    path: self.source.path().to_owned(),
                    tensor: name.to_owned(),
                    row: at / n_columns,
                    column: at % n_columns,
                    n_overflowed,
                })
            }
        }
    }

    /// A line for reports.
    pub(in crate::merge) fn line(&self, name: &str) -> String {
        let line = format!("{} {:?} {}", Printable(name), self.shape(), dtype_name(self.dtype));
        match &self.replaces {
            Some((_, shape)) => format!("{line}, in place of {shape:?}"),
            None => line,
        }
    }
}

/// Whether two sets are the same.
pub(in crate::merge) fn same_added(some: &AddedTensors<'_>, others: &AddedTensors<'_>) -> bool {
    some.len() == others.len()
        && some.iter().zip(others).all(|((a, some), (b, others))| a == b && some.is_same_as(others))
}

/// The tensors of one shard.
pub(in crate::merge) fn added_of_shard<'s, 'a>(
    added: &'s AddedTensors<'a>,
    shard_index: usize,
) -> impl Iterator<Item = (&'s String, &'s Added<'a>)> + use<'s, 'a> {
    added.iter().filter(move |(_, added)| added.shard_index == shard_index)
}

/// The tensor that a ledger says was added; `sources` are its active adapters.
///
/// # Errors
/// What does not fit.
pub(in crate::merge) fn resolve_added<'a>(
    name: &str,
    recorded: &LedgerAdded,
    sources: &'a [Source],
    checkpoint: &Checkpoint,
) -> Result<Added<'a>, String> {
    let dtype = |name: &str| parse_dtype(name).ok_or_else(|| format!("unknown dtype {name:?} in its ledger"));
    let source = sources.get(recorded.adapter).ok_or("its ledger names an adapter that is not there")?;
    let from = source.kept_shard().and_then(|shard| Some((shard, shard.header().tensor(&recorded.tensor)?)));
    let from = from.ok_or_else(|| format!("its adapter has no tensor {:?}", recorded.tensor))?;
    let own = dtype(&recorded.dtype)?;
    let tensor = checkpoint.tensor(name).ok_or("there is no such tensor any more")?;
    let is_float = matches!(from.1.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16);
    if !is_float || (tensor.info.dtype, &tensor.info.shape) != (own, &from.1.shape) {
        return Err("the ledger, its adapter and the checkpoint disagree".to_owned());
    }
    let replaces = match &recorded.replaced {
        Some(replaced) => Some((dtype(&replaced.dtype)?, replaced.shape.clone())),
        None => None,
    };
    let task = recorded.task.clone();
    Ok(Added { source, from, dtype: own, shard_index: tensor.shard_index, task, replaces })
}
