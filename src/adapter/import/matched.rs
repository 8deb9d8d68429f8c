//! Which stored tensor each part of a foreign adapter is for.

use crate::{
    adapter::AdapterError,
    checkpoint::{CheckpointError, Printable, TensorRef},
    foreign::{ForeignAdapter, ForeignTarget, Rounding},
    tensor::{Dtype, RowLayout},
    weights::{Unplaced, WeightMap},
};

/// A target and the base's tensor that it is for.
pub(super) struct Matched<'a> {
    pub(super) target: &'a ForeignTarget,
    pub(super) tensor: TensorRef<'a>,
    pub(super) layout: RowLayout,
    /// The type that the deltas are stored in.
    pub(super) values: Dtype,
}

/// Finds the base's tensor of every target.
///
/// # Errors
/// [`AdapterError::Unmatched`] lists all that the base does not have, or not as matrices of the right shape.
pub(super) fn matched<'a>(foreign: &'a ForeignAdapter, map: &WeightMap<'a>) -> Result<Vec<Matched<'a>>, AdapterError> {
    let mut problems = Vec::new();
    let mut matched: Vec<Matched<'_>> = Vec::new();
    for target in foreign.targets() {
        match match_one(target, map) {
            Ok(found) => matched.push(found),
            Err(what) => problems.push(format!("\"{}\": {what}", Printable(&target.name))),
        }
    }
    matched.sort_by(|a, b| a.tensor.info.name.cmp(&b.tensor.info.name));
    for pair in matched.windows(2).filter(|pair| pair[0].tensor.info.name == pair[1].tensor.info.name) {
        let [a, b] = [pair[0].target, pair[1].target].map(|target| Printable(&target.name).to_string());
        problems.push(format!("\"{b}\": the base has one tensor for it and for \"{a}\""));
    }
    if problems.is_empty() {
        return Ok(matched);
    }
    Err(AdapterError::Unmatched {
        path: foreign.path().to_owned(),
        base: map.checkpoint().name(),
        n_targets: foreign.targets().len(),
        problems,
    })
}

fn match_one<'a>(target: &'a ForeignTarget, map: &WeightMap<'a>) -> Result<Matched<'a>, String> {
    let fits = |tensor: TensorRef<'_>| target.shape.as_ref().is_none_or(|shape| *shape == tensor.info.shape);
    let tensor = match map.find(&target.name, fits) {
        Ok(found) => found.tensor,
        Err(Unplaced::Shape { found, .. }) => {
            let made_for = target.shape.as_deref().unwrap_or_default();
            return Err(format!("the deltas were made for {made_for:?}, the base has {found:?}"));
        }
        Err(unplaced) => return Err(map.explain(&target.name, &unplaced)),
    };
    let layout = tensor.rows(false).map_err(|e| match e {
        CheckpointError::BadTensor { what, .. } => what,
        other => other.to_string(),
    })?;
    let stored = match target.values.dtype {
        Dtype::F64 => Dtype::F32,
        other => other,
    };
    let values = match (target.rounding, tensor.info.dtype) {
        (Rounding::ToWeight, weight @ (Dtype::BF16 | Dtype::F16)) => weight,
        _ => stored,
    };
    Ok(Matched { target, tensor, layout, values })
}
