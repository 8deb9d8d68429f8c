//! Hints for paths that do not exist: the path that was probably meant.

use std::{
    env,
    path::{Path, PathBuf},
};

use crate::checkpoint::{folder_of, hub_snapshot, is_repository, probe, shell_path};

/// Minimum similarity of a name that a hint mentions; 1 is equality.
const MIN_LIKENESS: f64 = 0.8;
const MAX_NEAR_NAMES: usize = 3;
/// Files that commands open in a folder from the command line.
const FILES_OF_A_FOLDER: [&str; 3] = ["tokenizer.json", "config.json", "adapter_config.json"];
/// Extensions of files, which are not repositories.
const FILE_ENDINGS: [&str; 8] = ["safetensors", "json", "jsonl", "bin", "npz", "gguf", "pt", "jinja"];

/// The hint for a path that does not exist; `None` if it exists, or if there is nothing to suggest.
pub(super) fn advice(path: &Path) -> Option<String> {
    if probe::is_present(path).unwrap_or(true) {
        return None;
    }
    let text = path.to_str()?;
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    // The command line has the folder only.
    let text = match text.strip_suffix(name) {
        Some(folder) if FILES_OF_A_FOLDER.contains(&name) && folder.len() > 1 => folder.trim_end_matches('/'),
        _ => text,
    };
    if probe::is_present(Path::new(text)).unwrap_or(true) {
        return Some(format!("copy {name} from the model's repository into the folder"));
    }
    odd_end(text)
        .or_else(|| tilde(text))
        .or_else(|| hub_url(text))
        .or_else(|| in_hub_cache(text))
        .or_else(|| near_names(Path::new(text)))
        .or_else(|| download(text))
}

/// A carriage return or a space at the end of the path.
fn odd_end(text: &str) -> Option<String> {
    let trimmed = text.trim_end();
    let what = match text[trimmed.len()..].chars().next()? {
        '\r' => "a carriage return (\\r), as lines of Windows text files do",
        _ => "a space",
    };
    Some(format!("the path ends with {what}; without it: {}", shell_path(Path::new(trimmed))))
}

/// A `~` that no shell expanded.
fn tilde(text: &str) -> Option<String> {
    let rest = text.strip_prefix('~').filter(|rest| rest.is_empty() || rest.starts_with('/'))?;
    let home = env::var_os("HOME").map(PathBuf::from)?;
    let expanded = home.join(rest.trim_start_matches('/'));
    Some(format!("the shell expands ~ only at the start of a word without quotes; write {}", shell_path(&expanded)))
}

/// A URL of the Hub in place of a path.
fn hub_url(text: &str) -> Option<String> {
    let rest = ["https://huggingface.co/", "https://hf.co/", "hf://", "https:/huggingface.co/"];
    let rest = rest.iter().find_map(|start| text.strip_prefix(start))?;
    let mut parts = rest.split('/').filter(|part| !part.is_empty());
    let id = format!("{}/{}", parts.next()?, parts.next()?);
    hub_name(&id).map(|name| download_line(&id, name))
}

/// The snapshot of the repository in the local Hugging Face cache.
fn in_hub_cache(text: &str) -> Option<String> {
    hub_name(text)?;
    let repository = hub_cache()?.join(format!("models--{}", text.replace('/', "--")));
    let snapshot = hub_snapshot(&repository).ok()??;
    Some(format!("the Hugging Face cache has it: {}", shell_path(&snapshot)))
}

/// The cache folder of huggingface_hub.
fn hub_cache() -> Option<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("HF_HUB_CACHE")
        .or_else(|| set("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| Some(set("HF_HOME")?.join("hub")))
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("huggingface/hub")))
        .or_else(|| Some(set("HOME")?.join(".cache/huggingface/hub")))
}

/// The command that downloads the repository, if the path looks like a Hub id.
fn download(text: &str) -> Option<String> {
    let name = hub_name(text)?;
    // An existing folder is not an owner on the Hub.
    let owner = Path::new(text).parent()?;
    (!probe::is_present(owner).unwrap_or(true)).then(|| download_line(text, name))
}

fn download_line(id: &str, name: &str) -> String {
    format!("hf download {id} --local-dir {name}")
}

/// The name in a Hub id `owner/name`; `None` for everything else.
fn hub_name(text: &str) -> Option<&str> {
    let (_, name) = text.split_once('/')?;
    let is_file = name.rsplit_once('.').is_some_and(|(_, end)| FILE_ENDINGS.contains(&end));
    (is_repository(text) && !is_file).then_some(name)
}

/// Similar names in the folder, or the missing folder itself.
fn near_names(path: &Path) -> Option<String> {
    let folder = folder_of(path);
    if !probe::is_folder(folder).ok()? {
        // `a/b/c` without `a/b`: the folder is missing. `a/b` may be a Hub id.
        let is_plain = folder.components().count() > 1 || path.is_absolute();
        return is_plain.then(|| format!("the folder {} does not exist", shell_path(folder)));
    }
    let name = path.file_name()?.to_str()?;
    let key = |name: &str| name.to_lowercase().replace(['_', ' '], "-");
    let mut near: Vec<(f64, String)> = Vec::new();
    for (other, _) in probe::entries(folder).ok()? {
        let Some(other) = other.to_str().filter(|other| !other.starts_with('.')) else { continue };
        let stem = other.rsplit_once('.').map_or(other, |(stem, _)| stem);
        let likeness = [other, stem].map(|other| strsim::normalized_damerau_levenshtein(&key(name), &key(other)));
        let likeness = likeness[0].max(likeness[1]);
        if likeness >= MIN_LIKENESS {
            near.push((likeness, shell_path(&folder_of(path).join(other))));
        }
    }
    near.sort_by(|a, b| b.0.total_cmp(&a.0));
    let is_bare = path.components().count() == 1;
    let shown = |path: &String| path.strip_prefix("./").filter(|_| is_bare).unwrap_or(path).to_owned();
    let names: Vec<String> = near.iter().take(MAX_NEAR_NAMES).map(|(_, path)| shown(path)).collect();
    (!names.is_empty()).then(|| format!("there is {}", names.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_have_an_owner_and_a_name() {
        assert_eq!(hub_name("meta-llama/Llama-3.1-8B"), Some("Llama-3.1-8B"));
        for other in ["llama", "a/b/c", "/a/b", "./a", "../a", "a/b.safetensors", "a/rows.jsonl", "~/a", "a/ b"] {
            assert_eq!(hub_name(other), None, "{other}");
        }
    }

    #[test]
    fn pages_of_the_hub_become_a_download() {
        let expected = Some("hf download org/name --local-dir name".to_owned());
        assert_eq!(hub_url("https://huggingface.co/org/name/tree/main"), expected);
        assert_eq!(hub_url("hf://org/name"), expected);
        assert_eq!(hub_url("org/name"), None);
    }

    #[test]
    fn ends_that_nobody_sees_are_named() {
        assert!(odd_end("a\r").unwrap().contains("carriage return"));
        assert!(odd_end("a ").unwrap().ends_with("without it: a"));
        assert_eq!(odd_end("a"), None);
    }
}
