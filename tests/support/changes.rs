//! Short words for what tests do with a [`Mixture`].

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use neuroada_ckpt::{
    Context, KeptOriginals, MergeError, MergeOptions, MergeReport, VerifyOptions, VerifyReport, Which, internals::merge,
};

use crate::{
    mixture::{self, Mixture, in_place},
    world::tree,
};

pub(crate) fn ctx() -> Context<'static> {
    Context::default()
}

pub(crate) fn keeping(keep: KeptOriginals, options: MergeOptions<'static>) -> MergeOptions<'static> {
    MergeOptions { keep, ..options }
}

/// In place with whole originals, without a base.
pub(crate) fn whole() -> MergeOptions<'static> {
    keeping(KeptOriginals::Whole, in_place(None))
}

impl Mixture {
    pub(crate) fn add(
        &self,
        path: &Path,
        active: &[(usize, f64)],
        options: &MergeOptions<'_>,
    ) -> Result<MergeReport, MergeError> {
        merge::merge(&ctx(), path, &self.inputs(active), options)
    }
    pub(crate) fn remove(
        &self,
        path: &Path,
        which: &[usize],
        options: &MergeOptions<'_>,
    ) -> Result<MergeReport, MergeError> {
        let ids = which.iter().map(|&i| self.adapters[i].id).collect();
        merge::unmerge(&ctx(), path, &Which::Some(ids), options)
    }
    pub(crate) fn remove_all(&self, path: &Path, options: &MergeOptions<'_>) -> Result<MergeReport, MergeError> {
        merge::unmerge(&ctx(), path, &Which::All, options)
    }
    pub(crate) fn verify(&self, path: &Path, base: bool) -> Result<VerifyReport, MergeError> {
        let base = base.then(|| self.base());
        merge::verify(&ctx(), path, &VerifyOptions { base, ..VerifyOptions::default() })
    }
    pub(crate) fn work(&self) -> PathBuf {
        self.copy(&self.base(), "work")
    }
    /// A copy of the base with one bit flipped in a tensor.
    pub(crate) fn other_base(&self, name: &str, tensor: &str) -> PathBuf {
        let path = self.copy(&self.base(), name);
        flip(&path, tensor, 11);
        path
    }
}

/// Flips a bit of a tensor's byte.
pub(crate) fn flip(checkpoint: &Path, tensor: &str, byte: usize) {
    let (shard, workspace) = mixture::data_of(checkpoint, tensor);
    let mut bytes = fs::read(&shard).unwrap();
    bytes[workspace.start + byte] ^= 1;
    fs::write(shard, bytes).unwrap();
}

/// The shards and side files alone.
pub(crate) fn shards(path: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut tree = tree(path);
    tree.retain(|path, _| !path.starts_with(".neuroada"));
    tree
}
