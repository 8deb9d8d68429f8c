"""Compares `combine` with PEFT's own merge functions (peft.utils.merge_utils) on random deltas.

How to run, after `cargo build --release`:

    pip install torch numpy safetensors peft
    python tests/interop/combine_with_peft.py target/release/neuroada-ckpt

PEFT trims each tensor, the paper and `combine` each adapter as a whole: with one tensor they are the same. What is random
cannot be compared; there the share that is kept and the expected sum are.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft.utils.merge_utils import task_arithmetic, ties
from safetensors.torch import load_file, save_file

command = str(Path(sys.argv[1]).resolve())
folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
n_rows, d_in, k = 512, 256, 16
columns = torch.stack([torch.randperm(d_in)[:k].sort().values for _ in range(n_rows)]).to(torch.uint16)


def adapter(name):
    values = torch.randn(n_rows, k)
    target = {"dtype": "BF16", "shape": [n_rows, d_in], "anchor": "00" * 32}
    document = {"kind": "adapter", "version": 1, "scale": 1.0, "recipe": {"score": "custom"}, "base": {"name": "b"}, "targets": {"w": target}}
    save_file({"w.columns": columns, "w.values": values}, folder / name, metadata={"neuroada": json.dumps(document)})
    return values


values = [adapter(name) for name in "abc"]
weights = [1.0, 0.5, -2.0]
inputs = [f"{folder / name}={weight}" for name, weight in zip("abc", weights)]


def combine(*options):
    out = folder / "out"
    report = subprocess.check_output([command, "combine", *inputs, "-o", out, "--force", "--json", *options])
    return load_file(out)["w.values"], json.loads(report)


def compare(what, found, expected):
    # PEFT sums in float32, `combine` in float64: where sums cancel, only the absolute difference is small.
    worst = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"{what}: largest difference {worst:.2e} of the largest delta, {(found == expected).float().mean().item():.1%} equal bits")
    assert worst < 1e-6, what


compare("linear", combine()[0], task_arithmetic(values, torch.tensor(weights)))
for density in (0.2, 0.5, 1.0):
    compare(f"ties {density}", combine("--method", "ties", "--density", str(density))[0], ties(values, torch.tensor(weights), density))
found, report = combine("--method", "dare", "--density", "0.3", "--seed", "1")
share = [entry["n_kept"] / entry["n_deltas"] for entry in report["inputs"]]
print(f"dare 0.3: kept {share}")
assert all(abs(s - 0.3) < 0.02 for s in share)
