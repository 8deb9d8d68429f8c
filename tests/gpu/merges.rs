//! Merges of LoRA adapters by the real binary, on both devices.

use std::{collections::BTreeMap, fs, path::Path};

use neuroada_ckpt::{Context, Dtype, Existing, internals::checkpoint::TensorFileWriter};

use crate::{
    binary::{Workspace, code, stderr, stdout},
    samples::{bell, bytes_of, rows},
};

const LAYER: &str = "base_model.model.model.layers";

fn write_tensors(path: &Path, tensors: impl IntoIterator<Item = (String, Dtype, Vec<u64>, Vec<u8>)>) {
    let mut file = TensorFileWriter::create(path, Existing::Replace).unwrap();
    for (name, dtype, shape, bytes) in tensors {
        let id = file.add_tensor(name, dtype);
        file.append(id, &bytes).unwrap();
        file.finish_tensor(id, shape);
    }
    file.finish(&Context::default(), &BTreeMap::new()).unwrap();
}

/// A PEFT folder with both factors of modules `(name, d_out, d_in)`, bell-shaped values times `size`.
fn write_lora(workspace: &Workspace, name: &str, modules: &[(&str, u64, u64)], rank: u64, more: &str, size: f64) {
    let folder = workspace.path(name);
    fs::create_dir(&folder).unwrap();
    let config = format!("{{\"peft_type\":\"LORA\",\"r\":{rank},\"lora_alpha\":16{more}}}");
    fs::write(folder.join("adapter_config.json"), config).unwrap();
    let seed = name.len() as u64 * 1_000_000;
    let factor = |n: u64, seed: u64| bytes_of(Dtype::F32, (0..n).map(|i| size * bell(seed + i)));
    let tensors = (0..).zip(modules).flat_map(|(at, &(module, d_out, d_in))| {
        let seed = seed + at * 10_000_000;
        let mut tensors = vec![
            (format!("{module}.lora_A.weight"), Dtype::F32, vec![rank, d_in], factor(rank * d_in, seed)),
            (format!("{module}.lora_B.weight"), Dtype::F32, vec![d_out, rank], factor(d_out * rank, seed + 5_000_000)),
        ];
        if more.contains("use_dora") {
            let ones = bytes_of(Dtype::F32, (0..d_out).map(|_| 1.0));
            tensors.push((format!("{module}.lora_magnitude_vector"), Dtype::F32, vec![d_out], ones));
        }
        tensors
    });
    write_tensors(&folder.join("adapter_model.safetensors"), tensors);
}

/// Adapters for the base in fixtures.
fn write_loras(workspace: &Workspace) {
    let names: Vec<String> = [0, 1]
        .into_iter()
        .flat_map(|layer| {
            ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"]
                .map(|name| format!("{LAYER}.{layer}.{name}"))
        })
        .collect();
    let shapes = [(64, 64), (32, 64), (176, 64), (64, 176)];
    let modules: Vec<(&str, u64, u64)> = names
        .iter()
        .zip(shapes.into_iter().cycle())
        .map(|(name, (d_out, d_in))| (name.as_str(), d_out, d_in))
        .collect();
    write_lora(workspace, "lora", &modules, 17, "", 0.05);
    write_lora(workspace, "first", &modules[..2], 4, "", 0.05);
    write_lora(workspace, "second", &modules[2..], 64, "", 0.05);
    write_lora(workspace, "dora", &modules[..1], 4, ",\"use_dora\":true", 0.05);
}

