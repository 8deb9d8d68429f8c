//! Recognizes files and folders of other formats, so that an error can name what a path is in place of a safetensors checkpoint.

use std::{
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::{
    CheckpointError, Printable,
    index::{INDEX_FILE, SINGLE_FILE},
    json::{open_regular, read_whole},
    other_format::{OtherFormat, START_BYTES, recognise_start},
    probe,
};

/// The same for the file at `path`, which may be of any kind that is not safetensors; `None` where it cannot be read.
pub fn recognise_file(path: &Path) -> Option<OtherFormat> {
    let mut start = [0; START_BYTES];
    let n = open_regular(path, "open").ok().and_then(|(file, _)| file.read_at(&mut start, 0).ok())?;
    recognise_start(&start[..n])
}

/// What a folder without a safetensors checkpoint is instead; `None` where it is nothing known.
///
/// # Errors
/// A folder that cannot be listed.
pub fn recognise_folder(folder: &Path) -> Result<Option<OtherFormat>, CheckpointError> {
    let entries = probe::entries(folder)?;
    let names: Vec<&str> = entries.iter().filter_map(|(name, _)| name.to_str()).collect();
    let has = |name: &str| names.contains(&name);
    let first = |is: &dyn Fn(&str) -> bool| names.iter().copied().find(|name| is(name));
    Ok(Some(if has("adapter_model.safetensors") || has("adapter_config.json") {
        OtherFormat::PeftFolder
    } else if has(SINGLE_FILE) || has(INDEX_FILE) {
        OtherFormat::Checkpoint
    } else if first(&|name| name.ends_with(".distcp")).is_some() {
        OtherFormat::Fsdp(folder.to_owned())
    } else if let Some(shards) = first(&|name| name.starts_with("pytorch_model_fsdp_")) {
        OtherFormat::Fsdp(folder.join(shards))
    } else if has("zero_to_fp32.py") || first(&|name| name.starts_with("global_step")).is_some() {
        OtherFormat::DeepSpeed
    } else if first(&|name| name.starts_with("pytorch_model") && name.contains(".bin")).is_some() {
        OtherFormat::PickledModel
    } else if first(&|name| name.ends_with(".gguf")).is_some() {
        OtherFormat::GgufFolder
    } else if let Some(last) = names.iter().filter_map(|name| step_of(name)).max() {
        OtherFormat::TrainingRun(folder.join(format!("checkpoint-{last}")))
    } else if let Some(snapshot) = hub_snapshot(folder)? {
        OtherFormat::HubCache(snapshot)
    } else {
        return Ok(None);
    }))
}

/// The step in the name of a checkpoint that a trainer wrote: `checkpoint-500`.
fn step_of(name: &str) -> Option<u64> {
    name.strip_prefix("checkpoint-")?.parse().ok()
}

/// The snapshot of the main branch of a repository in the Hugging Face cache, `models--ORG--NAME`; `None` where there is none.
///
/// # Errors
/// A path that cannot be examined.
pub fn hub_snapshot(repository: &Path) -> Result<Option<PathBuf>, CheckpointError> {
    const MAX_REF_BYTES: u64 = 256;
    let reference = repository.join("refs/main");
    if !probe::is_file(&reference)? {
        return Ok(None);
    }
    let commit = read_whole(&reference, MAX_REF_BYTES)?;
    let commit = String::from_utf8_lossy(&commit).trim().to_owned();
    let is_hash = !commit.is_empty() && commit.bytes().all(|byte| byte.is_ascii_hexdigit());
    let snapshot = repository.join("snapshots").join(&commit);
    Ok((is_hash && probe::is_folder(&snapshot)?).then_some(snapshot))
}

/// The error for a folder without a checkpoint.
pub(super) fn no_checkpoint(folder: &Path) -> Result<CheckpointError, CheckpointError> {
    Ok(match recognise_folder(folder)? {
        Some(format) => CheckpointError::other_format(folder, format, "a safetensors checkpoint"),
        None => CheckpointError::bad_file(
            folder,
            format!("has neither {SINGLE_FILE} nor {INDEX_FILE}{}", contents(folder)?),
        ),
    })
}

/// What lies in a folder, in a few words: `; it is empty`.
fn contents(folder: &Path) -> Result<String, CheckpointError> {
    const MAX_NAMES: usize = 3;
    let names: Vec<String> = probe::entries(folder)?
        .iter()
        .map(|(name, _)| Printable(&name.to_string_lossy()).to_string())
        .filter(|name| !name.starts_with('.'))
        .collect();
    Ok(match names.len() {
        0 => "; it is empty".to_owned(),
        n if n > MAX_NAMES => format!("; it has {} and {} more", names[..MAX_NAMES].join(", "), n - MAX_NAMES),
        _ => format!("; it has {}", names.join(", ")),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn folder(names: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            if let Some(folder) = name.strip_suffix('/') {
                fs::create_dir_all(dir.path().join(folder)).unwrap();
            } else {
                fs::write(path, b"x").unwrap();
            }
        }
        dir
    }

    #[test]
    fn folders_are_recognized_by_the_names_in_them() {
        let of = |names: &[&str]| {
            let dir = folder(names);
            let found = recognise_folder(dir.path()).unwrap();
            let relative = |path: PathBuf| path.strip_prefix(dir.path()).unwrap().to_owned();
            match found {
                Some(OtherFormat::Fsdp(path)) => Some(OtherFormat::Fsdp(relative(path))),
                Some(OtherFormat::TrainingRun(path)) => Some(OtherFormat::TrainingRun(relative(path))),
                Some(OtherFormat::HubCache(path)) => Some(OtherFormat::HubCache(relative(path))),
                other => other,
            }
        };
        assert_eq!(of(&["__0_0.distcp", ".metadata"]), Some(OtherFormat::Fsdp("".into())));
        assert_eq!(
            of(&["pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/x"]),
            Some(OtherFormat::Fsdp("pytorch_model_fsdp_0".into()))
        );
        assert_eq!(of(&["zero_to_fp32.py", "latest"]), Some(OtherFormat::DeepSpeed));
        assert_eq!(of(&["global_step500/mp_rank_00_model_states.pt"]), Some(OtherFormat::DeepSpeed));
        assert_eq!(of(&["pytorch_model-00001-of-00002.bin", "config.json"]), Some(OtherFormat::PickledModel));
        assert_eq!(of(&["model-Q4_K_M.gguf", "config.json"]), Some(OtherFormat::GgufFolder));
        let run = Some(OtherFormat::TrainingRun("checkpoint-1000".into()));
        assert_eq!(of(&["checkpoint-500/x", "checkpoint-1000/x", "runs/x"]), run);
        assert_eq!(of(&["adapter_config.json"]), Some(OtherFormat::PeftFolder));
        assert_eq!(of(&["config.json"]), None);
        let cache = folder(&["models--a--b/snapshots/0123abcd/config.json"]);
        let repository = cache.path().join("models--a--b");
        assert_eq!(recognise_folder(&repository).unwrap(), None);
        fs::create_dir(repository.join("refs")).unwrap();
        fs::write(repository.join("refs/main"), "0123abcd").unwrap();
        let snapshot = repository.join("snapshots/0123abcd");
        assert_eq!(recognise_folder(&repository).unwrap(), Some(OtherFormat::HubCache(snapshot)));
        fs::write(repository.join("refs/main"), "../..").unwrap();
        assert_eq!(hub_snapshot(&repository).unwrap(), None);
    }
}
