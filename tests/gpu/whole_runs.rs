//! The kernels' tests again in other environments, each in its own process.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use crate::driver::{self, Build};

/// Runs the tests of `kernels` in a process with other environment variables.
fn kernels_with(folder: &Path, variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(std::env::current_exe().expect("tests know where they are"));
    command
        .args(["kernels::", "products::", "attention::", "operations::"])
        .args(["--test-threads=1", "--skip=greatest_length", "--skip=any_order"])
        .env("NEUROADA_TEST_DRIVER", folder);
    command.envs(variables.iter().copied()).output().expect("tests can run tests")
}

fn assert_passed(output: &Output) {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{out}\n{err}", output.status);
    assert!(out.contains("test result: ok. ") && !out.contains("ok. 0 passed"), "{out}");
}

#[test]
fn kernels_do_not_depend_on_thread_order() {
    if driver::is_real() {
        return;
    }
    let Some(folder) = driver::folder(Build::Fast) else { return };
    assert_passed(&kernels_with(&folder, &[("FAKE_CUDA_REVERSE", "1")]));
}

#[test]
fn kernels_access_nothing_outside_their_memory() {
    if driver::is_real() {
        return;
    }
    let Some(folder) = driver::folder(Build::Sanitized) else { return };
    let Some(runtime) = sanitizer() else { return };
    let options = "detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=0";
    let variables = [("LD_PRELOAD", runtime.to_str().expect("a path in words")), ("ASAN_OPTIONS", options)];
    assert_passed(&kernels_with(&folder, &variables));
    // Check that the sanitizer works: the driver makes an out-of-bounds access on request.
    let output = kernels_with(&folder, &[variables[0], variables[1], ("FAKE_CUDA_OVERRUN", "1")]);
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && err.contains("heap-buffer-overflow"), "{err}");
}

/// The sanitizer runtime, which must be preloaded.
fn sanitizer() -> Option<PathBuf> {
    let output = Command::new(driver::compiler()?).arg("-print-file-name=libasan.so").output().ok()?;
    let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    if !path.is_absolute() {
        eprintln!("skipped: the compiler has no shared AddressSanitizer");
        return None;
    }
    Some(path.canonicalize().unwrap_or(path))
}

/// Runs a kernel of `misuse.cpp`; returns the shim's message before it aborts.
fn misuse(which: &str) -> Option<String> {
    let compiler = driver::compiler()?;
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let program = folder.path().join("misuse");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gpu/misuse.cpp");
    let built = Command::new(compiler).args(["-std=c++17", "-O1", "-o"]).arg(&program).arg(source).output();
    let built = built.expect("the compiler was just seen to run");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let output = Command::new(&program).arg(which).output().expect("what was built runs");
    assert!(!output.status.success(), "{which} is not noticed");
    Some(String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn divergent_barriers_and_warp_exchanges_are_detected() {
    let message = |which: &str, expected: &str| {
        let Some(message) = misuse(which) else { return };
        assert!(message.contains(expected), "{which}: {message}");
    };
    message("barrier_after_return", "__syncthreads, and the others have left");
    message("barrier_in_branch", "nobody can go on");
    message("shuffle_in_branch", "nobody can go on");
    message("ballot_against_shuffle", "lanes of a warp wait for different exchanges");
    message("shuffle_after_return", "an exchange of a warp, of which lanes have left");
}

#[test]
fn the_fake_driver_has_exactly_the_required_functions() {
    let text =
        |path: &str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect("sources are there");
    let driver = text("tests/gpu/fake_driver.cpp");
    let defined = driver.lines().filter_map(|line| line.strip_prefix("API ")?.split('(').next());
    let mut defined: Vec<&str> = defined.collect();
    let asking = text("src/gpu/launch/driver.rs");
    let list = asking.split("const SYMBOLS").nth(1).expect("the list is there").split("];").next().expect("it ends");
    let mut asked: Vec<&str> = list.split('"').skip(1).step_by(2).collect();
    defined.sort_unstable();
    asked.sort_unstable();
    assert_eq!(defined, asked);
}

#[test]
fn every_kernel_file_is_in_the_ptx_archive() {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gpu/kernels");
    let archive = fs::read(kernels.join("ptx.tar.zst")).expect("the archive is committed");
    let tar = zstd::decode_all(archive.as_slice()).expect("it is whole");
    let tar = String::from_utf8(tar).expect("PTX and the headers of a tar archive are text");
    let paths = fs::read_dir(kernels).expect("sources are there").map(|entry| entry.expect("likewise").path());
    let sources: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|end| end == "cu")).collect();
    for source in &sources {
        let name = source.file_stem().expect("a file has a name").to_string_lossy();
        assert!(tar.contains(&format!("{name}.ptx\0")), "{name}");
    }
    // Supported by drivers from 525, for devices from compute capability 8.0.
    assert_eq!(tar.matches("\n.version 8.0\n.target sm_80\n").count(), sources.len());
}
