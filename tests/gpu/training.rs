//! `train` and `eval` on the GPU, by the real binary, compared with the CPU.

use std::fs;

use serde_json::{Value, json};

use crate::{
    binary::{Workspace, code, stderr, stdout},
    samples::random,
};

/// Options of a short run on the fixture, whose weights are BF16.
const RUN: &str = "train BASE --data rows.jsonl --batch-tokens 200 --batch-size 3 --max-steps 5 --seed 3 -q";

/// A workspace with short rows, because fibers are slow threads.
fn workspace() -> Option<Workspace> {
    let workspace = Workspace::new()?;
    let row = |i: u32| {
        let (n, answer) = (random(i.into()) % 100, ["true", "false"][(random(i.into()) % 2) as usize]);
        let instruction = format!("{n} is even. Answer format: true/false");
        json!({"instruction": instruction, "input": "", "output": format!("the correct answer is {answer}"), "answer": answer})
    };
    let rows: String = (0..15).map(|i| format!("{}\n", row(i))).collect();
    fs::write(workspace.path("rows.jsonl"), rows).unwrap();
    Some(workspace)
}

impl Workspace {
    /// Runs a command that must succeed; returns its output.
    fn done(&self, line: &str) -> String {
        let output = self.run(line, &[]);
        assert_eq!(code(&output), 0, "{line}: {}", stderr(&output));
        stdout(&output)
    }

    fn report(&self, line: &str) -> Value {
        serde_json::from_str(&self.done(&format!("{line} --json"))).expect("a report is JSON")
    }

    /// The losses of a run's steps, from its log.
    fn losses(&self, name: &str) -> Vec<f64> {
        let log = fs::read_to_string(self.path(&format!("{name}.log.jsonl"))).expect("a run has a log");
        log.lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).expect("lines are JSON")["loss"].as_f64())
            .collect()
    }
}

/// BF16 activations have 8 bits: each of the dozens of operations of a pass rounds its result by up to 2^-9 of its
/// value; a mean over tokens averages these errors out. Observed differences were below 0.5 %.
#[track_caller]
fn assert_near(what: &str, cuda: f64, cpu: f64) {
    assert!((cuda / cpu - 1.0).abs() < 0.01, "{what}: {cuda} on the GPU, {cpu} on the CPU");
}

#[test]
fn a_run_on_the_gpu_matches_the_cpu() {
    let Some(workspace) = workspace() else { return };
    let eval = "--eval-data rows.jsonl --eval-limit 3 --eval-every 3";
    let reports = ["cpu", "cuda"].map(|device| {
        workspace.report(&format!("{RUN} --k 3 --lr 0.01 {eval} --device {device} -o {device}.safetensors"))
    });
    let (cpu, cuda) = (workspace.losses("cpu"), workspace.losses("cuda"));
    assert_eq!((cpu.len(), cuda.len()), (5, 5));
    for (step, (cuda, cpu)) in cuda.iter().zip(&cpu).enumerate() {
        assert_near(&format!("step {step}"), *cuda, *cpu);
    }
    for field in ["loss", "first_eval_loss", "eval_loss"] {
        assert_near(field, reports[1][field].as_f64().unwrap(), reports[0][field].as_f64().unwrap());
    }
    assert!(reports[1]["eval_loss"].as_f64() < reports[1]["first_eval_loss"].as_f64(), "it learned: {}", reports[1]);
    let stats = workspace.stats();
    assert_eq!((stats.get("left_device_bytes"), stats.get("left_host_bytes")), (0, 0), "all memory is freed");
    for kernel in ["gather_dot_bf16", "patch_entries_bf16", "adamw", "cross_entropy_bf16"] {
        assert!(stats.get(kernel) > 0, "{kernel} ran");
    }

    let report = workspace.done(&format!("{RUN} --k 3 --device cuda -o none --dry-run").replace(" -q", ""));
    assert!(report.contains("of 1.07 GB on cuda:0: weights 253 kB"), "{report}");

    // The invariant: the trained weights equal the merged weights, bit for bit on the same device.
    workspace.done("merge BASE -a cuda.safetensors -o merged -q");
    fs::copy(
        concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/tiny-llama/tokenizer.json"),
        workspace.path("merged/tokenizer.json"),
    )
    .unwrap();
    let of_data = "--data rows.jsonl --limit 3 --batch-tokens 200 --device cuda -q";
    let merged = workspace.report(&format!("eval merged {of_data}"));
    assert_eq!(merged["loss"], reports[1]["eval_loss"]);
    let applied = workspace.report(&format!("eval BASE -a cuda.safetensors {of_data}"));
    assert_eq!((&applied["loss"], &applied["ranked"]), (&merged["loss"], &merged["ranked"]));
}

