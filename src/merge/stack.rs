//! The adapters that are in a checkpoint, what they do to it, and the originals beneath them.

use std::{collections::BTreeMap, ops::Range};

use super::{
    AdapterReading, MergeError,
    ledger::{Kept, Ledger, LedgerTarget},
    plan::{
        AddedTensors, Does, MergeTarget, ReplacedRows, Targets, Term, combine, plan, resolve, resolve_added, same_bytes,
    },
    source::Source,
};
use crate::{
    adapter::{Adapter, AdapterId, DeltaRows},
    backend::{PatchCounts, ScaledDeltas, merged_values, replace_values, union_columns},
    checkpoint::{Checkpoint, Context, Printable, Shard, StateFolder, TensorInfo, TensorRef},
    mask::{POSITION_BYTES, ROW_BYTES, TargetInfo},
    tensor::{Dtype, RowColumns},
    weights::WeightMap,
};

/// What a state folder remembers: a ledger and the copies of its adapters.
#[derive(Debug, Default)]
pub(super) struct Remembered {
    /// None where nothing was ever merged.
    pub(super) ledger: Option<Ledger>,
    /// Its active adapters, in ascending order of id.
    pub(super) sources: Vec<Source>,
}

impl Remembered {
    /// What a state folder remembers; nothing where there is no ledger. Reads and checks the ledger and every adapter's copy.
    ///
    /// # Errors
    /// [`MergeError::BadLedger`] where the ledger or a copy is not what was written.
    pub(super) fn open(ctx: &Context<'_>, state: &StateFolder) -> Result<Self, MergeError> {
        match Ledger::of_state(ctx, state)? {
            Some(ledger) => Self::of_ledger(ctx, state, ledger),
            None => Ok(Self::default()),
        }
    }

    /// What an open ledger of a state folder remembers. Reads and checks every adapter's copy, whole.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(super) fn of_ledger(ctx: &Context<'_>, state: &StateFolder, ledger: Ledger) -> Result<Self, MergeError> {
        let active = &ledger.document().active;
        let sources =
            active.iter().map(|entry| Source::open_copy(ctx, state, entry)).collect::<Result<Vec<_>, MergeError>>()?;
        if !sources.is_sorted_by(|a, b| a.id < b.id) {
            let what = "the active adapters are not in ascending order".to_owned();
            return Err(MergeError::BadLedger { path: ledger.path().to_owned(), what });
        }
        Ok(Self { ledger: Some(ledger), sources })
    }
}

/// Active adapters in ascending order of id, what they do to each tensor, and the ledger that keeps the originals.
#[derive(Debug, Default)]
pub(super) struct Stack<'a> {
    pub(super) active: Vec<&'a Source>,
    pub(super) targets: Targets<'a>,
    /// Tensors that adapters bring along.
    pub(super) added: AddedTensors<'a>,
    /// None where nothing was ever merged, or where the ledger is still to be written.
    pub(super) ledger: Option<&'a Ledger>,
}

/// The deltas of a run of rows of one tensor of which single elements change.
pub(super) struct StackRows {
    deltas: Vec<(AdapterId, DeltaRows, f64)>,
    /// Rows that stand in for the originals: which of these rows, and their values.
    replaced: Vec<(usize, Vec<f32>)>,
    /// Every column that some adapter touches.
    pub(super) touched: RowColumns,
}

impl StackRows {
    /// The merged elements at the touched columns, from the originals there, and what became of them.
    pub(super) fn merged(&self, dtype: Dtype, originals: &[u8]) -> (Vec<u8>, PatchCounts) {
        let (mut merged, mut counts) = merged_values(dtype, &self.layers(), &self.touched, originals);
        let width = dtype.bitsize() / 8;
        for (row, values) in &self.replaced {
            let range = self.touched.row_range(*row);
            let (start, end) = (range.start * width, range.end * width);
            counts.add(replace_values(dtype, &mut merged[start..end], values));
        }
        (merged, counts)
    }

