//! The real binary on the fake driver, end to end.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use neuroada_ckpt::{Context, Dtype, Existing, internals::checkpoint::TensorFileWriter};
use tempfile::TempDir;

use crate::{
    driver::{self, Build},
    samples::{bell, bytes_of},
};

/// A folder in which the binary runs on the fake driver.
pub(crate) struct Workspace {
    folder: TempDir,
    driver: PathBuf,
}

/// The counters of the fake driver.
pub(crate) struct Stats(pub(crate) String);

impl Stats {
    pub(crate) fn get(&self, name: &str) -> u64 {
        let line = self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0, |number| number.parse().expect("a count is a number"))
    }
}

impl Workspace {
    pub(crate) fn new() -> Option<Self> {
        let driver = driver::folder(Build::Fast).filter(|_| !driver::is_real())?;
        Some(Self { folder: TempDir::new().expect("a temporary folder can be made"), driver })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn run(&self, line: &str, variables: &[(&str, &str)]) -> Output {
        self.command(line, variables).output().expect("the binary runs")
    }

    pub(crate) fn command(&self, line: &str, variables: &[(&str, &str)]) -> Command {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-llama");
        let words = line.split_whitespace().map(|word| word.replace("BASE", &base.to_string_lossy()));
        let mut command = Command::new(env!("CARGO_BIN_EXE_neuroada-ckpt"));
        command.args(words).current_dir(self.folder.path()).env_clear();
        command.env("LD_LIBRARY_PATH", &self.driver).env("FAKE_CUDA_STATS", self.path("stats"));
        command.envs(variables.iter().copied());
        command
    }

    pub(crate) fn stats(&self) -> Stats {
        Stats(fs::read_to_string(self.path("stats")).expect("the fake driver was there"))
    }

    /// The output of `inspect --devices` after the CPU.
    fn devices(&self, variables: &[(&str, &str)]) -> String {
        let output = self.run("inspect --devices", variables);
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        stdout(&output).lines().skip(1).collect::<Vec<_>>().join("\n")
    }

    /// Runs `mask` on both devices, and compares the files.
    fn same_mask(&self, line: &str, variables: &[(&str, &str)]) {
        let [cpu, gpu] = ["cpu", "cuda"].map(|device| {
            let name = format!("{device}.safetensors");
            let output = self.run(&format!("mask {line} --force -v -o {name} --device {device}"), variables);
            assert_eq!(code(&output), 0, "{line}: {}", stderr(&output));
            (fs::read(self.path(&name)).unwrap(), stdout(&output), stderr(&output))
        });
        assert!(cpu.0 == gpu.0, "{line}: masks differ");
        assert_eq!(cpu.1, gpu.1, "{line}: reports differ");
        assert!(gpu.2.contains("rows chosen on the GPU") && !gpu.2.contains("note: rows"), "{line}: {}", gpu.2);
    }
}

#[track_caller]
fn line(output: &str, expected: &str) {
    assert!(output.contains(expected), "{output}");
}
pub(crate) fn code(output: &Output) -> i32 {
    output.status.code().expect("no signal ended it")
}
pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_mask_chosen_on_the_gpu_equals_the_cpus_byte_for_byte() {
    let Some(workspace) = Workspace::new() else { return };
    for line in [
        "BASE --k 1",
        "BASE --k 5 --threads 1",
        "BASE --k 40 --threads 8",
        "BASE --k 1000",
        "BASE --budget 5% --hash",
        "BASE --k 3 --score smallest",
        "BASE --k 3 --score gradient --gradients BASE",
        "BASE --k 3 --score snip --gradients BASE",
        "BASE --k 40 --score fisher --gradients BASE",
        "BASE --k 3 --neuron-fraction 0.3 --check=1",
        "BASE --k 2 --transposed *down_proj* --max-memory 16M",
    ] {
        workspace.same_mask(line, &[]);
        let stats = workspace.stats();
        assert_eq!((stats.get("left_device_bytes"), stats.get("left_host_bytes")), (0, 0), "{line}");
    }
    assert_eq!(workspace.stats().get("top1_u16"), 0);
    workspace.same_mask("BASE --k 1", &[]);
    assert!(workspace.stats().get("top1_u16") > 0, "the kernel for k = 1 ran");
}

/// A checkpoint of one bf16 weight, `[n_rows, d_in]`.
fn one_weight(workspace: &Workspace, n_rows: usize, d_in: usize) {
    let mut writer = TensorFileWriter::create(&workspace.path("one.safetensors"), Existing::Keep).unwrap();
    let id = writer.add_tensor("w.weight".to_owned(), Dtype::BF16);
    writer.append(id, &bytes_of(Dtype::BF16, (0..n_rows * d_in).map(|i| bell(i as u64)))).unwrap();
    writer.finish_tensor(id, vec![n_rows as u64, d_in as u64]);
    writer.finish(&Context::default(), &Default::default()).unwrap();
}

#[test]
fn device_memory_is_bounded_and_pieces_overlap() {
    let Some(workspace) = Workspace::new() else { return };
    one_weight(&workspace, 6000, 1024);
    workspace.same_mask("one.safetensors --targets w --k 2 --threads 2 --gpu-memory 16M", &[]);
    let stats = workspace.stats();
    assert!(stats.get("most_device_bytes") <= 16 << 20, "{}", stats.0);
    assert!(stats.get("most_host_bytes") <= 128 << 20, "{}", stats.0);
    assert_eq!(stats.get("most_streams"), 2);
    // A stream with the work of two pieces at once: the second was submitted before the first was waited for.
    workspace.same_mask("one.safetensors --targets w --k 2 --threads 1 --max-memory 32M", &[]);
    let one_piece = 5; // fill, upload, kernel, two downloads; and an event for each copy
    assert!(workspace.stats().get("most_waiting") > one_piece + 3, "{}", workspace.stats().0);
}

#[test]
fn a_device_with_little_memory_uses_smaller_blocks_or_reports_its_need() {
    let Some(workspace) = Workspace::new() else { return };
    workspace.same_mask("BASE --k 3 --threads 1", &[("FAKE_CUDA_MEMORY", "6000")]);
    assert!(workspace.stats().get("most_device_bytes") <= 6000);
    // With more threads than memory allows, some wait.
    workspace.same_mask("BASE --k 3 --threads 8", &[("FAKE_CUDA_MEMORY", "3000")]);
    let output = workspace.run("mask BASE --k 3 -o m --device cuda --threads 1", &[("FAKE_CUDA_MEMORY", "300")]);
    assert_eq!(code(&output), 5);
    let message = stderr(&output);
    assert!(
        message.starts_with("error: GPU 0: choosing in rows needs ") && message.contains("bytes of device memory, "),
        "{message}"
    );
    assert!(message.ends_with("hint: --device cpu does the same without the GPU\n"), "{message}");
    assert!(!workspace.path("m").exists());
}

#[test]
fn a_kernel_that_fails_is_named_and_nothing_is_written() {
    let Some(workspace) = Workspace::new() else { return };
    for nth in ["1", "2", "9"] {
        let output = workspace.run("mask BASE --k 3 -o m --device cuda", &[("FAKE_CUDA_FAIL", nth)]);
        let message = stderr(&output);
        assert_eq!(code(&output), 5, "{message}");
        assert!(
            message.contains("GPU 0: kernel `topk_warp_u16`") && message.contains("CUDA_ERROR_ILLEGAL_ADDRESS"),
            "{message}"
        );
        assert!(!workspace.path("m").exists());
    }
}

#[test]
fn a_wrong_result_is_found() {
    let Some(workspace) = Workspace::new() else { return };
    // The previous content of the memory is not a valid choice of columns.
    let output = workspace.run("mask BASE --k 3 -o m --device cuda", &[("FAKE_CUDA_SKIP", "1")]);
    let message = stderr(&output);
    assert_eq!(code(&output), 5, "{message}");
    assert!(
        message.contains("gave a wrong result: row 0 of ") && message.contains("columns do not ascend"),
        "{message}"
    );
    // A stale result of the same shape is valid, and only the CPU can detect it.
    let variables = [("FAKE_CUDA_SKIP", "10")];
    let unchecked = workspace.run("mask BASE --k 1 -o m --device cuda --threads 1", &variables);
    assert_eq!(code(&unchecked), 0, "{}", stderr(&unchecked));
    let checked = workspace.run("mask BASE --k 1 -o n --device cuda --threads 1 --check=1", &variables);
    assert_eq!(code(&checked), 5);
    assert!(stderr(&checked).contains("its columns are not the largest"), "{}", stderr(&checked));
    assert!(!workspace.path("n").exists());
}

#[test]
fn a_nan_is_named_as_on_the_cpu() {
    let Some(workspace) = Workspace::new() else { return };
    let mut writer = TensorFileWriter::create(&workspace.path("nan.safetensors"), Existing::Keep).unwrap();
    let id = writer.add_tensor("w.weight".to_owned(), Dtype::F16);
    let values = (0..3000).map(|i| if i >= 2710 && i % 5 == 0 { f64::NAN } else { 1.0 });
    writer.append(id, &bytes_of(Dtype::F16, values)).unwrap();
    writer.finish_tensor(id, vec![30, 100]);
    writer.finish(&Context::default(), &Default::default()).unwrap();
    for k in [1, 3, 50] {
        let [cpu, gpu] = ["cpu", "cuda"].map(|device| {
            workspace.run(&format!("mask nan.safetensors --targets w --k {k} -o m --device {device}"), &[])
        });
        assert_eq!((code(&gpu), stderr(&gpu)), (3, stderr(&cpu)));
        assert!(stderr(&gpu).contains("row 27, column 10: the weight is not a number"), "{}", stderr(&gpu));
    }
}

#[test]
fn unsupported_rows_are_chosen_on_the_cpu_and_reported() {
    let Some(workspace) = Workspace::new() else { return };
    for line in ["--k 2 --score random", "--k 2 --scope tensor"] {
        let output = workspace.run(&format!("mask BASE {line} --force -o m --device cuda"), &[]);
        assert_eq!(code(&output), 0);
        assert!(stderr(&output).starts_with("note: rows chosen on the CPU: all; "), "{}", stderr(&output));
    }
    let output = workspace.run("diff BASE BASE --device cuda", &[]);
    assert_eq!(stderr(&output), "note: this command does all of its work on the CPU\n");
    // Without --device, the program does not search for a GPU.
    let output = workspace.run("mask BASE --k 2 --force -o m -v", &[]);
    assert!(!stderr(&output).contains("GPU"), "{}", stderr(&output));
}

#[test]
fn the_reason_why_a_gpu_cannot_be_used_is_reported() {
    let Some(workspace) = Workspace::new() else { return };
    let report = |variables: &[(&str, &str)]| workspace.devices(variables);
    line(&report(&[]), "cuda:0  Fake GPU 0  compute capability 9.0  1.07 GB  can be used");
    line(&report(&[("FAKE_CUDA_DEVICES", "0")]), "no GPU can be used  the driver found no device");
    line(
        &report(&[("FAKE_CUDA_VERSION", "11080")]),
        "the driver supports CUDA 11.8; expected 12.0 (driver 525) or newer",
    );
    line(&report(&[("FAKE_CUDA_MAJOR", "7")]), "compute capability 7.0; expected 8.0 (Ampere) or newer");
    let stub = stub_library(&workspace, "libcuda.so", "cuInit");
    let stub = stub.to_str().unwrap();
    line(&report(&[("LD_LIBRARY_PATH", stub)]), "the driver lacks cuCtxGetCurrent (35 of the required functions)");
    let refused = |line: &str, variables: &[(&str, &str)]| {
        let output = workspace.run(line, variables);
        assert_eq!(code(&output), 2, "{}", stderr(&output));
        assert!(!workspace.path("m").exists());
        stderr(&output)
    };
    let mask = "mask BASE --k 1 -o m --device cuda";
    line(
        &refused(mask, &[("FAKE_CUDA_DEVICES", "0")]),
        "error: no GPU can be used: the driver found no device\nhint: ",
    );
    line(&refused(mask, &[("LD_LIBRARY_PATH", stub)]), "error: no GPU can be used: the driver lacks cuCtxGetCurrent");
    line(&refused(&format!("{mask}:3"), &[]), "error: there is no GPU 3: only GPU 0 was found");
    // On machines without a driver of their own.
    let nothing = report(&[("LD_LIBRARY_PATH", "")]);
    if nothing.contains("NVIDIA driver  for CUDA") {
        eprintln!("skipped: this machine has a driver");
    } else {
        line(&nothing, "no GPU can be used  there is no NVIDIA driver (libcuda.so.1 was not found)");
        line(&refused(mask, &[("LD_LIBRARY_PATH", "")]), "error: no GPU can be used: there is no NVIDIA driver");
    }
}

#[test]
fn cublaslt_is_reported_or_where_it_was_searched() {
    let Some(workspace) = Workspace::new() else { return };
    let report = |variables: &[(&str, &str)]| workspace.devices(variables);
    let fake = workspace.driver.join("libcublasLt.so.12");
    // Next to the driver, on the loader's path.
    line(&report(&[]), &format!("cuBLASLt       12.8.4, {}\n", fake.display()));
    // In the folder set by the variable, which takes precedence; a driver for CUDA 13 works with both versions.
    let folder = workspace.path("libraries");
    let named = folder.to_str().unwrap();
    fs::create_dir(&folder).unwrap();
    for name in ["libcublasLt.so.12", "libcublasLt.so.13"] {
        fs::copy(&fake, folder.join(name)).unwrap();
    }
    line(&report(&[("NEUROADA_CUDA_LIB", named)]), &format!("cuBLASLt       12.8.4, {named}/libcublasLt.so.12\n"));
    let newer = [("NEUROADA_CUDA_LIB", named), ("FAKE_CUDA_VERSION", "13000")];
    line(&report(&newer), &format!("cuBLASLt       12.8.4, {named}/libcublasLt.so.13\n"));
    // An empty folder; a file that is not a library; a library that lacks functions.
    let empty = workspace.path("empty");
    fs::create_dir(&empty).unwrap();
    let empty = empty.to_str().unwrap();
    let nothing = report(&[("NEUROADA_CUDA_LIB", empty)]);
    line(&nothing, "no cuBLASLt    needed by train and eval only; libcublasLt.so.12 was not found\n");
    line(&nothing, &format!("               in NEUROADA_CUDA_LIB={empty}\n"));
    fs::write(folder.join("libcublasLt.so.12"), "words").unwrap();
    let no_library = report(&[("NEUROADA_CUDA_LIB", named)]);
    line(&no_library, &format!("in NEUROADA_CUDA_LIB={named} ({named}/libcublasLt.so.12: "));
    let stub = stub_library(&workspace, "libcublasLt.so.12", "cublasLtCreate");
    let lacking = report(&[("NEUROADA_CUDA_LIB", stub.to_str().unwrap())]);
    line(&lacking, "libcublasLt.so.12` cannot be used: it lacks cublasLtGetVersion (12 of the functions needed)\n");
    // A machine without a driver does not report it.
    if !report(&[("LD_LIBRARY_PATH", "")]).contains("NVIDIA driver  for CUDA") {
        assert!(!report(&[("LD_LIBRARY_PATH", "")]).contains("cuBLASLt"));
    }
}

#[test]
fn cublaslt_is_found_in_python_packages() {
    let Some(workspace) = Workspace::new() else { return };
    let driver = workspace.path("driver");
    let put = |from: &Path, to: &Path| {
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from, to).unwrap();
    };
    put(&workspace.driver.join("libcuda.so"), &driver.join("libcuda.so"));
    let driver = driver.to_str().unwrap();
    let report = |variables: &[(&str, &str)]| {
        let variables = [&[("LD_LIBRARY_PATH", driver)], variables].concat();
        stdout(&workspace.run("inspect --devices", &variables))
    };
    if report(&[]).contains("cuBLASLt       ") {
        eprintln!("skipped: this machine has a cuBLASLt of its own");
        return;
    }
    for (variable, folder, inside) in [
        ("CUDA_HOME", "cuda", "cuda/lib64"),
        ("VIRTUAL_ENV", "venv", "venv/lib/python3.12/site-packages/nvidia/cu13/lib"),
        ("CONDA_PREFIX", "conda", "conda/lib/python3.11/site-packages/nvidia/cublas/lib"),
        ("PATH", "system/bin", "system/lib/python3/dist-packages/nvidia/cublas/lib"),
        ("HOME", "home", "home/.local/lib/python3.13/site-packages/nvidia/cublas/lib"),
    ] {
        let library = workspace.path(inside).join("libcublasLt.so.12");
        put(&workspace.driver.join("libcublasLt.so.12"), &library);
        let folder = workspace.path(folder);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("python3"), "").unwrap();
        let found = report(&[(variable, folder.to_str().unwrap())]);
        let expected = format!("cuBLASLt       12.8.4, {}\n", library.display());
        assert!(found.contains(&expected), "{variable}: {found}");
    }
}

/// A folder with a library of this name that has one function.
fn stub_library(workspace: &Workspace, name: &str, function: &str) -> PathBuf {
    let folder = workspace.path("stub");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("stub.cpp"), format!("extern \"C\" int {function}(unsigned) {{ return 0; }}\n")).unwrap();
    let compiler = driver::compiler().expect("the fake driver was built");
    let mut command = Command::new(compiler);
    command.args(["-shared", "-fPIC", "-o", name, "stub.cpp"]).current_dir(&folder);
    assert!(command.status().unwrap().success());
    folder
}
