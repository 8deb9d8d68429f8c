//! cuBLASLt: a table of function pointers, resolved by name in the library that was found.
//!
//! cudarc's bindings are not used: they load the first library of that name that the loader finds, which need not be
//! the one found here, and panic if it lacks a function; and a status added by a newer library would be an invalid
//! value of their enum.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use super::detect::detect;
use crate::gpu::{
    GpuError,
    library::{BlasLibrary, search_locations},
};

/// The status of a call: 0, or an error.
pub(super) type Status = c_int;
/// A handle, a descriptor of matrices, products or preferences, or device memory.
pub(super) type Opaque = *mut c_void;

/// An algorithm for a product; opaque.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Algorithm([u64; 8]);

/// A proposal of the library for a product.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Proposal {
    pub(super) algorithm: Algorithm,
    pub(super) workspace_bytes: usize,
    pub(super) status: Status,
    waves: f32,
    reserved: [c_int; 4],
}

impl Proposal {
    pub(super) const EMPTY: Self =
        Self { algorithm: Algorithm([0; 8]), workspace_bytes: 0, status: -1, waves: 0.0, reserved: [0; 4] };
}

// Constants of cublasLt.h, library_types.h and cublas_api.h, the same in CUDA 12 and 13.
pub(super) const R_32F: c_int = 0;
pub(super) const R_16F: c_int = 2;
pub(super) const R_16BF: c_int = 14;
/// Products and sums in float32, without TF32.
pub(super) const COMPUTE_32F: c_int = 68;
pub(super) const OP_T: c_int = 1;
pub(super) const DESC_TRANSA: c_int = 3;
pub(super) const DESC_TRANSB: c_int = 4;
pub(super) const PREF_MAX_WORKSPACE_BYTES: c_int = 1;
pub(super) const PREF_REDUCTION_SCHEME_MASK: c_int = 3;
pub(super) const PREF_MIN_ALIGNMENT: [c_int; 4] = [5, 6, 7, 8];
pub(super) const REDUCTION_SCHEME_COMPUTE_TYPE: u32 = 2;

macro_rules! functions {
    ($($field:ident = $name:literal ($($arg:ty),*) -> $out:ty;)*) => {
        /// The functions of the library that are used.
        pub(super) struct Functions {
            $(pub(super) $field: unsafe extern "C" fn($($arg),*) -> $out,)*
        }

        const SYMBOLS: &[&CStr] = &[$($name),*];

        impl Functions {
            /// # Safety
            /// `handle` is a cuBLASLt that has all of [`SYMBOLS`], and is never closed.
            unsafe fn of(handle: *mut c_void) -> Self {
                Self {
                    $($field: {
                        // SAFETY: the function of that name, with the signature that cublasLt.h declares.
                        unsafe {
                            let at = libc::dlsym(handle, $name.as_ptr());
                            std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) -> $out>(at)
                        }
                    },)*
                }
            }
        }
    };
}

functions! {
    get_version = c"cublasLtGetVersion" () -> usize;
    create = c"cublasLtCreate" (*mut Opaque) -> Status;
    destroy = c"cublasLtDestroy" (Opaque) -> Status;
    desc_create = c"cublasLtMatmulDescCreate" (*mut Opaque, c_int, c_int) -> Status;
    desc_set = c"cublasLtMatmulDescSetAttribute" (Opaque, c_int, *const c_void, usize) -> Status;
    desc_destroy = c"cublasLtMatmulDescDestroy" (Opaque) -> Status;
    layout_create = c"cublasLtMatrixLayoutCreate" (*mut Opaque, c_int, u64, u64, i64) -> Status;
    layout_destroy = c"cublasLtMatrixLayoutDestroy" (Opaque) -> Status;
    preference_create = c"cublasLtMatmulPreferenceCreate" (*mut Opaque) -> Status;
    preference_set = c"cublasLtMatmulPreferenceSetAttribute" (Opaque, c_int, *const c_void, usize) -> Status;
    preference_destroy = c"cublasLtMatmulPreferenceDestroy" (Opaque) -> Status;
    propose = c"cublasLtMatmulAlgoGetHeuristic"
        (Opaque, Opaque, Opaque, Opaque, Opaque, Opaque, Opaque, c_int, *mut Proposal, *mut c_int) -> Status;
    matmul = c"cublasLtMatmul" (
        Opaque, Opaque, *const f32, Opaque, Opaque, Opaque, Opaque, *const f32, Opaque, Opaque, Opaque, Opaque, *const Algorithm,
        Opaque, usize, Opaque
    ) -> Status;
}

/// The library, loaded for the rest of the process.
pub(in crate::gpu) struct Library {
    pub(super) functions: Functions,
    facts: BlasLibrary,
}

impl Library {
    pub(in crate::gpu) fn facts(&self) -> &BlasLibrary {
        &self.facts
    }
}

