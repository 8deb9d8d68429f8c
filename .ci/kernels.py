#!/usr/bin/env python3
"""Compiles src/gpu/kernels/*.cu to PTX with one pinned compiler, so that anyone gets the same bytes.

    .ci/kernels.py            write src/gpu/kernels/ptx/*.ptx
    .ci/kernels.py --check    compare with what is committed, then compile that for each GPU generation; fails on
                              register spills. Says so and passes where the compilers cannot be had.

Needs Python 3.8 or newer with venv and a PyPI mirror; about 180 MB go to target/kernels. No GPU, no toolkit.
NVRTC 12.0 writes PTX ISA 8.0, which drivers from 525 on load, for compute_80 and everything newer.
"""

import ctypes
import glob
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
KERNELS = ROOT / "src/gpu/kernels"
VENV = ROOT / "target/kernels"
WHEELS = ["nvidia-cuda-nvrtc-cu12==12.0.140", "nvidia-cuda-nvcc==13.0.88"]
OPTIONS = ["--gpu-architecture=compute_80", "--std=c++17", "--fmad=false", "--extra-device-vectorization", "-default-device", f"-I{KERNELS}"]
GENERATIONS = ["sm_80", "sm_90", "sm_100", "sm_120"]


def tools():
    """The compiler's library and ptxas, or the reason why they cannot be had."""
    pip = VENV / "bin/pip"
    try:
        if not pip.exists():
            subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True, capture_output=True, text=True)
        subprocess.run([str(pip), "install", "--quiet", "--disable-pip-version-check", *WHEELS], check=True,
                       capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as e:
        words = (getattr(e, "stderr", "") or str(e)).strip().splitlines()
        return None, words[-1] if words else str(e)
    found = [glob.glob(str(VENV / "lib/python3*/site-packages/nvidia" / name)) for name in
             ("cuda_nvrtc/lib/libnvrtc.so.12", "cuda_nvrtc/lib/libnvrtc-builtins.so.12.0", "cu13/bin/ptxas")]
    if not all(found):
        return None, "the wheels do not hold what they should"
    return [paths[0] for paths in found], None


def compiler(nvrtc_path, builtins_path):
    """A function from source to PTX."""
    ctypes.CDLL(builtins_path, ctypes.RTLD_GLOBAL)  # found by its name from here on
    nvrtc = ctypes.CDLL(nvrtc_path)

    def compile_one(path):
        program = ctypes.c_void_p()
        # The program's name is all that the PTX could tell of where it was made.
        code = nvrtc.nvrtcCreateProgram(ctypes.byref(program), path.read_bytes(), path.name.encode(), 0, None, None)
        assert code == 0, f"{path.name}: nvrtcCreateProgram: {code}"
        options = (ctypes.c_char_p * len(OPTIONS))(*[option.encode() for option in OPTIONS])
        code = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options)
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        if words := log.value.decode().strip():
            print(words, file=sys.stderr)
        if code != 0:
            sys.exit(f"error: {path.name} does not compile")
        nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
        ptx = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetPTX(program, ptx)
        return ptx.value

    return compile_one


def check_generations(ptxas, path):
    """Compiles PTX for each generation; the number of kernels that spill registers."""
    n_spilling = 0
    for generation in GENERATIONS:
        done = subprocess.run([ptxas, "-v", f"-arch={generation}", "-o", "/dev/null", str(path)], capture_output=True, text=True)
        words = done.stdout + done.stderr
        if done.returncode != 0:
            sys.exit(f"error: {path.name} for {generation}:\n{words}")
        kernels = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
                             words, re.DOTALL)
        for name, stores, loads, registers in kernels:
            spills = int(stores) + int(loads)
            n_spilling += spills > 0
            print(f"  {generation:7} {name:18} {registers:>3} registers" + (f", SPILLS {spills} bytes" if spills else ""))
    return n_spilling


def main():
    found, why = tools()
    if not found:
        if "--check" in sys.argv:
            print(f"skipped: the compilers cannot be had here: {why}")
            return
        sys.exit(f"error: the compilers cannot be had here: {why}")
    nvrtc_path, builtins_path, ptxas = found
    compile_one = compiler(nvrtc_path, builtins_path)
    n_wrong = 0
    for path in sorted(KERNELS.glob("*.cu")):
        ptx, committed = compile_one(path), KERNELS / "ptx" / f"{path.stem}.ptx"
        if "--check" not in sys.argv:
            committed.write_bytes(ptx)
            print(f"{committed.relative_to(ROOT)}: {len(ptx)} bytes")
            continue
        is_same = committed.exists() and committed.read_bytes() == ptx
        print(f"{committed.relative_to(ROOT)}: {'as committed' if is_same else 'DIFFERS: run .ci/kernels.py'}")
        n_wrong += not is_same
        n_wrong += check_generations(ptxas, committed)
    if n_wrong:
        sys.exit("error: the committed PTX is not what the sources make, or registers spill")


main()
