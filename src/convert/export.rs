//! From an adapter of this program to foreign formats: what all of them share.

use std::path::Path;

use super::{ConvertError, ConvertReport, deltas::Deltas, npz, peft_write, published};
use crate::{
    adapter::Adapter,
    checkpoint::{Context, Existing},
    foreign::Format,
    weights::WeightMap,
};

/// Writes `adapter` at `output` in a foreign format.
///
/// The adapter's scale is multiplied into the deltas, as a merge does it. `base`, where it is given, tells how its weights are stored.
/// Memory: a run of rows.
///
/// # Errors
/// [`ConvertError::Unfit`] lists what the format cannot hold, [`ConvertError::NotLinear`] what PEFT would not load; nothing was written.
pub fn export(
    ctx: &Context<'_>,
    adapter: &Adapter,
    base: Option<&WeightMap<'_>>,
    format: Format,
    output: &Path,
    existing: Existing,
) -> Result<ConvertReport, ConvertError> {
    let deltas = Deltas { ctx, adapter };
    // Known before the output appears: nothing may fail after that.
    let id = adapter.id(ctx)?.to_string();
    ctx.observer.begin("converting", adapter.nnz());
    let mut report = match format {
        Format::NeuroAda => {
            return Err(ConvertError::Usage("the input is an adapter of this program already".to_owned()));
        }
        Format::Published => published::write(&deltas, output, existing)?,
        Format::Npz => npz::write(&deltas, output, existing)?,
        Format::Shira | Format::SuperTuning | Format::Spiel => {
            peft_write::write(&deltas, base, format, output, existing)?
        }
    };
    report.base = Some(adapter.base().name.clone());
    report.id = Some(id);
    Ok(report)
}
