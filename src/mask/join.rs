//! Joins the parts of a mask.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{BaseInfo, MaskError, MaskFile, MaskWriter, Partition, Recipe};
use crate::checkpoint::{Context, Existing, Printable};

/// The result of a join.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct JoinReport {
    /// The name of the checkpoint that the parts were made from.
    pub base: String,
    /// Number of parts.
    pub n_parts: usize,
    /// Number of targets of all parts.
    pub n_targets: usize,
    /// Number of rows.
    pub n_rows: u64,
    /// Number of chosen entries.
    pub n_chosen: u64,
}

/// Writes the mask that [`create_mask`](super::create_mask) would have written without a partition, from all its parts
/// in any order: the same bytes.
///
/// Reads the parts once and validates their columns. Memory: one window, and the headers.
///
/// # Errors
/// [`MaskError::Parts`] if a part is missing, duplicate, or of another mask; nothing is written.
pub fn join_masks(
    ctx: &Context<'_>,
    parts: &[PathBuf],
    output: &Path,
    existing: Existing,
) -> Result<JoinReport, MaskError> {
    let parts: Vec<MaskFile> = parts.iter().map(|path| MaskFile::open(path)).collect::<Result<_, _>>()?;
    let (recipe, base) = agree(&parts)?;
    let mut targets: BTreeMap<&str, (&MaskFile, usize)> = BTreeMap::new();
    for part in &parts {
        for (i, target) in part.targets().iter().enumerate() {
            if let Some((other, _)) = targets.insert(&target.name, (part, i)) {
                let what =
                    format!("target \"{}\" is in {} too", Printable(&target.name), Printable::path(other.path()));
                return Err(MaskError::Parts { path: part.path().to_owned(), what });
            }
        }
    }
    let mut writer = MaskWriter::create(output, existing)?;
    ctx.observer.begin("joining", parts.iter().map(|part| part.shard().file_bytes()).sum());
    let mut report =
        JoinReport { base: base.name.clone(), n_parts: parts.len(), n_targets: targets.len(), n_rows: 0, n_chosen: 0 };
    for (part, i) in targets.into_values() {
        let target = &part.targets()[i];
        writer.copy_target(ctx, part, target)?;
        report.n_rows += target.layout.n_rows();
        report.n_chosen += target.nnz;
    }
    for part in &parts {
        part.shard().unchanged()?;
    }
    writer.finish(ctx, &recipe, &base)?;
    Ok(report)
}

/// The recipe and base of the whole mask, on which all parts must agree.
fn agree(parts: &[MaskFile]) -> Result<(Recipe, BaseInfo), MaskError> {
    let refuse = |part: &MaskFile, what: String| Err(MaskError::Parts { path: part.path().to_owned(), what });
    let whole = |part: &MaskFile| Recipe { partition: None, ..part.recipe().clone() };
    let Some(first) = parts.first() else {
        return Err(MaskError::Usage("there are no parts to join".to_owned()));
    };
    let mut found: BTreeMap<usize, &MaskFile> = BTreeMap::new();
    for part in parts {
        let Some(partition) = part.recipe().partition else {
            return refuse(part, "it is a complete mask, not a part of one".to_owned());
        };
        let name = Printable::path(first.path());
        if Some(partition.count()) != first.recipe().partition.map(Partition::count) {
            return refuse(part, format!("it is part {partition}, but {name} has another number of parts"));
        }
        if whole(part) != whole(first) {
            return refuse(part, format!("its recipe differs from that of {name}"));
        }
        if part.base() != first.base() {
            return refuse(part, format!("it was made from {}, but {name} from {}", part.base(), first.base()));
        }
        if let Some(other) = found.insert(partition.number(), part) {
            return refuse(part, format!("it is part {partition}, and so is {}", Printable::path(other.path())));
        }
    }
    let count = first.recipe().partition.map_or(0, Partition::count);
    let missing: Vec<String> =
        (1..=count).filter(|number| !found.contains_key(number)).map(|number| format!("{number}/{count}")).collect();
    match missing.len() {
        0 => Ok((whole(first), first.base().clone())),
        1 => refuse(first, format!("part {} is missing", missing[0])),
        n => refuse(first, format!("{n} parts are missing: {}", missing.join(", "))),
    }
}

impl MaskWriter {
    /// Copies a target of another mask; validates the columns and keeps the anchor.
    pub(super) fn copy_target(
        &mut self,
        ctx: &Context<'_>,
        from: &MaskFile,
        target: &super::TargetInfo,
    ) -> Result<(), MaskError> {
        /// Positions validated at a time.
        const POSITIONS: u64 = 1 << 20;
        for rows in from.row_ranges(ctx, target, POSITIONS)? {
            from.read_columns(ctx, target, rows)?;
        }
        Ok(self.0.copy_target(ctx, &from.file, target)?)
    }
}