#[test]
fn runs_on_the_gpu_are_reproducible() {
    let Some(workspace) = workspace() else { return };
    let bytes = |name: &str| fs::read(workspace.path(name)).unwrap();
    workspace.done(&format!("{RUN} --k 2 --device cuda -o a.safetensors"));
    workspace.done(&format!("{RUN} --k 2 --device cuda -o b.safetensors"));
    assert!(bytes("a.safetensors") == bytes("b.safetensors"), "twice the same run");
    // Recomputed activations are identical.
    workspace.done(&format!("{RUN} --k 2 --device cuda -o c.safetensors --layer-checkpoints"));
    assert_eq!(workspace.losses("a"), workspace.losses("c"));
}

#[test]
fn answers_are_generated_on_the_gpu() {
    let Some(workspace) = workspace() else { return };
    let of = |device: &str| {
        let line = "eval BASE --data rows.jsonl --limit 3 --generate --max-new-tokens 4 --answers -q --device";
        workspace.report(&format!("{line} {device}"))
    };
    let (cpu, cuda) = (of("cpu"), of("cuda"));
    assert_near("loss", cuda["loss"].as_f64().unwrap(), cpu["loss"].as_f64().unwrap());
    // The fixture's random weights determine little but the first answer's tokens.
    let written = |report: &Value| report["answers"][0]["generated"].as_str().unwrap().to_owned();
    assert_eq!(written(&cuda), written(&cpu));
}

#[test]
fn a_model_that_does_not_fit_is_refused_before_it_is_loaded() {
    let Some(workspace) = workspace() else { return };
    let line = RUN.to_owned() + " --k 1 --device cuda --gpu-memory 16M -o a.safetensors";
    let output = workspace.run(&line, &[]);
    assert_eq!(code(&output), 5, "{}", stderr(&output));
    let words = stderr(&output);
    assert!(words.contains("the run needs") && words.contains("hint: --layer-checkpoints"), "{words}");
    assert!(!workspace.path("a.safetensors").exists() && !workspace.path("a.log.jsonl").exists());
}

#[test]
fn a_run_resumes_on_another_device() {
    let Some(workspace) = workspace() else { return };
    let run = format!("{RUN} --k 2 --epochs 9 --save-every 1").replace("--max-steps 5", "--max-steps 8");
    workspace.done(&format!("{run} --device cpu -o whole.safetensors"));
    let whole = workspace.losses("whole");

    // Killed on the CPU, at some step after the first.
    let line = format!("{run} --device cpu -o a.safetensors");
    let mut child = workspace.command(&line, &[]).spawn().unwrap();
    while !workspace.path("a.state.safetensors").exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    if workspace.path("a.state.safetensors").exists() {
        workspace.done(&format!("{run} --device cuda -o a.safetensors --resume"));
        let all = workspace.losses("a");
        assert_eq!(all.len(), 8);
        assert!(workspace.stats().get("adamw") > 0, "the remaining steps ran on the GPU");
        for (step, (a, b)) in all.iter().zip(&whole).enumerate() {
            assert_near(&format!("step {step}"), *a, *b);
        }
    } else {
        eprintln!("skipped: the run was over before it could be killed");
    }

    // A GPU that fails: the saved state remains, and the run resumes on the CPU.
    let line = format!("{run} --device cuda -o b.safetensors");
    let output = workspace.run(&line, &[("FAKE_CUDA_FAIL", "700")]);
    assert_eq!(code(&output), 5, "{}", stderr(&output));
    assert!(stderr(&output).contains("GPU 0: kernel `"), "{}", stderr(&output));
    assert!(workspace.path("b.state.safetensors").exists() && !workspace.path("b.safetensors").exists());
    workspace.done(&format!("{run} --device cpu -o b.safetensors --resume"));
    for (step, (b, whole)) in workspace.losses("b").iter().zip(&whole).enumerate() {
        assert_near(&format!("step {step}"), *b, *whole);
    }
}
