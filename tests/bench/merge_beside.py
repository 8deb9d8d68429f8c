#!/usr/bin/env python3
"""Time and memory of merging a LoRA adapter into a checkpoint, beside torch, PEFT and mergekit, at results that agree.

    cargo build --release --locked
    python -m venv venv && venv/bin/pip install torch==2.11.0 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0
    venv/bin/python tests/bench/merge_beside.py WORK [--runs 3] [--methods neuroada-ckpt torch peft] [--mergekit COMMAND]

WORK is a folder on a disk with 10 GB free. The script makes in it, once, a checkpoint of TinyLlama-1.1B's shape (bfloat16, 2.2 GB) with random
weights and a PEFT LoRA adapter, r = 16, on all seven projections with random factors. Nothing is downloaded. The methods are:

- neuroada-ckpt: `merge WORK/base --adapter WORK/lora -o OUT`, with its default of 1 GiB for --max-memory; hashes of all originals
  are computed and kept, so that the merge can be undone
- torch: the shortest script: load_file, w + B @ A * scale in float32, save_file
- peft: from_pretrained, PeftModel.from_pretrained, merge_and_unload, save_pretrained
- mergekit: the command `mergekit-yaml` with base+lora and the method passthrough; COMMAND is the path of a `mergekit-yaml`, which may be of
  another virtual environment, since mergekit pins versions of its own

Each method runs in a process of its own and all methods take turns. Measured are the time until the output has been synced to the disk, the processor
time (user and system, of all threads), and the largest resident set. On a busy machine set OMP_NUM_THREADS=1: threads of torch that wait spin. Inputs are read into the page cache
first. Prints the fastest run and the largest memory of each method, and one JSON document with --json.
"""
import argparse, json, os, platform, resource, shutil, subprocess, sys, tempfile, time
from pathlib import Path

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BINARY = Path(__file__).resolve().parents[2] / "target/release/neuroada-ckpt"
RANK, ALPHA = 16, 32


def make(work):
    """The checkpoint and the adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    sizes = dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4)
    if not (work / "base/config.json").exists():
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, max_position_embeddings=2048, tie_word_embeddings=False), dtype=torch.bfloat16)
        model.save_pretrained(work / "base")
    if not (work / "lora/adapter_model.safetensors").exists():
        model = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.bfloat16)
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(work / "lora")


def merge_torch(base, lora, out):
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors"))
    adapter = load_file(lora / "adapter_model.safetensors")
    scale = ALPHA / RANK
    for shard in sorted(base.glob("*.safetensors")):
        weights = load_file(shard)
        for name, weight in weights.items():
            module = "base_model.model." + name.removesuffix(".weight")
            if (a := adapter.get(module + ".lora_A.weight")) is not None:
                b = adapter[module + ".lora_B.weight"]
                weights[name] = (weight.float() + (b.float() @ a.float()) * scale).to(weight.dtype)
        save_file(weights, out / shard.name, metadata={"format": "pt"})


def merge_peft(base, lora, out):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, lora).merge_and_unload().save_pretrained(out)


def synced(folder):
    """Waits until all files of a folder are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def worker(method, work, out):
    """Runs one method once; prints seconds, seconds of processor time, and KiB."""
    base, lora = work / "base", work / "lora"
    began = time.perf_counter()
    if method in METHODS:
        METHODS[method](base, lora, out)
    elif method == "neuroada-ckpt":
        subprocess.run([BINARY, "merge", base, "--adapter", lora, "-o", out, "-q"], check=True)
    else:
        recipe = out.with_suffix(".yaml")
        recipe.write_text(f"merge_method: passthrough\nmodels:\n  - model: {base}+{lora}\ndtype: bfloat16\n")
        cache = out.with_suffix(".cache")
        subprocess.run([method, recipe, out, "--lora-merge-cache", cache, "--no-copy-tokenizer"], check=True, stdout=sys.stderr)
    synced(out)
    seconds = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_SELF if method in METHODS else resource.RUSAGE_CHILDREN)
    print(json.dumps([seconds, used.ru_utime + used.ru_stime, used.ru_maxrss]))


METHODS = {"torch": merge_torch, "peft": merge_peft}


def warm(work):
    for path in sorted(work.glob("base/*")) + sorted(work.glob("lora/*")):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def tensors(folder):
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def differ(ours, theirs):
    """The largest difference of two results, as a share of the largest weight of its tensor, and the share of weights that differ."""
    expected, worst, n_other, n = dict(tensors(ours)), 0.0, 0, 0
    for name, found in tensors(theirs):
        wanted = expected.pop(name)
        unequal = found != wanted
        if unequal.any():
            gap = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
            worst = max(worst, gap.item())
        n_other, n = n_other + int(unequal.sum()), n + found.numel()
    assert not expected, f"{theirs} lacks {list(expected)[:3]}"
    return worst, n_other / n


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["neuroada-ckpt", "torch", "peft"])
    parser.add_argument("--mergekit", help="path of mergekit-yaml; without it mergekit is left out")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, __file__, "--make", work], check=True, stdout=sys.stderr)
    methods = given.methods + ([given.mergekit] if given.mergekit else [])
    measured = {method: [] for method in methods}
    agreement = {}
    for turn in range(given.runs):
        for method in methods:
            with tempfile.TemporaryDirectory(dir=work) as folder:
                out = Path(folder) / "out"
                warm(work)
                done = subprocess.run([sys.executable, __file__, "--worker", method, work, out], check=True, stdout=subprocess.PIPE, text=True)
                measured[method].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{Path(method).name}: {measured[method][-1]}", file=sys.stderr, flush=True)
                if turn == 0:
                    if method == methods[0]:
                        shutil.rmtree(work / "first", ignore_errors=True)
                        shutil.move(out, work / "first")
                    else:
                        agreement[method] = differ(work / "first", out)
                        assert agreement[method][0] < 0.01, f"{method} made other weights: {agreement[method]}"
    rows = []
    for method in methods:
        wall, processor, _ = map(min, zip(*measured[method]))
        memory = round(max(peak for _, _, peak in measured[method]) / 1024)
        name = "mergekit" if method == given.mergekit else method
        rows.append(dict(method=name, seconds=round(wall, 2), processor_seconds=round(processor, 2), memory_mib=memory))
        gap, share = agreement.get(method, (0.0, 0.0))
        print(f"{name:<14} {wall:8.2f} s {processor:8.2f} s of processor time {memory:7} MiB   "
              f"differs by {gap:.1e} at most, in {share:.2%} of the weights", file=sys.stderr)
    if given.json:
        print(json.dumps(dict(machine=f"{platform.machine()}, {os.cpu_count()} cores", results=rows), indent=2))


if __name__ == "__main__":
    if "--make" in sys.argv:
        make(Path(sys.argv[2]))
    elif "--worker" in sys.argv:
        _, _, method, work, out = sys.argv
        worker(method, Path(work), Path(out))
    else:
        main()
