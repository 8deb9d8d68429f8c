#!/usr/bin/env python3
"""Opt-in: is a model that the guide's snippet trains in PyTorch, bit for bit, the model that `merge` writes?

usage: train_elsewhere.py NEUROADA_CKPT      (Python with torch, transformers and safetensors; without them it says so and ends well)

Runs the Python block of src/guide/training_elsewhere.md as it is written, on fixtures/tiny-llama, in bf16 as stored and in float32, with a short
training loop in the place that the block leaves for it. Then mask, init and merge, and every tensor of the merged checkpoint is compared with
the trained model's. A random start makes deltas of all sizes, so that rounding matters.
"""
import os, pathlib, re, shutil, subprocess, sys, tempfile

try:
    import torch
    import transformers  # noqa: F401
    from safetensors.torch import load_file, save_file
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(0)

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.path.abspath(sys.argv[1])
LOOP = """
torch.manual_seed(1)
optimizer.param_groups[0]["lr"] = 1e-6
with torch.no_grad():
    for delta in deltas.values():
        delta.values.copy_(torch.randn(delta.values.shape) * 10.0 ** torch.randint(-6, 0, delta.values.shape))
tokens = torch.randint(0, model.config.vocab_size, (2, 24))
losses = []
for step in range(4):
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
"""


def snippet():
    """The block, with the base of this test and with a training loop."""
    page = (ROOT / "src/guide/training_elsewhere.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for old, new in [('BASE = "smollm2"', 'BASE = "base"'), ("# ... the training loop ...", LOOP)]:
        assert block.count(old) == 1, f"the snippet has no line {old}"
        block = block.replace(old, new)
    return block


def run(*words):
    subprocess.run([PROGRAM, *words, "-q"], check=True)


def weights(folder):
    return {name: tensor for path in sorted(pathlib.Path(folder).glob("*.safetensors")) for name, tensor in load_file(path).items()}


def check(dtype):
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        shutil.copytree(ROOT / "fixtures/tiny-llama", "base")
        if dtype != torch.bfloat16:
            for path in pathlib.Path("base").glob("*.safetensors"):
                save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
            config = pathlib.Path("base/config.json")
            config.write_text(re.sub(r"bfloat16", str(dtype).removeprefix("torch."), config.read_text()))
        run("mask", "base", "--k", "3", "-o", "mask.safetensors")
        scope = {}
        exec(compile(snippet(), "src/guide/training_elsewhere.md", "exec"), scope)
        model, deltas = scope["model"], scope["deltas"]
        assert model.dtype == dtype, f"{model.dtype} was loaded"
        assert all(torch.isfinite(torch.tensor(loss)) for loss in scope["losses"]), scope["losses"]
        run("init", "base", "--mask", "mask.safetensors", "--values", "values.safetensors", "-o", "adapter.safetensors")
        run("merge", "base", "--adapter", "adapter.safetensors", "-o", "merged")
        merged, original, n_changed = weights("merged"), weights("base"), 0
        for name, tensor in merged.items():
            module, _, kind = name.rpartition(".")
            trained = getattr(model.get_submodule(module), kind).detach()
            assert trained.dtype == tensor.dtype and torch.equal(trained.view(torch.uint8), tensor.view(torch.uint8)), f"{name} differs"
            n_changed += int((tensor != original[name]).sum())
        n_deltas = sum(delta.values.numel() for delta in deltas.values())
        assert n_changed > n_deltas // 4, f"{n_changed} of {n_deltas} weights changed"
        assert n_changed < n_deltas or dtype != torch.bfloat16, "no delta was rounded away"
        os.chdir(ROOT)
    print(f"{str(dtype).removeprefix('torch.'):<9} {n_deltas} deltas, {n_changed} weights changed, all tensors equal bit for bit")


for dtype in (torch.bfloat16, torch.float32):
    check(dtype)