    /// The deltas as the backend takes them.
    fn layers(&self) -> Vec<ScaledDeltas<'_>> {
        let deltas = self.deltas.iter();
        deltas
            .map(|(_, rows, scale)| ScaledDeltas { columns: &rows.columns, values: &rows.values, scale: *scale })
            .collect()
    }
    /// The columns that an adapter chose.
    pub(super) fn columns_of(&self, id: AdapterId) -> Option<&RowColumns> {
        self.deltas.iter().find(|(of, ..)| *of == id).map(|(_, rows, _)| &rows.columns)
    }
}

impl<'a> Stack<'a> {
    /// The stack that a state folder of `checkpoint` remembers. `base` has the originals of which an old record kept hashes.
    ///
    /// # Errors
    /// [`MergeError::BadLedger`] where ledger and adapters disagree, [`MergeError::Unmatched`] and [`MergeError::Refused`] where the
    /// checkpoint does not have the tensors any more.
    pub(super) fn of(
        remembered: &'a Remembered,
        checkpoint: &'a Checkpoint,
        base: Option<&Checkpoint>,
    ) -> Result<Self, MergeError> {
        let Some(ledger) = &remembered.ledger else { return Ok(Self::default()) };
        let active = remembered.sources.iter().collect();
        let targets = match ledger.is_old_record() {
            true => plan_again(ledger, &remembered.sources, checkpoint, base)?,
            false => recorded_targets(ledger, &remembered.sources, checkpoint)?,
        };
        let added = recorded_added(ledger, &remembered.sources, checkpoint)?;
        Ok(Self { active, targets, added, ledger: Some(ledger) })
    }

    /// The same; where an old record does not say what its adapters do, and only the base could tell, tensors without terms.
    ///
    /// # Errors
    /// As [`Self::of`].
    pub(super) fn of_or_unplaced(
        remembered: &'a Remembered,
        checkpoint: &'a Checkpoint,
        base: Option<&Checkpoint>,
    ) -> Result<Self, MergeError> {
        let ledger = match (Self::of(remembered, checkpoint, base), &remembered.ledger) {
            (Err(MergeError::NeedsBase { .. }), Some(ledger)) => ledger,
            (opened, _) => return opened,
        };
        let mut targets = Targets::new();
        for (name, recorded) in &ledger.document().targets {
            let tensor = stored(ledger, checkpoint, name)?;
            let n_columns = recorded.n_columns.max(1);
            let n_rows = tensor.info.n_elements() / n_columns;
            targets.insert(&tensor.info.name, MergeTarget { tensor, n_rows, n_columns, terms: Vec::new() });
        }
        let added = recorded_added(ledger, &remembered.sources, checkpoint)?;
        Ok(Self { active: remembered.sources.iter().collect(), targets, added, ledger: Some(ledger) })
    }

    /// This stack without the adapters `removed`, and with `added`, which touch `new`.
    ///
    /// # Errors
    /// [`MergeError::Refused`] where they cannot be combined.
    pub(super) fn changed(
        &self,
        checkpoint: &Checkpoint,
        removed: &[AdapterId],
        added: impl Iterator<Item = &'a Source>,
        (new, new_tensors): (Targets<'a>, AddedTensors<'a>),
    ) -> Result<Self, MergeError> {
        let stays = |source: &Source| !removed.contains(&source.id);
        let mut left = Targets::new();
        for (name, target) in &self.targets {
            let mut target = target.clone();
            target.terms.retain(|term| stays(term.source));
            if !target.terms.is_empty() {
                left.insert(name, target);
            }
        }
        let refused = |what: String| MergeError::Refused { path: checkpoint.root().to_owned(), what };
        let targets = combine(left, new).map_err(refused)?;
        let mut all = self.added.clone();
        all.retain(|_, added| stays(added.source));
        for (name, added) in new_tensors {
            if let Some(other) = all.insert(name.clone(), added) {
                let (name, id) = (Printable(&name), other.source.id.short());
                return Err(refused(format!("\"{name}\": adapter {id} brought this tensor along already")));
            }
        }
        let shared = all.iter().find(|(name, _)| targets.contains_key(name.as_str()));
        if let Some((name, added)) = shared {
            let (name, id) = (Printable(name), added.source.id.short());
            let what = format!("\"{name}\": adapter {id} adds this tensor, and another adapter changes it");
            return Err(refused(format!("{what}: take one of them")));
        }
        let mut active: Vec<&'a Source> =
            self.active.iter().copied().filter(|source| stays(source)).chain(added).collect();
        active.sort_by_key(|source| source.id);
        Ok(Self { active, targets, added: all, ledger: None })
    }