/// Finds cuBLASLt and loads it, once per process; needs no device.
///
/// If `NEUROADA_CUDA_LIB` is set, only that folder is searched. Otherwise: the loader's path, `$CUDA_HOME`,
/// `/usr/local/cuda`, and the packages of `$VIRTUAL_ENV`, `$CONDA_PREFIX` and the `python3` on the `PATH`.
///
/// # Errors
/// [`GpuError::NoLibrary`] lists the searched locations, [`GpuError::BadLibrary`] the missing functions.
pub fn blas_library() -> Result<BlasLibrary, GpuError> {
    cublaslt().map(|library| library.facts().clone())
}

/// cuBLASLt, found once per process.
pub(super) fn cublaslt() -> Result<&'static Library, GpuError> {
    static FOUND: OnceLock<Result<Library, GpuError>> = OnceLock::new();
    FOUND.get_or_init(find).as_ref().map_err(Clone::clone)
}

fn find() -> Result<Library, GpuError> {
    let (names, places) = search_locations(detect().driver.as_deref());
    let mut searched = Vec::new();
    for place in places {
        let mut message = Vec::new();
        for file in &place.files {
            match load(file) {
                Ok(handle) => return library_of(handle, file),
                // The loader's message begins with the file.
                Err(words) => message.push(words),
            }
        }
        searched.push(if message.is_empty() { place.name } else { format!("{} ({})", place.name, message.join("; ")) });
    }
    Err(GpuError::NoLibrary { names: names.join(" or "), searched })
}

/// Loads a library by its path, or by its name on the loader's path; it is never closed.
///
/// Its symbols are visible to libraries loaded later, as cuBLAS requires.
fn load(file: &Path) -> Result<*mut c_void, String> {
    let name = CString::new(file.as_os_str().as_bytes()).map_err(|_| "its path contains a zero byte".to_owned())?;
    // SAFETY: a null-terminated string; the library's initializers are NVIDIA's, or those of a library that the user
    // put in its place.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if !handle.is_null() {
        return Ok(handle);
    }
    // SAFETY: a string that is valid until this thread's next loader call, or null.
    let words = unsafe { libc::dlerror().as_ref().map(|words| CStr::from_ptr(words).to_string_lossy().into_owned()) };
    Err(words.unwrap_or_else(|| format!("{}: the loader gives no reason", file.display())))
}

fn library_of(handle: *mut c_void, file: &Path) -> Result<Library, GpuError> {
    let path = path_of(handle).unwrap_or_else(|| file.to_owned());
    // SAFETY: an open library; names are looked up, not called.
    let lacks = |name: &&&CStr| unsafe { libc::dlsym(handle, name.as_ptr()).is_null() };
    let missing: Vec<_> = SYMBOLS.iter().filter(lacks).collect();
    if let Some(first) = missing.first() {
        let why = format!("it lacks {} ({} of the functions needed)", first.to_string_lossy(), missing.len());
        return Err(GpuError::BadLibrary { path, why });
    }
    // SAFETY: it has every function, as just checked, and is never closed.
    let functions = unsafe { Functions::of(handle) };
    // SAFETY: takes nothing and returns a number.
    let number = unsafe { (functions.get_version)() };
    let version = format!("{}.{}.{}", number / 10_000, number / 100 % 100, number % 100);
    Ok(Library { functions, facts: BlasLibrary { version, path } })
}

/// The file that an open library was loaded from.
fn path_of(handle: *mut c_void) -> Option<PathBuf> {
    // SAFETY: an open library; if it has the function, the loader fills the struct with strings that are valid while
    // it is open.
    unsafe {
        let at = libc::dlsym(handle, SYMBOLS[0].as_ptr());
        let mut facts: libc::Dl_info = std::mem::zeroed();
        if at.is_null() || libc::dladdr(at, &mut facts) == 0 || facts.dli_fname.is_null() {
            return None;
        }
        let name: *const c_char = facts.dli_fname;
        Some(std::ffi::OsString::from_vec(CStr::from_ptr(name).to_bytes().to_vec()).into())
    }
}

/// The library's name of a status.
pub(super) fn name_of(status: Status) -> String {
    let name = match status {
        1 => "CUBLAS_STATUS_NOT_INITIALIZED",
        3 => "CUBLAS_STATUS_ALLOC_FAILED",
        7 => "CUBLAS_STATUS_INVALID_VALUE",
        8 => "CUBLAS_STATUS_ARCH_MISMATCH",
        11 => "CUBLAS_STATUS_MAPPING_ERROR",
        13 => "CUBLAS_STATUS_EXECUTION_FAILED",
        14 => "CUBLAS_STATUS_INTERNAL_ERROR",
        15 => "CUBLAS_STATUS_NOT_SUPPORTED",
        16 => "CUBLAS_STATUS_LICENSE_ERROR",
        other => return format!("cuBLAS status {other}"),
    };
    name.to_owned()
}
