//! The driver used by the tests: built here from C++, or the machine's own.

use std::{
    ffi::CString,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use neuroada_ckpt::internals::gpu::{Gpu, Queue};

/// The build of the fake driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Build {
    Fast,
    /// With AddressSanitizer and UndefinedBehaviorSanitizer, which detect out-of-bounds accesses of kernels.
    Sanitized,
}

/// Whether to use the machine's own driver.
pub(crate) fn is_real() -> bool {
    std::env::var_os("NEUROADA_TEST_GPU").is_some_and(|which| which == "real")
}

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gpu")
}

pub(crate) fn compiler() -> Option<&'static str> {
    static FOUND: OnceLock<Option<&str>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let runs =
            |name: &&str| Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success());
        let found = ["c++", "g++", "clang++"].into_iter().find(runs);
        if found.is_none() {
            eprintln!("skipped: no C++ compiler (c++, g++ or clang++) to build the fake driver with");
        }
        found.filter(|_| cfg!(target_os = "linux"))
    })
}

/// The folder with the fake driver as `libcuda.so` and a cuBLASLt, built if needed; `None`, after printing the reason,
/// if it cannot be built.
pub(crate) fn folder(build: Build) -> Option<PathBuf> {
    static FAST: OnceLock<Option<PathBuf>> = OnceLock::new();
    static SANITIZED: OnceLock<Option<PathBuf>> = OnceLock::new();
    let once = if build == Build::Fast { &FAST } else { &SANITIZED };
    once.get_or_init(|| make(build)).clone()
}

/// The fake libraries: their sources and file names; a library that is already loaded is found by its name.
const LIBRARIES: [(&str, &str); 2] = [("fake_driver.cpp", "libcuda.so"), ("fake_cublaslt.cpp", "libcublasLt.so.12")];

fn make(build: Build) -> Option<PathBuf> {
    let compiler = compiler()?;
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fake-driver-{build:?}").to_lowercase());
    fs::create_dir_all(&folder).expect("folders can be made");
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gpu/kernels");
    let inputs = [sources(), kernels].into_iter().flat_map(|folder| fs::read_dir(folder).expect("sources are there"));
    let time = |path: &Path| fs::metadata(path).and_then(|facts| facts.modified()).ok();
    let newest = inputs.filter_map(|entry| time(&entry.ok()?.path())).max();
    for (source, name) in LIBRARIES {
        let library = folder.join(name);
        if time(&library) > newest {
            continue;
        }
        // Written to a temporary name, then renamed: another test may load it in the meantime.
        let made = folder.join(format!("{name}.{}", std::process::id()));
        let mut command = Command::new(compiler);
        command.args([
            "-std=c++17",
            "-fPIC",
            "-shared",
            "-ffp-contract=off",
            "-Wall",
            "-Wextra",
            "-Wno-unknown-pragmas",
        ]);
        match build {
            Build::Fast => command.arg("-O2"),
            Build::Sanitized => {
                command.args(["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
            }
        };
        command.arg(format!("-Wl,-soname,{name}")).arg("-o").arg(&made).arg(sources().join(source)).arg("-ldl");
        let output = command.output().expect("the compiler was just seen to run");
        if !output.status.success() && build == Build::Sanitized {
            eprintln!("skipped: {compiler} cannot build with sanitizers: {}", String::from_utf8_lossy(&output.stderr));
            return None;
        }
        assert!(output.status.success(), "{source} builds\n{}", String::from_utf8_lossy(&output.stderr));
        fs::rename(&made, &library).expect("files can be renamed");
    }
    Some(folder)
}

/// A queue on a device of this process; `None`, after printing the reason, if there is none.
pub(crate) fn queue() -> Option<Queue> {
    static IS_LOADED: OnceLock<bool> = OnceLock::new();
    let load = || {
        let given = std::env::var_os("NEUROADA_TEST_DRIVER").map(PathBuf::from);
        let Some(folder) = given.or_else(|| folder(Build::Fast)) else { return false };
        for (_, name) in LIBRARIES {
            let path = CString::new(folder.join(name).to_string_lossy().as_bytes()).expect("paths hold no zero");
            // SAFETY: the library was built from sources of this repository; its initializers only fill tables.
            #[allow(unsafe_code)]
            let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
            assert!(!handle.is_null(), "{name} loads");
        }
        true
    };
    if !is_real() && !*IS_LOADED.get_or_init(load) {
        return None;
    }
    let gpu = Gpu::open(0).expect("there is a device");
    Some(Queue::new(&gpu).expect("there is a stream"))
}