/// All files in a folder, or the one file.
fn content(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut left = vec![path.to_owned()];
    while let Some(next) = left.pop() {
        if next.is_dir() {
            left.extend(fs::read_dir(&next).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            let name = next.strip_prefix(path).unwrap().to_string_lossy().into_owned();
            all.insert(name, fs::read(&next).unwrap());
        }
    }
    all
}

/// Merges on both devices, and compares the files and the reports; returns the messages about the GPU.
fn same_merge(workspace: &Workspace, line: &str, variables: &[(&str, &str)]) -> String {
    let [cpu, gpu] = ["cpu", "cuda"].map(|device| {
        let output = workspace.run(&format!("merge {line} --force -v -o {device} --device {device}"), variables);
        assert_eq!(code(&output), 0, "{line}: {}", stderr(&output));
        (content(&workspace.path(device)), stdout(&output), stderr(&output))
    });
    assert!(cpu.0 == gpu.0, "{line}: checkpoints differ");
    assert_eq!(cpu.1, gpu.1, "{line}: reports differ");
    let warnings =
        |message: &str| message.lines().filter(|line| line.starts_with("warning")).collect::<Vec<_>>().join("\n");
    assert_eq!(warnings(&cpu.2), warnings(&gpu.2), "{line}");
    gpu.2
}

#[test]
fn a_lora_merged_on_the_gpu_equals_the_cpus_byte_for_byte() {
    let Some(workspace) = Workspace::new() else { return };
    write_loras(&workspace);
    for line in [
        "BASE --adapter lora",
        "BASE --adapter lora=0.3 --threads 1",
        "BASE --adapter lora --threads 8 --no-ledger",
        "BASE --adapter lora=-2 --keep-originals",
        "BASE --adapter first --adapter second=0.5",
        "BASE --adapter lora=0",
        "BASE --adapter lora --max-memory 16M --gpu-memory 16M",
    ] {
        let message = same_merge(&workspace, line, &[]);
        assert!(
            message.contains("weights merged on the GPU") && !message.contains("merged on the CPU"),
            "{line}: {message}"
        );
        let stats = workspace.stats();
        assert!(stats.get("low_rank_bf16") > 0 && stats.get("most_device_bytes") <= 16 << 20, "{line}: {}", stats.0);
        assert_eq!((stats.get("left_device_bytes"), stats.get("left_host_bytes")), (0, 0), "{line}");
    }
    let verified = workspace.run("verify cuda --base BASE", &[]);
    assert_eq!(code(&verified), 0, "{}", stdout(&verified));
    let dry = workspace.run("merge BASE --adapter lora -o none --dry-run --device cuda:0", &[]);
    assert!(code(&dry) == 0 && workspace.stats().get("low_rank_bf16") > 0 && !workspace.path("none").exists());
}

/// A single-file base with edge-case rows.
fn write_hurting_base(workspace: &Workspace, n_columns: usize) -> Vec<(String, Dtype)> {
    let types = [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::F64];
    let names = types.map(|dtype| (format!("m.{dtype:?}").to_lowercase(), dtype));
    let tensors = names.iter().map(|(name, dtype)| {
        let mut bytes = rows(*dtype, n_columns, 9);
        let n_rows = bytes.len() * 8 / dtype.bitsize() / n_columns;
        if *dtype == Dtype::BF16 {
            bytes[..2].copy_from_slice(&0xffc1_u16.to_le_bytes());
        }
        (format!("{name}.weight"), *dtype, vec![n_rows as u64, n_columns as u64], bytes)
    });
    write_tensors(&workspace.path("hurts.safetensors"), tensors);
    names.to_vec()
}

#[test]
fn every_dtype_is_merged_and_counted_the_same() {
    let Some(workspace) = Workspace::new() else { return };
    let names = write_hurting_base(&workspace, 200);
    let modules: Vec<(String, u64, u64)> =
        names.iter().map(|(name, _)| (format!("base_model.model.{name}"), 11, 200)).collect();
    let modules: Vec<(&str, u64, u64)> =
        modules.iter().map(|(name, rows, columns)| (name.as_str(), *rows, *columns)).collect();
    // Deltas that are absorbed, and deltas that overflow half precision.
    write_lora(&workspace, "small", &modules, 3, "", 0.01);
    write_lora(&workspace, "large", &modules, 3, "", 300.0);
    for (adapter, scale) in [("small", 1.0), ("large", 1.0), ("large", 1e30)] {
        let line = format!("hurts.safetensors --adapter {adapter}={scale} --allow-overflow");
        let message = same_merge(&workspace, &line, &[]);
        assert!(message.contains("6,600 weights merged on the GPU"), "{message}");
        assert!(
            message.contains("note: weights merged on the CPU: 2,200; the GPU path supports one LoRA product"),
            "{message}"
        );
        assert_eq!(message.contains("overflowed"), adapter == "large", "{message}");
    }
    let stats = workspace.stats();
    for kernel in ["low_rank_bf16", "low_rank_f16", "low_rank_f32"] {
        assert!(stats.get(kernel) > 0, "{kernel}: {}", stats.0);
    }
}

#[test]
fn unsupported_weights_are_merged_on_the_cpu_and_reported() {
    let Some(workspace) = Workspace::new() else { return };
    write_loras(&workspace);
    let message = same_merge(&workspace, "BASE --adapter dora", &[]);
    assert!(message.contains("note: weights merged on the CPU: all; "), "{message}");
    // Two products on some weights, one on the others.
    let message = same_merge(&workspace, "BASE --adapter first --adapter lora", &[]);
    assert!(message.contains("note: weights merged on the CPU: 6,144; "), "{message}");
    // A device without memory for the factors and one row, and one with memory for some of the lanes.
    let message = same_merge(&workspace, "BASE --adapter lora --threads 2", &[("FAKE_CUDA_MEMORY", "2000")]);
    assert!(message.contains("note: weights merged on the CPU: all; "), "{message}");
    same_merge(&workspace, "BASE --adapter lora --threads 8", &[("FAKE_CUDA_MEMORY", "100000")]);
    assert!(workspace.stats().get("low_rank_bf16") > 0 && workspace.stats().get("most_device_bytes") <= 100_000);
    // Sparse adapters are always merged on the CPU.
    let sparse = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-llama-adapter.safetensors");
    let line = format!("merge BASE --adapter {} --force -o out --device cuda", sparse.display());
    let output = workspace.run(&line, &[]);
    assert!(code(&output) == 0 && stderr(&output) == "note: this command does all of its work on the CPU\n");
    // Without --device, the program does not search for a GPU.
    let output = workspace.run("merge BASE --adapter lora --force -v -o out", &[]);
    assert!(!stderr(&output).contains("GPU"), "{}", stderr(&output));
}

#[test]
fn a_merge_that_fails_on_the_gpu_leaves_nothing() {
    let Some(workspace) = Workspace::new() else { return };
    write_loras(&workspace);
    let output = workspace.run("merge BASE --adapter lora -o out --device cuda", &[("FAKE_CUDA_FAIL", "2")]);
    let message = stderr(&output);
    assert_eq!(code(&output), 5, "{message}");
    assert!(
        message.contains("GPU 0: kernel `low_rank_bf16`") && message.contains("CUDA_ERROR_ILLEGAL_ADDRESS"),
        "{message}"
    );
    assert!(message.ends_with("hint: --device cpu does the same without the GPU\n"), "{message}");
    assert!(!workspace.path("out").exists());
    let output = workspace.run("merge BASE --adapter lora -o out --device cuda:3", &[]);
    assert_eq!((code(&output), workspace.path("out").exists()), (2, false));
}
