//! The adapters of a merge, of both kinds, in ascending order of id.

use std::{path::Path, str::FromStr};

use super::super::{AdapterEntry, MergeError, MergeInput};
use crate::{
    adapter::{Adapter, AdapterId},
    checkpoint::{Checkpoint, CheckpointError, Context, Printable},
    foreign::{AdapterKind, LoraAdapter, LoraModule, PeftType},
};

/// Whether a path given as an adapter is a low-rank one; a PEFT adapter of another method is neither that nor a sparse one.
///
/// # Errors
/// A path that cannot be read; [`MergeError::Refused`] for a method that cannot be merged as it is.
pub fn is_low_rank(path: &Path) -> Result<bool, MergeError> {
    match AdapterKind::of(path)? {
        AdapterKind::Peft(PeftType::Lora) => Ok(true),
        AdapterKind::Peft(method) => {
            let what = format!("a PEFT adapter of method {} cannot be merged as it is", Printable(method.name()));
            Err(MergeError::Refused { path: path.to_owned(), what })
        }
        AdapterKind::Folder => {
            Err(CheckpointError::bad_file(path, "a folder without adapter_config.json is no adapter").into())
        }
        AdapterKind::Document(_) | AdapterKind::Tensors => Ok(false),
    }
}

/// The id of an adapter of either kind, reading and proving all of it.
///
/// # Errors
/// What is wrong with the adapter.
pub fn adapter_id(ctx: &Context<'_>, path: &Path) -> Result<AdapterId, MergeError> {
    if !is_low_rank(path)? {
        let sparse = Adapter::open(path)?;
        // A packed adapter says its id; reading all of it could take its base.
        return Ok(sparse.claimed_id().map_or_else(|| sparse.id(ctx), Ok)?);
    }
    Ok(Source::open(ctx, &MergeInput { adapter: path.to_owned(), scale: None }, None)?.id)
}

/// One adapter of a merge.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) id: AdapterId,
    /// The scale of the merge; of a low-rank adapter it comes on top of its own scaling.
    pub(super) scale: f64,
    pub(super) adapter: AnyAdapter,
}

#[derive(Debug)]
pub(super) enum AnyAdapter {
    Sparse(Adapter),
    Lora(LoraAdapter),
}

impl Source {
    /// Opens an adapter of either kind, reading and proving all of it; a packed one may derive its columns from `base`.
    pub(super) fn open(ctx: &Context<'_>, input: &MergeInput, base: Option<&Checkpoint>) -> Result<Self, MergeError> {
        let (id, carried, adapter) = if is_low_rank(&input.adapter)? {
            let lora = LoraAdapter::open(&input.adapter)?;
            let id = AdapterId::from_str(lora.id(ctx)?.to_hex().as_str())?;
            (id, 1.0, AnyAdapter::Lora(lora))
        } else {
            let sparse = match base {
                Some(base) => Adapter::open_with_base(ctx, &input.adapter, base)?,
                None => Adapter::open(&input.adapter)?,
            };
            (sparse.id(ctx)?, sparse.scale(), AnyAdapter::Sparse(sparse))
        };
        let scale = input.scale.unwrap_or(carried);
        if !scale.is_finite() || !(scale as f32).is_finite() {
            let path = Printable::path(&input.adapter);
            return Err(MergeError::Usage(format!("{path}: scale {scale} is not a number that float32 holds")));
        }
        Ok(Self { id, scale, adapter })
    }

    /// Opens several, sorted by id.
    pub(super) fn open_all(
        ctx: &Context<'_>,
        inputs: &[MergeInput],
        base: Option<&Checkpoint>,
    ) -> Result<Vec<Self>, MergeError> {
        let mut sources = inputs.iter().map(|input| Self::open(ctx, input, base)).collect::<Result<Vec<_>, _>>()?;
        sources.sort_by_key(|source| source.id);
        if let Some(pair) = sources.windows(2).find(|pair| pair[0].id == pair[1].id) {
            let path = Printable::path(pair[1].path());
            return Err(MergeError::Usage(format!("{path}: adapter {} is given twice", pair[1].id.short())));
        }
        Ok(sources)
    }

    /// Where it lies.
    pub(super) fn path(&self) -> &Path {
        match &self.adapter {
            AnyAdapter::Sparse(sparse) => sparse.path(),
            AnyAdapter::Lora(lora) => lora.path(),
        }
    }
    /// The parameters that it is for, as it names them.
    pub(super) fn parameters(&self) -> Vec<String> {
        match &self.adapter {
            AnyAdapter::Sparse(sparse) => sparse.targets().iter().map(|target| target.name.clone()).collect(),
            AnyAdapter::Lora(lora) => {
                let modules = lora.modules().iter().map(LoraModule::target);
                modules.chain(lora.full().iter().map(|full| full.name.clone())).collect()
            }
        }
    }
    pub(super) fn kind(&self) -> &'static str {
        match &self.adapter {
            AnyAdapter::Sparse(_) => "sparse",
            AnyAdapter::Lora(_) => "lora",
        }
    }
    /// Bytes of its files.
    pub(super) fn n_bytes(&self) -> u64 {
        match &self.adapter {
            AnyAdapter::Sparse(sparse) => sparse.plain_bytes(),
            AnyAdapter::Lora(lora) => lora.shard().file_bytes() + (1 << 20),
        }
    }

    /// Fails where its files changed since they were opened.
    pub(super) fn unchanged(&self) -> Result<(), MergeError> {
        match &self.adapter {
            AnyAdapter::Sparse(sparse) => Ok(sparse.shard().unchanged()?),
            AnyAdapter::Lora(lora) => Ok(lora.shard().unchanged()?),
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
        };
        AdapterEntry { id: self.id.to_string(), scale: self.scale, base, n_tensors, n_deltas }
    }
}
