//! The adapters of a merge, of every kind, as the engine takes them.

use std::{path::Path, str::FromStr};

use serde::Serialize;
use tempfile::TempDir;

use super::{
    MergeError, MergeInput,
    ledger::{LedgerAdapter, file_digest},
    options::check_scale,
    state::state_of,
};
use crate::{
    adapter::{self, Adapter, AdapterError, AdapterId, AdapterNotes, ColumnsKind},
    checkpoint::{
        BaseValues, Checkpoint, CheckpointError, Context, EntryKind, Existing, OwnFolder, Printable, Shard,
        StateFolder, copy_own, recognize_folder,
    },
    foreign::{AdapterKind, ForeignAdapter, LoraAdapter, LoraModule, PEFT_CONFIG, PEFT_TENSORS, PeftType},
    weights::WeightMap,
};

/// Whether a path leads to an adapter that changes whole tensors, as a LoRA does. What is no adapter, a merge says.
pub fn changes_whole_tensors(path: &Path) -> bool {
    matches!(AdapterKind::of(path), Ok(AdapterKind::Peft(PeftType::Lora)))
}

/// Whether a path given as an adapter is one of PEFT's that changes whole tensors or rows of them; one of another method is neither that
/// nor a sparse one.
///
/// # Errors
/// A path that cannot be read; [`MergeError::Refused`] for a method that cannot be merged as it is.
fn is_low_rank(path: &Path) -> Result<bool, MergeError> {
    match AdapterKind::of(path)? {
        AdapterKind::Peft(PeftType::Lora | PeftType::TrainableTokens) => Ok(true),
        AdapterKind::Peft(PeftType::Sparse(_)) => Ok(false),
        AdapterKind::Peft(method) => {
            let what = format!("a PEFT adapter of method {} cannot be merged as it is", Printable(method.name()));
            Err(MergeError::Refused { path: path.to_owned(), what })
        }
        AdapterKind::Folder => Err(match recognize_folder(path)? {
            Some(format) => CheckpointError::other_format(path, format, "an adapter"),
            None => CheckpointError::bad_file(path, "a folder without adapter_config.json is no adapter"),
        }
        .into()),
        AdapterKind::Document(_) | AdapterKind::Tensors => Ok(false),
    }
}

/// The id of an adapter of any kind, reading and proving all of it.
///
/// # Errors
/// What is wrong with the adapter.
pub fn adapter_id(ctx: &Context<'_>, path: &Path) -> Result<AdapterId, MergeError> {
    if is_low_rank(path)? {
        return Ok(AdapterId::from_str(LoraAdapter::open(ctx, path)?.id(ctx)?.to_hex().as_str())?);
    }
    let sparse = Adapter::open(path)?;
    // A packed adapter says its id; reading all of it could take its base.
    Ok(sparse.claimed_id().map_or_else(|| sparse.id(ctx), Ok)?)
}

/// An adapter in a checkpoint.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct AdapterEntry {
    /// The adapter's id, 64 hexadecimal digits.
    pub id: String,
    /// The scale it is merged with.
    pub scale: f64,
    /// The base it says it was made from.
    pub base: String,
    /// Tensors it touches.
    pub n_tensors: usize,
    /// Deltas it holds.
    pub n_deltas: u64,
}

/// One adapter of a merge.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) id: AdapterId,
    /// The scale of the merge; of a low-rank adapter it comes on top of its own scaling.
    pub(super) scale: f64,
    pub(super) adapter: AnyAdapter,
    /// What had to be decided when it was read, in words.
    pub(super) notes: Vec<String>,
    /// Where it lies that was converted, until it is merged.
    _converted: Option<TempDir>,
}

#[derive(Debug)]
pub(super) enum AnyAdapter {
    Sparse(Adapter),
    Lora(LoraAdapter),
    /// The copy of a low-rank adapter in a state folder. Where its factors belong is recorded; nothing is read from its config again.
    Kept(KeptTensors),
}

/// The tensors of an adapter in a state folder.
#[derive(Debug)]
pub(super) struct KeptTensors {
    folder: OwnFolder,
    shard: Shard,
    entry: LedgerAdapter,
}

