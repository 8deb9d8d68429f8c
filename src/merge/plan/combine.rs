//! What several adapters do to one tensor, together.

use std::{collections::btree_map::Entry, ops::Range};

use super::{Does, MergeTarget, Targets};
use crate::{adapter::AdapterId, checkpoint::Printable, weights::Columns};

/// The targets of `some` and `others`, whose adapters are different ones.
///
/// # Errors
/// What cannot be combined, naming the tensor: a replacement beside any other change of one element; adapters that read a tensor in
/// different ways.
pub(in crate::merge) fn combine<'a>(some: Targets<'a>, others: Targets<'a>) -> Result<Targets<'a>, String> {
    let mut all = some;
    for (name, target) in others {
        match all.entry(name) {
            Entry::Vacant(entry) => _ = entry.insert(target),
            Entry::Occupied(mut entry) => {
                if entry.get().n_columns != target.n_columns {
                    return Err(format!("\"{}\": two adapters read it as different matrices", Printable(name)));
                }
                entry.get_mut().terms.extend(target.terms);
            }
        }
    }
    for target in all.values_mut() {
        target.terms.sort_by_key(|term| term.source.id);
        check(target).map_err(|what| format!("\"{}\": {what}", Printable(target.name())))?;
    }
    Ok(all)
}

/// Fails where the terms of a target cannot be added up.
fn check(target: &MergeTarget<'_>) -> Result<(), String> {
    refuse_shared_rows(target)?;
    let has_full = target.terms.iter().any(|term| matches!(term.does, Does::Full { .. }));
    if has_full && target.n_sources() > 1 {
        return Err("one adapter holds it in full, another adds to it; merge one of them".to_owned());
    }
    let mut layouts = target.sparse().map(|(.., sparse)| sparse.layout);
    if let Some(first) = layouts.next()
        && layouts.any(|layout| layout != first)
    {
        return Err("two adapters read it in different ways: the rows of one are the columns of the other".to_owned());
    }
    refuse_overlaps(target)
}

/// A row that one adapter replaces may have nothing else on it.
fn refuse_shared_rows(target: &MergeTarget<'_>) -> Result<(), String> {
    for (index, term) in target.terms.iter().enumerate() {
        let Does::Rows(replaced) = &term.does else { continue };
        for (_, other) in target.terms.iter().enumerate().filter(|(at, _)| *at != index) {
            let shared = replaced.places.iter().map(|(row, _)| *row).find(|&row| match &other.does {
                Does::Rows(others) => !others.among(&(row..row + 1)).is_empty(),
                Does::LowRank(product) => product.rows().contains(&row),
                Does::Bias { .. } | Does::Full { .. } => true,
                // Known when their columns are read.
                Does::Sparse { .. } => false,
            });
            if let Some(row) = shared {
                return Err(format!("row {row} is replaced, and changed by something else besides; merge one of them"));
            }
        }
    }
    Ok(())
}

/// Of one adapter, no two modules may lie on the same weights.
fn refuse_overlaps(target: &MergeTarget<'_>) -> Result<(), String> {
    let mut parts: Vec<(AdapterId, Range<u64>, Columns)> = Vec::new();
    for term in &target.terms {
        match &term.does {
            Does::LowRank(product) => match product.magnitude {
                Some(magnitude) if magnitude.of_columns && product.n_rows != target.n_rows => {
                    return Err("magnitudes of columns need the whole weight".to_owned());
                }
                Some(_) if !product.columns.is_all() => {
                    return Err("magnitudes of rows need whole rows".to_owned());
                }
                _ => parts.push((term.source.id, product.rows(), product.columns)),
            },
            Does::Sparse { .. } | Does::Full { .. } | Does::Rows(_) => {}
            Does::Bias { .. } => parts.push((term.source.id, 0..target.n_rows, Columns::all(target.n_columns))),
        }
    }
    parts.sort_by_key(|(source, rows, _)| (*source, rows.start));
    for (at, (source, rows, columns)) in parts.iter().enumerate() {
        let mut after = parts[at + 1..].iter().take_while(|(other, next, _)| other == source && next.start < rows.end);
        if after.any(|(_, _, others)| columns.meets(*others)) {
            return Err("two modules of one adapter lead to it".to_owned());
        }
    }
    Ok(())
}
