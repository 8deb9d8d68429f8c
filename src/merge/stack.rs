//! The adapters that are in a checkpoint, and the originals beneath them.

use std::{collections::BTreeMap, fmt::Display, ops::Range, str::FromStr};

use super::{MergeError, ledger::Ledger};
use crate::{
    adapter::{Adapter, AdapterId, DeltaRows},
    backend::{Layer, union_columns},
    checkpoint::{Context, Printable, StateFolder},
    mask::{POSITION_BYTES, ROW_BYTES, TargetInfo},
    tensor::{RowColumns, dtype_name},
};

/// An adapter that is in a checkpoint, or is about to be.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) id: AdapterId,
    pub(super) scale: f64,
    pub(super) adapter: Adapter,
}

impl Active {
    /// The largest magnitude of a scaled delta on the tensor `name`; infinite before the adapter was read, none where it has no such
    /// target.
    pub(super) fn largest_delta(&self, name: &str) -> Option<f64> {
        let target = self.adapter.target(name)?;
        let largest = self.adapter.largest_delta(target).map_or(f64::INFINITY, f64::from);
        let scale = self.scale.abs();
        Some(match scale {
            0.0 => 0.0,
            // As the arithmetic has it, which may turn a delta of zero into a NaN.
            _ if (scale as f32).is_infinite() => f64::INFINITY,
            _ => largest * scale,
        })
    }
}

/// Active adapters in ascending order of id, and the ledger that keeps their originals.
#[derive(Debug, Default)]
pub(super) struct Stack {
    pub(super) active: Vec<Active>,
    /// None where nothing was ever merged, or where the ledger is still to be written.
    pub(super) ledger: Option<Ledger>,
}

/// The deltas of a run of rows of one tensor.
pub(super) struct StackRows {
    deltas: Vec<(DeltaRows, f64)>,
    /// Every column that some adapter touches.
    pub(super) touched: RowColumns,
}

impl StackRows {
    /// The deltas as the backend takes them.
    pub(super) fn layers(&self) -> Vec<Layer<'_>> {
        let layer = |i: usize| {
            let (rows, scale) = &self.deltas[i];
            Layer { columns: &rows.columns, values: &rows.values, scale: *scale }
        };
        (0..self.deltas.len()).map(layer).collect()
    }
}

impl Stack {
    /// The stack that a state folder records; empty where there is no ledger.
    ///
    /// Reads and checks the ledger and every adapter's copy, whole.
    ///
    /// # Errors
    /// [`MergeError::BadLedger`] where the ledger or a copy is not what was written.
    pub(super) fn open(ctx: &Context<'_>, state: &StateFolder) -> Result<Self, MergeError> {
        Ok(Self::open_ledger(ctx, state, StateFolder::LEDGER)?.unwrap_or_default())
    }

    /// The same for a ledger under another name, such as `ledger.new`; `None` where there is none.
    pub(super) fn open_ledger(ctx: &Context<'_>, state: &StateFolder, name: &str) -> Result<Option<Self>, MergeError> {
        Ledger::open(ctx, state, name)?.map(|ledger| Self::of_ledger(ctx, state, ledger)).transpose()
    }

    /// The stack that an open ledger of a state folder records. Reads and checks every adapter's copy, whole.
    ///
    /// # Errors
    /// [`MergeError::BadLedger`] where a copy is not what was written.
    pub(super) fn of_ledger(ctx: &Context<'_>, state: &StateFolder, ledger: Ledger) -> Result<Self, MergeError> {
        let path = ledger.path().to_owned();
        let bad = |what: String| MergeError::BadLedger { path: path.clone(), what };
        let mut active = Vec::new();
        for entry in &ledger.document().active {
            let id = AdapterId::from_str(&entry.id).map_err(|_| bad("an adapter's id is malformed".to_owned()))?;
            let copy = copy_name(&id);
            let bad_copy = |what: &str| {
                let path = state.adapters().path().join(&copy);
                MergeError::BadLedger { path, what: what.to_owned() }
            };
            let adapter = Adapter::open_own(&state.adapters(), &copy)?
                .ok_or_else(|| bad_copy("the copy of an adapter that was merged is missing"))?;
            if adapter.id(ctx)? != id {
                return Err(bad_copy("not the adapter that was merged: its content does not match its id"));
            }
            active.push(Active { id, scale: entry.scale, adapter });
        }
        if !active.is_sorted_by(|a, b| a.id < b.id) {
            return Err(bad("the active adapters are not in ascending order".to_owned()));
        }
        let stack = Self { active, ledger: Some(ledger) };
        stack.check_targets().map_err(bad)?;
        Ok(stack)
    }