impl Source {
    /// Opens an adapter for a merge into the checkpoint of `map`, reading and proving all of it; a packed one may derive its columns from
    /// there. Another tool's sparse adapter is converted on the way, in a temporary folder; `originals` are the values it is for.
    fn open(
        ctx: &Context<'_>,
        input: &MergeInput,
        map: &WeightMap<'_>,
        originals: &dyn BaseValues,
    ) -> Result<Self, MergeError> {
        let path = &input.adapter;
        if let Some(foreign) = ForeignAdapter::open(ctx, path)? {
            return Self::convert(ctx, input, &foreign, map, originals);
        }
        let checkpoint = map.checkpoint();
        if is_low_rank(path)? {
            let lora = LoraAdapter::open(ctx, path)?;
            let scale = check_scale(input, input.scale.unwrap_or(1.0), true)?;
            let id = AdapterId::from_str(lora.id(ctx)?.to_hex().as_str())?;
            return Ok(Self::new(id, scale, AnyAdapter::Lora(lora)));
        }
        let sparse = open_sparse(ctx, path, checkpoint)?;
        let scale = check_scale(input, input.scale.unwrap_or(sparse.scale()), false)?;
        Ok(Self::new(sparse.id(ctx)?, scale, AnyAdapter::Sparse(sparse)))
    }

    fn new(id: AdapterId, scale: f64, adapter: AnyAdapter) -> Self {
        Self { id, scale, adapter, notes: Vec::new(), _converted: None }
    }

    fn convert(
        ctx: &Context<'_>,
        input: &MergeInput,
        foreign: &ForeignAdapter,
        map: &WeightMap<'_>,
        originals: &dyn BaseValues,
    ) -> Result<Self, MergeError> {
        let folder = tempfile::Builder::new().prefix("neuroada-").tempdir();
        let folder = folder.map_err(|e| CheckpointError::io("create", &std::env::temp_dir(), e))?;
        let name = input.adapter.file_stem().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let path = folder.path().join(format!("{name}.safetensors"));
        let report = adapter::import(ctx, foreign, map, originals, &AdapterNotes::default(), &path, Existing::Keep)?;
        let sparse = Adapter::open(&path)?;
        let scale = check_scale(input, input.scale.unwrap_or(sparse.scale()), false)?;
        let mut source = Self::new(sparse.id(ctx)?, scale, AnyAdapter::Sparse(sparse));
        if !report.exact {
            let (n, of) = (report.n_rounded, report.n_entries);
            let name = Printable(&name);
            source.notes.push(format!("{name}: {n} of {of} deltas were rounded, as {} does it", report.from));
        }
        source._converted = Some(folder);
        Ok(source)
    }

    /// Opens several, in ascending order of id.
    pub(super) fn open_all(
        ctx: &Context<'_>,
        inputs: &[MergeInput],
        map: &WeightMap<'_>,
        originals: &dyn BaseValues,
    ) -> Result<Vec<Self>, MergeError> {
        let mut sources = Vec::new();
        for input in inputs {
            let source = Self::open(ctx, input, map, originals)?;
            if sources.iter().any(|other: &Self| other.id == source.id) {
                let path = Printable::path(&input.adapter);
                return Err(MergeError::Usage(format!("{path}: adapter {} is given twice", source.id.short())));
            }
            sources.push(source);
        }
        sources.sort_by_key(|source| source.id);
        Ok(sources)
    }

