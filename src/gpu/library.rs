//! The location of cuBLASLt. Everything except training needs only the driver, so the library is searched for on first
//! use.
//!
//! It is part of a CUDA toolkit, of PyTorch, or of the system's packages. Folders are listed here; only the loader
//! opens files.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

/// If this variable is set, only its folder is searched.
const FOLDER_VARIABLE: &str = "NEUROADA_CUDA_LIB";
/// Supported versions, newest first.
const VERSIONS: [u32; 2] = [13, 12];
/// Library folders of the nvidia packages for CUDA 13 and 12, relative to a folder of Python packages.
const IN_PACKAGES: [&str; 2] = ["nvidia/cu13/lib", "nvidia/cublas/lib"];

/// The cuBLASLt library that was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlasLibrary {
    /// Its version, such as `13.4.1`.
    pub version: String,
    /// The file.
    pub path: PathBuf,
}

/// A location to search.
pub(super) struct SearchLocation {
    /// Its name for display.
    pub(super) name: String,
    /// The files to load there, best first.
    pub(super) files: Vec<PathBuf>,
}

/// The library's file names that work with a driver of this CUDA version, such as `12.4`, and all locations to search.
pub(super) fn search_locations(driver: Option<&str>) -> (Vec<String>, Vec<SearchLocation>) {
    let driver = driver.and_then(|version| version.split('.').next()?.parse::<u32>().ok());
    let served = |version: &u32| driver.is_none_or(|driver| *version <= driver);
    let names: Vec<_> =
        VERSIONS.into_iter().filter(served).map(|version| format!("libcublasLt.so.{version}")).collect();
    let places = places(&names, |name| std::env::var_os(name).filter(|value| !value.is_empty()));
    (names, places)
}

fn places(names: &[String], variable: impl Fn(&str) -> Option<OsString>) -> Vec<SearchLocation> {
    let inside = |folder: &Path| -> Vec<PathBuf> {
        names.iter().map(|name| folder.join(name)).filter(|path| path.exists()).collect()
    };
    if let Some(folder) = variable(FOLDER_VARIABLE).map(PathBuf::from) {
        return vec![SearchLocation {
            name: format!("{FOLDER_VARIABLE}={}", folder.display()),
            files: inside(&folder),
        }];
    }
    // Nothing is loaded from the current directory.
    let absolute = |name: &str| variable(name).map(PathBuf::from).filter(|folder| folder.is_absolute());
    let mut places = vec![
        SearchLocation { name: format!("{FOLDER_VARIABLE} (not set)"), files: Vec::new() },
        SearchLocation { name: "the loader's path".to_owned(), files: names.iter().map(PathBuf::from).collect() },
    ];
    let mut add =
        |folder: PathBuf| places.push(SearchLocation { name: folder.display().to_string(), files: inside(&folder) });
    add(absolute("CUDA_HOME").map_or_else(|| "$CUDA_HOME/lib64".into(), |home| home.join("lib64")));
    add("/usr/local/cuda/lib64".into());
    if let Some(prefix) = absolute("CONDA_PREFIX") {
        add(prefix.join("lib"));
    }
    let mut prefixes: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(absolute).collect();
    prefixes.extend(variable("PATH").map(|path| prefixes_of_python(&path)).unwrap_or_default());
    prefixes.extend(absolute("HOME").map(|home| home.join(".local")));
    let mut seen = Vec::new();
    for prefix in prefixes {
        if !seen.contains(&prefix) {
            let files = package_folders(&prefix).iter().flat_map(|folder| inside(folder)).collect();
            places.push(SearchLocation { name: format!("Python's packages in {}/lib", prefix.display()), files });
            seen.push(prefix);
        }
    }
    places
}

/// Prefixes of the packages of the `python3` on `path`: its folder, the target of its link, and Debian's folder for
/// added packages.
fn prefixes_of_python(path: &OsString) -> Vec<PathBuf> {
    let folders = std::env::split_paths(path).filter(|folder| folder.is_absolute());
    let Some(python) = folders.map(|folder| folder.join("python3")).find(|file| file.is_file()) else {
        return Vec::new();
    };
    let prefix_of = |program: &Path| Some(program.parent()?.parent()?.to_owned());
    let linked = python.canonicalize().ok();
    let mut prefixes: Vec<_> =
        [Some(&python), linked.as_ref()].into_iter().flatten().filter_map(|p| prefix_of(p)).collect();
    if prefixes.iter().any(|prefix| prefix == Path::new("/usr")) {
        prefixes.push("/usr/local".into());
    }
    prefixes
}

/// The folders of nvidia packages under `prefix`, sorted by name.
fn package_folders(prefix: &Path) -> Vec<PathBuf> {
    let Ok(entries) = prefix.join("lib").read_dir() else { return Vec::new() };
    let mut pythons: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    pythons.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3")));
    pythons.sort();
    let packages = |python: &PathBuf| ["site-packages", "dist-packages"].map(|folder| python.join(folder));
    pythons.iter().flat_map(packages).flat_map(|folder| IN_PACKAGES.map(|inside| folder.join(inside))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Vec<String> {
        VERSIONS.map(|version| format!("libcublasLt.so.{version}")).to_vec()
    }

    #[test]
    fn an_explicit_folder_is_the_only_location() {
        let found = places(&names(), |name| (name == FOLDER_VARIABLE).then(|| "/nowhere".into()));
        assert!(found.len() == 1 && found[0].files.is_empty());
        assert_eq!(found[0].name, "NEUROADA_CUDA_LIB=/nowhere");
    }

    #[test]
    fn relative_folders_are_ignored() {
        let found = places(&names(), |name| match name {
            "PATH" => Some("bin:.".into()),
            FOLDER_VARIABLE => None,
            _ => Some("here".into()),
        });
        assert!(found.iter().all(|place| !place.name.contains("here")), "{:?}", found.len());
        assert_eq!(found.len(), 4);
    }

    #[test]
    fn every_location_has_a_name() {
        let found = places(&names(), |_| None);
        let names: Vec<_> = found.iter().map(|place| place.name.as_str()).collect();
        assert_eq!(
            names,
            ["NEUROADA_CUDA_LIB (not set)", "the loader's path", "$CUDA_HOME/lib64", "/usr/local/cuda/lib64"]
        );
    }
}