    /// Ids of the active adapters.
    pub(super) fn ids(&self) -> Vec<AdapterId> {
        self.active.iter().map(|source| source.id).collect()
    }
    /// The names that the copies of the active adapters have in the state folder.
    pub(super) fn copies(&self) -> Vec<String> {
        self.active.iter().map(|source| source.copy_name()).collect()
    }
    /// How many tensors each active adapter touches.
    pub(super) fn n_tensors(&self) -> Vec<usize> {
        let mut counts: BTreeMap<AdapterId, usize> = BTreeMap::new();
        for target in self.targets.values() {
            for terms in target.terms.chunk_by(|a, b| a.source.id == b.source.id) {
                *counts.entry(terms[0].source.id).or_default() += 1;
            }
        }
        for added in self.added.values() {
            *counts.entry(added.source.id).or_default() += 1;
        }
        self.active.iter().map(|source| counts.get(&source.id).copied().unwrap_or(0)).collect()
    }

    fn sparse_of(&self, name: &str) -> impl Iterator<Item = (&'a Source, &'a Adapter, &'a TargetInfo)> {
        self.targets.get(name).into_iter().flat_map(MergeTarget::sparse)
    }

    /// Chosen columns per row of a tensor, over all adapters; for sizing blocks.
    pub(super) fn nnz(&self, name: &str) -> u64 {
        let replaced = self.replaced_of(name).map(|rows| rows.info.n_elements());
        self.sparse_of(name).map(|(.., target)| target.nnz).chain(replaced).sum()
    }

    fn replaced_of(&self, name: &str) -> impl Iterator<Item = &ReplacedRows<'a>> {
        self.targets.get(name).into_iter().flat_map(MergeTarget::replaced).map(|(_, rows)| rows)
    }
    /// Bytes of memory that `rows` of the tensor `name` take at most while single elements of them are worked on.
    pub(super) fn rows_bytes(&self, ctx: &Context<'_>, name: &str, rows: &Range<u64>) -> u64 {
        let n_columns = self.targets.get(name).map_or(0, |target| target.n_columns);
        let replaced =
            self.replaced_of(name).map(|replaced| replaced.among(rows).len() as u64 * n_columns * POSITION_BYTES);
        self.sparse_of(name).map(|(_, adapter, target)| adapter.rows_bytes(ctx, target, rows)).chain(replaced).sum()
    }
    /// The same for one row, the longest that there may be.
    pub(super) fn max_row_bytes(&self, name: &str) -> u64 {
        let n_columns = self.targets.get(name).map_or(0, |target| target.n_columns);
        let replaced = self.replaced_of(name).map(|_| n_columns * POSITION_BYTES + ROW_BYTES);
        let sparse = self.sparse_of(name).map(|(.., target)| target.max_positions(1) * POSITION_BYTES + ROW_BYTES);
        sparse.chain(replaced).sum()
    }

    /// The deltas on `rows` of the tensor `name`, or `None` where no adapter chose elements of it.
    pub(super) fn rows(
        &self,
        ctx: &Context<'_>,
        name: &str,
        rows: &Range<u64>,
    ) -> Result<Option<StackRows>, MergeError> {
        let mut deltas = Vec::new();
        for (source, adapter, target) in self.sparse_of(name) {
            deltas.push((source.id, adapter.read_rows(ctx, target, rows.clone())?, source.scale));
        }
        let mut replaced = Vec::new();
        for rows_of in self.replaced_of(name) {
            for &(row, of_tensor) in rows_of.among(rows) {
                replaced.push(((row - rows.start) as usize, rows_of.read(of_tensor)?));
            }
        }
        replaced.sort_by_key(|(row, _)| *row);
        let any_rows = self.replaced_of(name).next().is_some();
        if deltas.is_empty() && !any_rows {
            return Ok(None);
        }
        let whole_rows = any_rows.then(|| whole_rows((rows.end - rows.start) as usize, &replaced));
        let of_deltas = deltas.iter().map(|(_, rows, _): &(_, DeltaRows, _)| &rows.columns);
        let parts: Vec<&RowColumns> = of_deltas.chain(&whole_rows).collect();
        let touched = union_columns(&parts);
        for (row, _) in &replaced {
            if deltas.iter().any(|(_, deltas, _)| !deltas.columns.row(*row).is_empty()) {
                return Err(MergeError::SharedRow { tensor: name.to_owned(), row: rows.start + *row as u64 });
            }
        }
        Ok(Some(StackRows { deltas, replaced, touched }))
    }

    /// The original of a tensor that the ledger keeps whole.
    pub(super) fn whole(&self, name: &str) -> Option<(&'a Shard, &'a TensorInfo)> {
        self.ledger?.whole(name)
    }
    /// What the ledger keeps of a tensor.
    pub(super) fn kept(&self, name: &str) -> Option<&'a Kept> {
        self.ledger?.kept(name)
    }
}