    /// Opens the copy of an adapter in a state folder, proven to be the one that was merged.
    ///
    /// # Errors
    /// [`MergeError::BadLedger`] where it is missing or another.
    pub(super) fn open_copy(ctx: &Context<'_>, state: &StateFolder, entry: &LedgerAdapter) -> Result<Self, MergeError> {
        let adapters = state.adapters();
        let path = state.path().join(StateFolder::LEDGER);
        let bad = |what: &str| MergeError::BadLedger { path: path.clone(), what: what.to_owned() };
        let id = AdapterId::from_str(&entry.id).map_err(|_| bad("an adapter's id is malformed"))?;
        let of_copy =
            |name: &str, what: &str| MergeError::BadLedger { path: adapters.path().join(name), what: what.to_owned() };
        let missing = "the copy of an adapter that was merged is missing";
        let other = "not the adapter that was merged: its content does not match its id";
        let adapter = match entry.kind.as_str() {
            "sparse" => {
                let name = file_name(&id);
                let sparse = Adapter::open_own(&adapters, &name)?.ok_or_else(|| of_copy(&name, missing))?;
                if sparse.id(ctx)? != id {
                    return Err(of_copy(&name, other));
                }
                AnyAdapter::Sparse(sparse)
            }
            "lora" => {
                let name = id.to_string();
                if let Some(kind) = adapters.kind_of(&name)?
                    && kind != EntryKind::Folder
                {
                    return Err(adapters.refuse_entry(&name).into());
                }
                let folder = adapters.inside(&name);
                match &entry.digest {
                    Some(digest) => {
                        let shard = Shard::open_own(&folder, PEFT_TENSORS)?.ok_or_else(|| of_copy(&name, missing))?;
                        let found = file_digest(ctx, shard.path(), shard.file())?;
                        if found.to_hex().as_str() != digest {
                            return Err(of_copy(&name, other));
                        }
                        AnyAdapter::Kept(KeptTensors { folder, shard, entry: entry.clone() })
                    }
                    // Records of before 0.2 prove it by its content.
                    None => {
                        let lora = LoraAdapter::open(ctx, folder.path())?;
                        if lora.id(ctx)?.to_hex().as_str() != entry.id {
                            return Err(of_copy(&name, other));
                        }
                        AnyAdapter::Lora(lora)
                    }
                }
            }
            kind => {
                let what = format!(
                    "adapter {} is of kind \"{}\", which this program does not know",
                    id.short(),
                    Printable(kind)
                );
                return Err(bad(&what));
            }
        };
        Ok(Self::new(id, entry.scale, adapter))
    }

    /// Where it lies.
    pub(super) fn path(&self) -> &Path {
        match &self.adapter {
            AnyAdapter::Sparse(sparse) => sparse.path(),
            AnyAdapter::Lora(lora) => lora.path(),
            AnyAdapter::Kept(kept) => kept.folder.path(),
        }
    }
    /// The parameters that it is for, as it names them; empty for copies in a state folder.
    pub(super) fn parameters(&self) -> Vec<String> {
        match &self.adapter {
            AnyAdapter::Sparse(sparse) => sparse.targets().iter().map(|target| target.name.clone()).collect(),
            AnyAdapter::Lora(lora) => {
                let modules = lora.modules().iter().map(LoraModule::target);
                let full = lora.full().iter().map(|full| full.name.clone());
                modules.chain(full).chain(lora.rows().iter().map(|rows| rows.name.clone())).collect()
            }
            AnyAdapter::Kept(_) => Vec::new(),
        }
    }
    /// The sparse adapter, where it is one.
    pub(super) fn sparse(&self) -> Option<&Adapter> {
        match &self.adapter {
            AnyAdapter::Sparse(sparse) => Some(sparse),
            _ => None,
        }
    }
    /// The tensors of a copy in a state folder, where it is one of a low-rank adapter.
    pub(super) fn kept_shard(&self) -> Option<&Shard> {
        match &self.adapter {
            AnyAdapter::Kept(kept) => Some(&kept.shard),
            AnyAdapter::Sparse(_) | AnyAdapter::Lora(_) => None,
        }
    }
    /// The base that it names, as it names it; none where that is a path of somebody's machine.
    pub(super) fn full_base_name(&self) -> Option<String> {
        let name = match &self.adapter {
            AnyAdapter::Lora(lora) => lora.config().base.clone().unwrap_or_default(),
            _ => self.entry(0).base,
        };
        let is_repository = name.split('/').count() == 2 && !name.starts_with(['.', '/', '~']) && !name.ends_with('/');
        match (is_repository, self.entry(0).base) {
            (true, _) => Some(name),
            (false, name) => Some(name).filter(|name| !name.is_empty()),
        }
    }
    /// Bytes of its copy in a state folder, at most.
    pub(super) fn copy_bytes(&self) -> u64 {
        match &self.adapter {
            AnyAdapter::Sparse(sparse) => sparse.plain_bytes(),
            AnyAdapter::Lora(lora) => lora.n_bytes() + (1 << 20),
            AnyAdapter::Kept(kept) => kept.shard.file_bytes() + (1 << 20),
        }
    }
    /// The name of its copy in a state folder.
    pub(super) fn copy_name(&self) -> String {
        match &self.adapter {
            AnyAdapter::Sparse(_) => file_name(&self.id),
            _ => self.id.to_string(),
        }
    }

