//! Full disks, read-only mounts, immutable files, other users.

use std::{fs, path::PathBuf, process::Command};

use super::{
    copy_tree, is_root, must, program, run,
    scenarios::{self, Kind, SPARSE, Scenario},
    skipped, works,
};
use crate::world::{World, tree};

/// A small file system in memory, gone when dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(path: PathBuf, size: &str) -> Option<Self> {
        fs::create_dir_all(&path).unwrap();
        let at = path.display().to_string();
        works("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", &at]).then(|| Self(path))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        must("umount", &[&self.0.display().to_string()]);
    }
}

#[test]
fn a_disk_too_small_is_seen_before_the_first_write() {
    if !is_root() {
        return skipped("mounting needs root");
    }
    let world = World::new();
    let Some(disk) = Tmpfs::mount(world.at("disk"), "128k") else { return skipped("tmpfs cannot be mounted here") };
    let mut arguments = SPARSE[0].arguments(&world, &world.base());
    arguments[2] = format!("--output={}", disk.0.join("out").display());
    let output = run(&arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(5), "{said}");
    assert!(said.contains("the output needs ") && said.contains("the file system has 131072 free"), "{said}");
    assert_eq!(fs::read_dir(&disk.0).unwrap().count(), 0);
}

#[test]

fn a_disk_too_small_for_the_originals_of_lora_is_seen_before_the_first_write() {
    if !is_root() {
        return skipped("mounting needs root");
    }
    let world = scenarios::world_with_lora();
    // The base has 45 kB; the weights that change, which are kept, have nearly as many.
    let Some(disk) = Tmpfs::mount(world.at("disk"), "72k") else { return skipped("tmpfs cannot be mounted here") };
    let path = disk.0.join("work");
    copy_tree(&Kind::LoraOriginals.base(&world), &path);
    let before = tree(&path);
    let output = run(&scenarios::lora()[0].arguments(&world, &path));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(5), "{said}");
    assert!(said.contains("free"), "{said}");
    assert!(tree(&path) == before, "nothing is left behind");
}

#[test]
fn what_may_not_be_written_is_told_and_left_alone() {
    change_what_may_not_be_written(World::new, &SPARSE[0]);
}

#[test]

fn what_may_not_be_written_is_told_and_left_alone_by_lora() {
    for scenario in [0, 4] {
        change_what_may_not_be_written(scenarios::world_with_lora, &scenarios::lora()[scenario]);
    }
}

fn change_what_may_not_be_written(world: impl Fn() -> World, scenario: &Scenario) {
    if !is_root() {
        return skipped("mounting needs root");
    }
    let world = world();
    let path = world.at("work");
    copy_tree(&scenario.kind.base(&world), &path);
    let before = tree(&path);
    let at = path.display().to_string();
    let refused = |what: &str, output: std::process::Output| {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(5), "{what}: {said}");
        assert!(tree(&path) == before, "{what}: nothing is left behind");
    };

    if works("mount", &["--bind", &at, &at]) {
        must("mount", &["-o", "remount,bind,ro", &at]);
        let output = run(&scenario.arguments(&world, &path));
        must("umount", &[&at]);
        refused("a read-only mount", output);
    } else {
        skipped("bind mounts cannot be made here");
    }

    let shard = path.join("model-00001-of-00002.safetensors").display().to_string();
    if works("chattr", &["+i", &shard]) {
        let output = run(&scenario.arguments(&world, &path));
        must("chattr", &["-i", &shard]);
        refused("an immutable file", output);
    } else {
        skipped("files cannot be made immutable here");
    }

    if works("setpriv", &["--reuid=65534", "--clear-groups", program(), "--version"]) {
        must("chmod", &["755", &world.dir.path().display().to_string()]);
        let output = Command::new("setpriv")
            .args(["--reuid=65534", "--clear-groups", program(), "-q"])
            .args(scenario.arguments(&world, &path))
            .output()
            .unwrap();
        refused("another user's files", output);
    } else {
        skipped("the program cannot be run as another user here");
    }
}