/// All columns of the rows that are replaced, which ascend, and none of the others.
fn whole_rows(n_rows: usize, replaced: &[(usize, Vec<f32>)]) -> RowColumns {
    let mut columns = RowColumns::default();
    let mut next = replaced.iter().peekable();
    let all: Vec<u32> = next.peek().map_or_else(Vec::new, |(_, values)| (0..values.len() as u32).collect());
    for row in 0..n_rows {
        let is_replaced = next.next_if(|(replaced, _)| *replaced == row).is_some();
        columns.push_row(if is_replaced { &all } else { &[] });
    }
    columns
}

/// The targets of a ledger, whose places are recorded; in version 1 they are the adapters' own names.
fn recorded_targets<'a>(
    ledger: &'a Ledger,
    sources: &'a [Source],
    checkpoint: &'a Checkpoint,
) -> Result<Targets<'a>, MergeError> {
    let mut targets = Targets::new();
    let bad = |name: &str, what: &str| {
        let what = format!("tensor \"{}\": {what}", Printable(name));
        MergeError::BadLedger { path: ledger.path().to_owned(), what }
    };
    for (name, recorded) in &ledger.document().targets {
        let tensor = stored(ledger, checkpoint, name)?;
        let target = match recorded.terms.is_empty() {
            true => by_name(tensor, recorded.n_columns, sources),
            false => resolve(tensor, recorded.n_columns, &recorded.terms, sources).map_err(|what| bad(name, &what))?,
        };
        let fits = match &recorded.kept {
            Kept::Positions(kept) => target.positions().is_some_and(|layout| layout.transposed == kept.transposed),
            Kept::Hash(_) | Kept::Whole(_) => true,
        };
        if target.terms.is_empty() || !fits {
            return Err(bad(name, "the ledger and its adapters disagree"));
        }
        targets.insert(tensor.info.name.as_str(), target);
    }
    let n_sparse: usize = sources.iter().filter_map(|source| Some(source.sparse()?.targets().len())).sum();
    let n_terms: usize = targets.values().map(|target| target.sparse().count()).sum();
    if n_terms < n_sparse {
        let what = format!("its adapters touch {n_sparse} tensors, it speaks of {n_terms}");
        return Err(MergeError::BadLedger { path: ledger.path().to_owned(), what });
    }
    Ok(targets)
}

/// The tensors that a ledger says were added.
fn recorded_added<'a>(
    ledger: &Ledger,
    sources: &'a [Source],
    checkpoint: &Checkpoint,
) -> Result<AddedTensors<'a>, MergeError> {
    let mut all = AddedTensors::new();
    for (name, recorded) in &ledger.document().added {
        let added = resolve_added(name, recorded, sources, checkpoint);
        all.insert(name.clone(), added.map_err(|what| about(checkpoint, name, &what))?);
    }
    Ok(all)
}