    /// Copies it into a state folder, durably.
    pub(super) fn write_copy(&self, ctx: &Context<'_>, state: &StateFolder) -> Result<(), MergeError> {
        let adapters = state.adapters();
        let own = adapters.inside(&self.id.to_string());
        match &self.adapter {
            AnyAdapter::Sparse(sparse) => return Ok(sparse.write_own(ctx, &adapters, &file_name(&self.id))?),
            AnyAdapter::Lora(lora) => {
                own.create()?;
                lora.write_copy(ctx, &own)?;
            }
            AnyAdapter::Kept(kept) => {
                own.create()?;
                copy_own(&kept.folder.path().join(PEFT_CONFIG), &own, PEFT_CONFIG)?;
                copy_own(kept.shard.path(), &own, PEFT_TENSORS)?;
            }
        }
        Ok(own.sync()?)
    }

    /// What a ledger has to know of it, when its copy is there.
    ///
    /// # Errors
    /// A copy that cannot be read.
    pub(super) fn record(&self, ctx: &Context<'_>, state: &StateFolder) -> Result<LedgerAdapter, MergeError> {
        let AdapterEntry { id, scale, base, n_deltas, .. } = self.entry(0);
        let digest = match &self.adapter {
            AnyAdapter::Sparse(_) => None,
            AnyAdapter::Kept(kept) => kept.entry.digest.clone(),
            AnyAdapter::Lora(_) => {
                let own = state.adapters().inside(&self.id.to_string());
                let copy = Shard::open_own(&own, PEFT_TENSORS)?.ok_or_else(|| MergeError::BadLedger {
                    path: own.path().to_owned(),
                    what: "the copy of an adapter was written and is not there any more".to_owned(),
                })?;
                Some(file_digest(ctx, copy.path(), copy.file())?.to_hex().to_string())
            }
        };
        Ok(LedgerAdapter { id, scale, kind: self.kind().to_owned(), base, n_deltas, digest })
    }

    /// `sparse` or `lora`.
    pub(super) fn kind(&self) -> &'static str {
        if self.sparse().is_some() { "sparse" } else { "lora" }
    }

    /// Fails where its files changed since they were opened.
    pub(super) fn unchanged(&self) -> Result<(), MergeError> {
        match &self.adapter {
            AnyAdapter::Sparse(sparse) => Ok(sparse.shard().unchanged()?),
            AnyAdapter::Lora(lora) => Ok(lora.unchanged()?),
            AnyAdapter::Kept(kept) => Ok(kept.shard.unchanged()?),
        }
    }

    /// What reports say of it; `n_tensors` is how many tensors it touches.
    pub(super) fn entry(&self, n_tensors: usize) -> AdapterEntry {
        let (base, n_deltas) = match &self.adapter {
            AnyAdapter::Sparse(sparse) => (sparse.base().name.clone(), sparse.nnz()),
            AnyAdapter::Lora(lora) => {
                // Never a whole path.
                let base = lora.config().base.as_deref().map_or("", |base| base.trim_end_matches('/'));
                let name = base.rsplit('/').next().unwrap_or_default();
                (name.to_owned(), lora.n_parameters())
            }
            AnyAdapter::Kept(kept) => (kept.entry.base.clone(), kept.entry.n_deltas),
        };
        AdapterEntry { id: self.id.to_string(), scale: self.scale, base, n_tensors, n_deltas }
    }
}

/// The name of a sparse adapter's copy.
fn file_name(id: &AdapterId) -> String {
    format!("{id}.safetensors")
}

/// Opens a sparse adapter for a merge into `checkpoint`, which a packed one may derive its columns from.
fn open_sparse(ctx: &Context<'_>, path: &Path, checkpoint: &Checkpoint) -> Result<Adapter, MergeError> {
    let adapter = Adapter::open(path)?;
    if adapter.packed_columns() != Some(ColumnsKind::Derived) {
        return Ok(adapter);
    }
    match Adapter::open_with_base(ctx, path, checkpoint) {
        Err(AdapterError::WrongBase { .. }) if state_of(checkpoint)?.remembers()? => {
            let what = "its columns are derived from its base, and this checkpoint holds merges already: unpack it first, \
                        with --base";
            Err(MergeError::Refused { path: path.to_owned(), what: what.to_owned() })
        }
        opened => Ok(opened?),
    }
}
