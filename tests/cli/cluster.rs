//! The recipes of tests/cluster, run as their schedulers would run them.

use std::{fs, path::Path, process::Command};

use super::Workspace;

const PARTS: usize = 3;

/// Runs a shell script as a task with these variables, `neuroada-ckpt` being the built binary.
fn run_task(script: &str, variables: &[(&str, String)]) {
    let binary = Path::new(env!("CARGO_BIN_EXE_neuroada-ckpt"));
    let path = format!("{}:{}", binary.parent().unwrap().display(), std::env::var("PATH").unwrap());
    let output = Command::new("/bin/sh")
        .args(["-euc", script])
        .env_clear()
        .env("PATH", path)
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Makes all parts with `script`, the variables of each from `task`, and compares their join with one run.
fn parts_join_to_the_whole(script: &str, task: impl Fn(usize) -> Vec<(&'static str, String)>) {
    let workspace = Workspace::new();
    let base = workspace.copy_fixture("tiny-llama").display().to_string();
    fs::create_dir(workspace.path("parts")).unwrap();
    for i in 0..PARTS {
        let mut variables = task(i);
        let parts = workspace.path("parts").display().to_string();
        variables.extend([("BASE", base.clone()), ("PARTS", parts), ("K", "2".to_owned())]);
        run_task(script, &variables);
    }
    let parts: Vec<String> = workspace.files().into_iter().filter(|name| name.starts_with("parts/")).collect();
    assert_eq!(parts.len(), PARTS);
    workspace.stdout(&format!("mask-join {} -o joined.safetensors", parts.join(" ")));
    workspace.stdout("mask tiny-llama --k 2 -o whole.safetensors");
    assert!(
        fs::read(workspace.path("joined.safetensors")).unwrap()
            == fs::read(workspace.path("whole.safetensors")).unwrap()
    );
}

#[test]
fn a_slurm_array_makes_the_mask() {
    parts_join_to_the_whole(include_str!("../cluster/mask.sbatch"), |i| {
        vec![("SLURM_ARRAY_TASK_ID", (i + 1).to_string()), ("SLURM_ARRAY_TASK_COUNT", PARTS.to_string())]
    });
}

#[test]
fn a_kubernetes_indexed_job_makes_the_mask() {
    let manifest = include_str!("../cluster/mask-job.yaml");
    // The block under `- |`, up to the next key of the container.
    let script = manifest.split_once("- |\n").unwrap().1.split_once("          resources:").unwrap().0;
    parts_join_to_the_whole(script, |i| vec![("JOB_COMPLETION_INDEX", i.to_string()), ("N", PARTS.to_string())]);
}
