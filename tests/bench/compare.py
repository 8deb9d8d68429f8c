"""Times the choice of connections beside other ways to make it, in one run, and checks that all choose as well.

    cargo build --release
    python tests/bench/compare.py CHECKPOINT [--k 1 20] [--runs 3] [--methods neuroada-ckpt torch published numpy]

CHECKPOINT is a folder of safetensors files, such as the ones that `cargo bench --bench jobs` makes. Needs safetensors, and
torch or numpy for the methods of that name. Every method runs in a process of its own, on files in the page cache, and is
compared by the magnitudes it chose: equal in descending order, row by row, for every tensor. What is printed is the median time, the
ratio to this project's, and the peak of resident memory (mapped pages counted).

- neuroada-ckpt: `neuroada-ckpt mask`, the whole command, with its output file
- torch: `torch.topk` of the magnitudes, one tensor after the other through `safe_open`
- published: what the paper's code does per tensor: topk, a mask of the tensor's shape and type, its nonzero elements counted, and
  the positions of its zeros
- numpy: over a memory map; for k = 1 argmax of integer keys, else argpartition of them
"""

import argparse
import json
import re
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGET = re.compile(r"\.(q|k|v|o|gate|up|down)_proj\.weight$")
BINARY = Path(__file__).resolve().parents[2] / "target/release/neuroada-ckpt"


def shards(checkpoint):
    return sorted(Path(checkpoint).glob("*.safetensors"))


def bf16_targets(checkpoint):
    """Name and a read-only map of 16-bit patterns `[rows, columns]` of every target."""
    import numpy as np

    for path in shards(checkpoint):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
        for name, info in header.items():
            if TARGET.search(name):
                assert info["dtype"] == "BF16", f"{name}: this method reads bfloat16"
                begin, end = info["data_offsets"]
                yield name, data[begin:end].view(np.uint16).reshape(info["shape"])


def torch_targets(checkpoint):
    from safetensors import safe_open

    for path in shards(checkpoint):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if TARGET.search(name):
                    yield name, file.get_tensor(name)


def choose_torch(checkpoint, k):
    import torch

    for name, weight in torch_targets(checkpoint):
        yield name, torch.topk(weight.abs(), k, dim=1).indices.numpy()


def choose_published(checkpoint, k):
    import torch

    for name, weight in torch_targets(checkpoint):
        columns = torch.topk(weight.abs(), k, dim=1, largest=True).indices
        frozen = torch.ones_like(weight)
        frozen.scatter_(1, columns, 0)
        n_trainable = frozen.numel() - len(torch.nonzero(frozen))
        positions = torch.nonzero(frozen == 0, as_tuple=False)
        assert len(positions) == n_trainable
        yield name, positions[:, 1].reshape(-1, k).numpy()


def choose_numpy(checkpoint, k):
    import numpy as np

    for name, weight in bf16_targets(checkpoint):
        keys = weight & 0x7FFF
        if k == 1:
            yield name, keys.argmax(axis=1)[:, None]
        else:
            yield name, np.argpartition(keys, keys.shape[1] - k, axis=1)[:, -k:]


def choose_here(checkpoint, k, output):
    command = [BINARY, "mask", checkpoint, "--k", str(k), "-o", output, "--force", "-q", "--max-memory", "256M"]
    subprocess.run(list(map(str, command)), check=True)


METHODS = {"torch": choose_torch, "published": choose_published, "numpy": choose_numpy}


def worker(method, checkpoint, k, output):
    """Runs one method once; prints seconds and KiB, and leaves the columns in `output` where that is given."""
    chosen = {}
    began = time.perf_counter()
    if method == "neuroada-ckpt":
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            choose_here(checkpoint, k, output or Path(folder) / "mask.safetensors")
            seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    else:
        for module in {"torch": ["torch"], "published": ["torch"], "numpy": ["numpy"]}[method]:
            __import__(module)
        began = time.perf_counter()
        for name, columns in METHODS[method](checkpoint, k):
            chosen[name] = columns
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if output:
            import numpy as np

            np.savez(output, **chosen)
    print(json.dumps([seconds, peak]))


def magnitudes(checkpoint, chosen):
    """The chosen 16-bit magnitudes per target, in descending order within each row."""
    import numpy as np

    found = {}
    for name, weight in bf16_targets(checkpoint):
        columns = chosen(name)
        found[name] = -np.sort(-(np.take_along_axis(weight, columns, axis=1) & 0x7FFF).astype(np.int32), axis=1)
    return found


def run(method, checkpoint, k, output=""):
    command = [sys.executable, __file__, "--worker", method, checkpoint, str(k), str(output)]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(told.stdout)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 20])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["neuroada-ckpt", "torch", "published", "numpy"])
    options = parser.parse_args()
    for path in shards(options.checkpoint):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    import numpy as np
    from safetensors.numpy import load_file

    for k in options.k:
        with tempfile.TemporaryDirectory() as folder:
            times, answers = {method: [] for method in options.methods}, {}
            for turn in range(options.runs):
                for method in options.methods:
                    output = Path(folder) / f"{method}.{'safetensors' if method == 'neuroada-ckpt' else 'npz'}"
                    times[method].append(run(method, options.checkpoint, k, output if turn == 0 else ""))
                    answers[method] = output
            ours = load_file(answers["neuroada-ckpt"])
            expected = magnitudes(options.checkpoint, lambda name: ours[name + ".columns"].astype(np.int64))
            for method in options.methods:
                if method != "neuroada-ckpt":
                    theirs = np.load(answers[method])
                    found = magnitudes(options.checkpoint, lambda name: theirs[name])
                    equal = found.keys() == expected.keys() and all((found[n] == expected[n]).all() for n in found)
                    assert equal, f"{method} chose other magnitudes"
            fastest = statistics.median(seconds for seconds, _ in times["neuroada-ckpt"])
            for method in options.methods:
                seconds = statistics.median(seconds for seconds, _ in times[method])
                peak = max(peak for _, peak in times[method]) / 1024
                print(f"k={k:<4} {method:<14} {seconds:8.3f} s {seconds / fastest:7.1f} x {peak:9.0f} MiB", flush=True)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        _, _, method, checkpoint, k, output = sys.argv
        worker(method, checkpoint, int(k), Path(output) if output else None)
    else:
        main()