/// The stored tensor that a ledger speaks of.
fn stored<'a>(ledger: &Ledger, checkpoint: &'a Checkpoint, name: &str) -> Result<TensorRef<'a>, MergeError> {
    let tensor = checkpoint.tensor(name).ok_or_else(|| "there is no such tensor any more".to_owned());
    let found = tensor.and_then(|tensor| ledger.check_stored(tensor).map(|()| tensor));
    found.map_err(|what| about(checkpoint, name, &what))
}

/// A refusal that is about one tensor.
fn about(checkpoint: &Checkpoint, name: &str, what: &str) -> MergeError {
    let what = format!("\"{}\": {what}", Printable(name));
    MergeError::Refused { path: checkpoint.root().to_owned(), what }
}

/// What sparse adapters do to the tensor that has their targets' name.
fn by_name<'a>(tensor: TensorRef<'a>, n_columns: u64, sources: &'a [Source]) -> MergeTarget<'a> {
    let mut target =
        MergeTarget { tensor, n_rows: tensor.info.n_elements() / n_columns.max(1), n_columns, terms: Vec::new() };
    for source in sources {
        let Some(adapter) = source.sparse() else { continue };
        let own = adapter.target(&tensor.info.name);
        if let Some(own) = own.filter(|own| own.dtype == tensor.info.dtype && own.shape == tensor.info.shape) {
            target.terms.push(Term { source, does: Does::Sparse { adapter, target: own } });
        }
    }
    target
}

/// The targets of an old record, which does not say them.
fn plan_again<'a>(
    ledger: &Ledger,
    sources: &'a [Source],
    checkpoint: &'a Checkpoint,
    base: Option<&Checkpoint>,
) -> Result<Targets<'a>, MergeError> {
    let reading: &AdapterReading = &ledger.document().reading;
    let map = WeightMap::new(checkpoint, reading.answers())?;
    let is_original = |tensor: TensorRef<'a>, other: (&Shard, &TensorInfo)| {
        let name = &tensor.info.name;
        let stored = match ledger.kept(name) {
            None => Some((tensor.shard, tensor.info)),
            Some(Kept::Whole(_)) => ledger.whole(name),
            Some(_) => {
                let found = base.and_then(|base| base.tensor(name));
                if base.is_none() {
                    let (path, base) = (checkpoint.root().to_owned(), ledger.document().base.clone());
                    return Err(MergeError::NeedsBase { path, base });
                }
                found.map(|found| (found.shard, found.info))
            }
        };
        Ok(match stored {
            Some(stored) if stored.1.is_like(other.1) => same_bytes(stored, other)?,
            _ => false,
        })
    };
    let found = plan(&map, sources.iter(), reading, &is_original)?;
    let targets = combine(found.targets, Targets::new())
        .map_err(|what| MergeError::Refused { path: checkpoint.root().to_owned(), what })?;
    let recorded = &ledger.document().targets;
    // What an adapter that was taken out had touched is recorded on, though it is the base's again.
    let is_left = |target: &LedgerTarget| match &target.kept {
        Kept::Hash(hashes) | Kept::Whole(hashes) => hashes.base != hashes.merged,
        Kept::Positions(_) => true,
    };
    let lost = recorded.iter().find(|(name, target)| is_left(target) && !targets.contains_key(name.as_str()));
    if let Some((name, _)) = lost {
        return Err(about(checkpoint, name, "its record speaks of this tensor, and its adapters do not lead there"));
    }
    for (name, target) in &targets {
        if !recorded.contains_key(*name) {
            return Err(about(
                checkpoint,
                name,
                "its record does not speak of this tensor, and its adapters lead there",
            ));
        }
        ledger.check_stored(target.tensor).map_err(|what| about(checkpoint, name, &what))?;
    }
    Ok(targets)
}
