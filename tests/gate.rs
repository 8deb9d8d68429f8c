//! The gate for outputs on random trees of inputs, outputs and links: a refused output changes nothing at all, and a
//! written one changes nothing but the output.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    path::{Component, Path, PathBuf},
};

use neuroada_ckpt::{
    CheckpointError, ErrorKind, Existing, Failure,
    internals::checkpoint::{AtomicDir, InUse, SingleFile, write_atomic},
};
use proptest::prelude::*;
use rustix::fs::{CWD, FileType, Mode, mknodat};

/// A directory entry: a file's bytes, a link's target, or another kind.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Entry {
    File(Vec<u8>),
    Link(PathBuf),
    Folder,
    Fifo,
}

/// Everything in a folder; links are not followed.
fn tree(folder: &Path) -> BTreeMap<PathBuf, Entry> {
    let (mut found, mut waiting) = (BTreeMap::new(), vec![folder.to_owned()]);
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let entry = entry.unwrap();
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            let of = if kind.is_symlink() {
                Entry::Link(fs::read_link(&path).unwrap())
            } else if kind.is_dir() {
                waiting.push(path.clone());
                Entry::Folder
            } else if kind.is_file() {
                Entry::File(fs::read(&path).unwrap())
            } else {
                Entry::Fifo
            };
            found.insert(path, of);
        }
    }
    found
}

/// The seed of one entry of a random tree: its kind, the index of its parent folder, and its target.
type Seed = (u8, usize, usize);

/// Creates the tree; returns its folders and all its names.
fn plant(root: &Path, seeds: &[Seed]) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let (mut folders, mut names) = (vec![root.to_owned()], Vec::new());
    for (i, &(kind, folder, other)) in seeds.iter().enumerate() {
        let path = folders[folder % folders.len()].join(format!("n{i}"));
        let known = names.get(other % names.len().max(1)).cloned().unwrap_or_else(|| root.to_owned());
        match kind % 9 {
            0 | 1 => {
                fs::create_dir(&path).unwrap();
                folders.push(path.clone());
            }
            2..=4 => fs::write(&path, format!("file {i}")).unwrap(),
            5 => symlink(&known, &path).unwrap(),
            // To a neighbor, to itself, or to nothing.
            6 => symlink(format!("n{}", other % (i + 2)), &path).unwrap(),
            7 if fs::hard_link(&known, &path).is_ok() => {}
            7 => fs::write(&path, format!("file {i}")).unwrap(),
            _ => mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap(),
        }
        // A link to a folder is also a path into it.
        if kind % 9 == 5 && fs::metadata(&path).is_ok_and(|meta| meta.is_dir()) {
            folders.push(path.clone());
        }
        names.push(path);
    }
    (folders, names)
}

/// Writes an output if the gate allows it.
fn write(how: u8, target: &Path, existing: Existing) -> Result<(), CheckpointError> {
    match how % 3 {
        0 => write_atomic(target, existing, b"new"),
        1 => {
            let output = AtomicDir::create(target, existing)?;
            fs::write(output.path().join("new"), b"new").unwrap();
            output.commit()
        }
        _ => {
            let output = SingleFile::create(target, existing)?;
            fs::write(output.root(), b"new").unwrap();
            output.commit()
        }
    }
}

/// `path` with its folder resolved; `None` if the folder does not exist.
fn resolved(path: &Path) -> Option<PathBuf> {
    let path: PathBuf = path.components().collect();
    let name = match path.components().next_back()? {
        Component::Normal(name) => name.to_owned(),
        _ => return None,
    };
    Some(fs::canonicalize(path.parent()?).ok()?.join(name))
}

/// The content of an input, including bytes.
fn content(input: &Path) -> Option<BTreeMap<PathBuf, Entry>> {
    let real = fs::canonicalize(input).ok()?;
    if fs::metadata(&real).ok()?.is_dir() {
        return Some(tree(&real));
    }
    let is_file = fs::metadata(&real).ok()?.is_file();
    is_file.then(|| BTreeMap::from([(real.clone(), Entry::File(fs::read(&real).unwrap()))]))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_but_the_output_changes(
        seeds in prop::collection::vec((any::<u8>(), any::<usize>(), any::<usize>()), 1..14),
        inputs in prop::collection::vec(any::<usize>(), 0..3),
        (how, replaces) in (any::<u8>(), any::<bool>()),
        (workspace, name, spelling) in (any::<usize>(), any::<usize>(), any::<u8>()),
    ) {
        let dir = tempfile::tempdir().unwrap();
        // One more folder above, for `..`.
        let root = fs::canonicalize(dir.path()).unwrap();
        let planted = root.join("planted");
        fs::create_dir(&planted).unwrap();
        let (folders, names) = plant(&planted, &seeds);
        let inputs: Vec<&PathBuf> = inputs.iter().map(|at| &names[at % names.len()]).collect();
        let in_use: Vec<Vec<InUse>> = inputs.iter().filter_map(|input| InUse::register(input).ok()).collect();

        let folder = &folders[workspace % folders.len()];
        let target = match spelling % 6 {
            0 => folder.join("fresh"),
            1 => names[name % names.len()].clone(),
            2 => folder.join(names[name % names.len()].file_name().unwrap()),
            3 => folder.join("..").join(names[name % names.len()].file_name().unwrap()),
            4 => PathBuf::from(format!("{}/", names[name % names.len()].display())),
            _ => folder.join(".").join("fresh"),
        };
        let existing = if replaces { Existing::Replace } else { Existing::Keep };
        let (before, read_before) = (tree(&root), inputs.iter().map(|input| content(input)).collect::<Vec<_>>());
        let written = write(how, &target, existing);
        let after = tree(&root);
        let read_after: Vec<_> = inputs.iter().map(|input| content(input)).collect();

        // A dangling link is not an input, and may point to something now.
        let is_same = read_before.iter().zip(&read_after).all(|(before, after)| before.is_none() || before == after);
        prop_assert!(is_same, "an input changed: {target:?} {existing:?}");
        match written {
            Err(error) => {
                prop_assert!(before == after, "{target:?} was refused ({error}), but something changed");
                prop_assert!(matches!(error.kind(), ErrorKind::Refused | ErrorKind::Io), "{error}");
            }
            Ok(()) => {
                let output = resolved(&target).expect("a written output has a path");
                let is_output = |path: &Path| path.starts_with(&output);
                let others = |tree: &BTreeMap<PathBuf, Entry>| {
                    tree.iter().filter(|(path, _)| !is_output(path)).map(|(p, e)| (p.clone(), e.clone())).collect::<Vec<_>>()
                };
                prop_assert!(others(&before) == others(&after), "{target:?}: something other than the output changed");
                prop_assert!(replaces || !before.contains_key(&output), "{target:?} existed, but had to be kept");
                let new = Entry::File(b"new".to_vec());
                match how % 3 {
                    1 => {
                        prop_assert_eq!(&after[&output], &Entry::Folder);
                        let within: Vec<_> = after.iter().filter(|(path, _)| is_output(path) && **path != output).collect();
                        prop_assert_eq!(within, [(&output.join("new"), &new)]);
                    }
                    _ => prop_assert_eq!(&after[&output], &new),
                }
                // Links, fifos and files of others are never replaced.
                match before.get(&output) {
                    None => {}
                    Some(Entry::File(_)) => prop_assert!(how % 3 != 1),
                    Some(Entry::Folder) => prop_assert!(how % 3 == 1),
                    Some(other) => prop_assert!(false, "{target:?} was {other:?}"),
                }
            }
        }
        drop(in_use);
    }
}
