#!/usr/bin/env python3
"""Opt-in: does a merged checkpoint load in Hugging Face transformers, and are its weights those torch makes?

usage: transformers_generate.py BASE ADAPTER MERGED      (Python with torch, transformers, safetensors)

Merges ADAPTER into BASE once more with torch, per tensor in float32, compares every tensor of MERGED bit for bit, then loads
MERGED with transformers, without a word of warning about missing or unexpected weights, and generates a few tokens.
"""
import glob, json, os, sys
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, merged = sys.argv[1:]


def tensors(folder):
    for path in sorted(glob.glob(os.path.join(folder, "*.safetensors"))):
        with safe_open(path, framework="pt") as f:
            for name in f.keys():
                yield name, f.get_tensor(name)


with safe_open(adapter, framework="pt") as f:
    scale = json.loads(f.metadata()["neuroada"])["scale"]
    deltas = {n[: -len(".values")]: (f.get_tensor(n[: -len("values")] + "columns").long(), f.get_tensor(n).float())
              for n in f.keys() if n.endswith(".values")}
found = dict(tensors(merged))
n_touched = 0
for name, weight in tensors(base):
    if name in deltas:
        columns, values = deltas[name]
        wide = weight.float()
        wide.scatter_add_(1, columns, values * scale)
        weight, n_touched = wide.to(weight.dtype), n_touched + values.numel()
    assert torch.equal(found[name].view(torch.uint8), weight.view(torch.uint8)), f"{name} differs"
print(f"{len(found)} tensors equal torch's merge bit for bit, {n_touched} positions touched")

model, info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
assert not info["missing_keys"] or model.config.tie_word_embeddings, info
assert not info["unexpected_keys"] and not info["mismatched_keys"], info
tokenizer = AutoTokenizer.from_pretrained(merged)
prompt = tokenizer("The capital of France is", return_tensors="pt")
out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
print("generated:", tokenizer.decode(out[0]))
