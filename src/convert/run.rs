//! One conversion, whatever the formats.

use std::path::Path;

use super::{ConvertError, ConvertReport, export};
use crate::{
    adapter::{Adapter, AdapterNotes, import},
    checkpoint::{Context, Existing, OutputKind, Printable, WorkFolder, check_output},
    foreign::{ForeignAdapter, Format},
    weights::WeightMap,
};

/// Reads the adapter at `input`, whatever its format, and writes it at `output` in the format `to`.
///
/// Foreign formats do not know their base, so `base` says which it is; an adapter of this program needs none. Between two
/// foreign formats an adapter of this program is made on the way, in a temporary folder beside the output.
///
/// # Errors
/// [`ConvertError`]; nothing was written.
pub fn convert(
    ctx: &Context<'_>,
    input: &Path,
    base: Option<&WeightMap<'_>>,
    to: Format,
    output: &Path,
    existing: Existing,
) -> Result<ConvertReport, ConvertError> {
    let Some(foreign) = ForeignAdapter::open(ctx, input)? else {
        // A packed adapter may need its base to know its columns.
        let adapter = match base {
            Some(base) => Adapter::open_with_base(ctx, input, base.checkpoint())?,
            None => Adapter::open(input)?,
        };
        if to == Format::NeuroAda {
            let what = format!("{}: is an adapter of this program already", Printable::path(input));
            return Err(ConvertError::Usage(what));
        }
        return export(ctx, &adapter, base, to, output, existing);
    };
    let no_base = || ConvertError::NoBase { path: input.to_owned(), format: foreign.format().name() };
    let base = base.ok_or_else(no_base)?;
    let notes = AdapterNotes::default();
    if to == Format::NeuroAda {
        return Ok(import(ctx, &foreign, base, base.checkpoint(), &notes, output, existing)?);
    }
    let kind = if to == Format::Npz { OutputKind::File } else { OutputKind::Folder };
    check_output(output, kind, existing)?;
    let folder = WorkFolder::beside(output)?;
    let between = folder.path().join("adapter.safetensors");
    let read = import(ctx, &foreign, base, base.checkpoint(), &notes, &between, Existing::Keep)?;
    let written = export(ctx, &Adapter::open(&between)?, Some(base), to, output, existing)?;
    Ok(read.then(written))
}
