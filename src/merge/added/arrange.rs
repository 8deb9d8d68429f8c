//! A shard written once more, with tensors added or taken away.

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use super::{original_of, prove_original};
use crate::{
    checkpoint::{
        CheckpointError, Context, Header, Shard, TensorInfo, TensorRef, append_to_file, create_new_file,
        tensor_file_header,
    },
    merge::{MergeError, change::Change, plan::added_of_shard},
    tensor::Dtype,
};

/// The header of a shard with the tensors that are added after a change; `original` is that of the base's shard.
///
/// # Errors
/// A header that would be longer than readers accept.
pub(in crate::merge) fn layout_after(
    change: &Change<'_>,
    shard: &Shard,
    shard_index: usize,
    original: &str,
) -> Result<String, MergeError> {
    let added = &change.after.added;
    if added_of_shard(added, shard_index).next().is_none() {
        return Ok(original.to_owned());
    }
    let header = Header::parse_text(shard.path(), original.as_bytes())?;
    let kept = header.tensors().iter().filter(|info| !added.contains_key(&info.name));
    let mut tensors: Vec<(String, Dtype, Vec<u64>)> =
        kept.map(|info| (info.name.clone(), info.dtype, info.shape.clone())).collect();
    tensors.extend(
        added_of_shard(added, shard_index).map(|(name, added)| (name.clone(), added.dtype, added.shape().to_vec())),
    );
    let (json, _) = tensor_file_header(shard.path(), tensors, header.metadata())?;
    Ok(String::from_utf8(json).expect("JSON is UTF-8"))
}

/// Writes the shard `part`, which holds what the shard `shard_index` had before the change, once more under the name `target`: with the header
/// `header`, and the tensors that it lists.
///
/// Disk: the shard twice, for the time. Memory: one window.
///
/// # Errors
/// A failure to read or write; an original that is nowhere, or another.
pub(in crate::merge) fn arrange(
    ctx: &Context<'_>,
    change: &Change<'_>,
    shard_index: usize,
    (part, target): (&Path, &Path),
    header: &str,
) -> Result<(), MergeError> {
    let from = Shard::open(part)?;
    let layout = Header::parse_text(target, header.as_bytes())?;
    let (before, after) = (&change.before.added, &change.after.added);
    let io = |e| CheckpointError::io("write", target, e);
    let out = create_new_file(target)?;
    out.write_all_at(&[&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat(), 0).map_err(io)?;
    drop(out);
    let out = append_to_file(target)?;
    for info in layout.tensors() {
        let name = info.name.as_str();
        match (added_of_shard(after, shard_index).find(|(own, _)| *own == name), from.header().tensor(name)) {
            (Some((_, added)), _) => added.for_each_run(ctx, name, |bytes| append(&out, target, bytes))?,
            (None, Some(found)) if !before.contains_key(name) => {
                copy(ctx, &out, target, TensorRef::of_file(&from, found), info)?;
            }
            (None, _) => {
                let original = original_of(change, name)?.expect("a tensor that is not new has an original");
                prove_original(ctx, change, name, original)?;
                copy(ctx, &out, target, original, info)?;
            }
        }
    }
    Ok(out.sync_all().map_err(|e| CheckpointError::io("sync", target, e))?)
}

fn copy(
    ctx: &Context<'_>,
    out: &File,
    target: &Path,
    from: TensorRef<'_>,
    info: &TensorInfo,
) -> Result<(), MergeError> {
    assert!(from.info.is_like(info), "a copied tensor keeps type and shape");
    let n_bytes = info.n_bytes();
    for start in (0..n_bytes).step_by(ctx.window_bytes() as usize) {
        ctx.check()?;
        append(out, target, &from.read(ctx, start..n_bytes.min(start + ctx.window_bytes()))?)?;
    }
    Ok(())
}

fn append(mut out: &File, target: &Path, bytes: &[u8]) -> Result<(), MergeError> {
    Ok(std::io::Write::write_all(&mut out, bytes).map_err(|e| CheckpointError::io("write", target, e))?)
}
