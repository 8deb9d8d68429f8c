#!/usr/bin/env python3
"""Compiles src/gpu/kernels/*.cu to PTX with one pinned compiler, so that anyone gets the same bytes.

    .ci/kernels.py            write src/gpu/kernels/ptx.tar.zst, which holds one .ptx for each .cu
    .ci/kernels.py --check    compare with what is committed, then compile that for each GPU generation; fails on
                              register spills. Says so and passes where the compilers cannot be had.

The archive is an ordinary one: `tar --zstd -xf src/gpu/kernels/ptx.tar.zst` unpacks it. The check compares what it holds, so
another version of zstd may write it in other bytes.

Needs Python 3.9 or newer with venv and a PyPI mirror; about 180 MB go to target/kernels. No GPU, no toolkit.
NVRTC 12.0 writes PTX ISA 8.0, which drivers from 525 on load, for compute_80 and everything newer.
"""

import ctypes
import glob
import io
import pathlib
import re
import subprocess
import sys
import tarfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
KERNELS = ROOT / "src/gpu/kernels"
ARCHIVE = KERNELS / "ptx.tar.zst"
VENV = ROOT / "target/kernels"
WHEELS = ["nvidia-cuda-nvrtc-cu12==12.0.140", "nvidia-cuda-nvcc==13.0.88", "zstandard==0.25.0"]
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


def zstd(expression, data):
    """What `expression` makes of `data`; evaluated by the Python of the venv, which has the zstandard package."""
    code = f"import sys, zstandard; data = sys.stdin.buffer.read(); sys.stdout.buffer.write({expression})"
    return subprocess.run([str(VENV / "bin/python"), "-c", code], input=data, stdout=subprocess.PIPE, check=True).stdout


def pack(files):
    """The archive of `files`, a dict from names to bytes: sorted, without times and owners, so that the same files give the same bytes."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in sorted(files.items()):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return zstd("zstandard.ZstdCompressor(level=19).compress(data)", tar.getvalue())


def unpack(archive_bytes):
    """The files of an archive, from names to bytes."""
    tar = io.BytesIO(zstd("zstandard.ZstdDecompressor().decompress(data)", archive_bytes))
    with tarfile.open(fileobj=tar) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def check_generations(ptxas, file_name, ptx):
    """Compiles PTX for each generation; the number of kernels that spill registers."""
    path = VENV / file_name
    path.write_bytes(ptx)
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


def check(ptxas, compiled):
    """Compares what was compiled with what is committed, and looks for register spills in that."""
    committed = unpack(ARCHIVE.read_bytes()) if ARCHIVE.exists() else {}
    n_wrong = 0
    for name in sorted(compiled.keys() | committed.keys()):
        is_same = committed.get(name) == compiled.get(name)
        print(f"{name}: {'as committed' if is_same else 'DIFFERS: run .ci/kernels.py'}")
        n_wrong += not is_same
        if name in committed:
            n_wrong += check_generations(ptxas, name, committed[name])
    if n_wrong:
        sys.exit("error: the committed PTX is not what the sources make, or registers spill")


def main():
    found, why = tools()
    if not found:
        if "--check" in sys.argv:
            print(f"skipped: the compilers cannot be had here: {why}")
            return
        sys.exit(f"error: the compilers cannot be had here: {why}")
    nvrtc_path, builtins_path, ptxas = found
    compile_one = compiler(nvrtc_path, builtins_path)
    compiled = {f"{path.stem}.ptx": compile_one(path) for path in sorted(KERNELS.glob("*.cu"))}
    if "--check" in sys.argv:
        return check(ptxas, compiled)
    ARCHIVE.write_bytes(pack(compiled))
    n_bytes = sum(len(ptx) for ptx in compiled.values())
    print(f"{ARCHIVE.relative_to(ROOT)}: {len(compiled)} files, {n_bytes} bytes, {ARCHIVE.stat().st_size} compressed")


main()