    /// Ledger and adapters must name the same tensors, alike.
    fn check_targets(&self) -> Result<(), String> {
        let targets = self.targets()?;
        let document = self.ledger.as_ref().expect("called with a ledger").document();
        if targets.len() != document.targets.len() {
            return Err(format!(
                "the ledger has {} tensors, its adapters touch {}",
                document.targets.len(),
                targets.len()
            ));
        }
        for (name, target) in targets {
            let same = document.targets.get(name).is_some_and(|recorded| {
                recorded.dtype == dtype_name(target.dtype)
                    && recorded.shape == target.shape
                    && recorded.transposed == target.transposed
            });
            if !same {
                return Err(format!("tensor \"{}\": the ledger and its adapters disagree", Printable(name)));
            }
        }
        Ok(())
    }

    /// Every tensor that some adapter touches, by name.
    ///
    /// # Errors
    /// What two adapters disagree about.
    pub(super) fn targets(&self) -> Result<BTreeMap<&str, &TargetInfo>, String> {
        let mut targets: BTreeMap<&str, &TargetInfo> = BTreeMap::new();
        for Active { adapter, .. } in &self.active {
            for target in adapter.targets() {
                let first = *targets.entry(&target.name).or_insert(target);
                if (first.dtype, &first.shape, first.transposed) != (target.dtype, &target.shape, target.transposed) {
                    return Err(format!(
                        "tensor \"{}\": two adapters read it in different ways",
                        Printable(&target.name)
                    ));
                }
            }
        }
        Ok(targets)
    }

    /// What the magnitudes of the scaled deltas on one weight of the tensor `name` sum up to at most.
    pub(super) fn largest_sum(&self, name: &str) -> f64 {
        self.active.iter().filter_map(|active| active.largest_delta(name)).sum()
    }

    /// Ids and scales of the active adapters.
    pub(super) fn entries(&self) -> Vec<(AdapterId, f64)> {
        self.active.iter().map(|active| (active.id, active.scale)).collect()
    }
    /// The names that the copies of the active adapters have in the state folder.
    pub(super) fn copies(&self) -> Vec<String> {
        self.active.iter().map(|active| copy_name(&active.id)).collect()
    }
    /// Ids of the active adapters.
    pub(super) fn ids(&self) -> Vec<AdapterId> {
        self.active.iter().map(|active| active.id).collect()
    }

    /// Chosen columns per row of a tensor, over all adapters; for sizing blocks.
    pub(super) fn nnz(&self, name: &str) -> u64 {
        self.active.iter().filter_map(|active| active.adapter.target(name)).map(|target| target.nnz).sum()
    }

    fn with_target(&self, name: &str) -> impl Iterator<Item = (&Adapter, &TargetInfo)> {
        self.active.iter().filter_map(move |active| Some((&active.adapter, active.adapter.target(name)?)))
    }

    /// Bytes of memory that `rows` of the tensor `name` take at most while they are worked on.
    pub(super) fn rows_bytes(&self, ctx: &Context<'_>, name: &str, rows: &Range<u64>) -> u64 {
        self.with_target(name).map(|(adapter, target)| adapter.rows_bytes(ctx, target, rows)).sum()
    }

    /// The same for one row, the longest that there may be.
    pub(super) fn max_row_bytes(&self, name: &str) -> u64 {
        self.with_target(name).map(|(_, target)| target.max_positions(1) * POSITION_BYTES + ROW_BYTES).sum()
    }

    /// The deltas on `rows` of the tensor `name`, or `None` where no adapter touches the tensor.
    pub(super) fn rows(
        &self,
        ctx: &Context<'_>,
        name: &str,
        rows: &Range<u64>,
    ) -> Result<Option<StackRows>, MergeError> {
        let mut deltas = Vec::new();
        for Active { adapter, scale, .. } in &self.active {
            if let Some(target) = adapter.target(name) {
                deltas.push((adapter.read_rows(ctx, target, rows.clone())?, *scale));
            }
        }
        if deltas.is_empty() {
            return Ok(None);
        }
        let parts: Vec<&RowColumns> = deltas.iter().map(|(rows, _)| &rows.columns).collect();
        let touched = union_columns(&parts);
        Ok(Some(StackRows { deltas, touched }))
    }

    /// The columns that adapter `index` chose in `rows` of the tensor `name`, or `None` where it has no such target.
    pub(super) fn columns_of(&self, rows: &StackRows, name: &str, index: usize) -> Option<RowColumns> {
        self.active[index].adapter.target(name)?;
        let layer = self.active[..index].iter().filter(|active| active.adapter.target(name).is_some()).count();
        Some(rows.deltas[layer].0.columns.clone())
    }

    /// The originals of the positions that this stack touches in `rows`.
    pub(super) fn originals(&self, name: &str, rows: &Range<u64>, touched: &RowColumns) -> Result<Vec<u8>, MergeError> {
        let ledger = self.ledger.as_ref().expect("a stack with touched positions has a ledger");
        ledger.originals(name, rows.clone(), touched.nnz())
    }
}

/// The name of an adapter's copy in the state folder.
pub(super) fn copy_name(id: &impl Display) -> String {
    format!("{id}.safetensors")
}
