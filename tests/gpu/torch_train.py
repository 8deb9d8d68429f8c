"""Rivals of the GPU trainer on one shape: python3 torch_train.py BENCHMARK-OUTPUT CHECKPOINT

CHECKPOINT is the 1B model that the benchmark `gpu_train` left; its own figures are read from BENCHMARK-OUTPUT. Rivals, in bf16 on
the same tokens a step: PEFT LoRA with r = 16 on the seven projections, and the published bypass (`weight.scatter_add(columns, values)`
in every forward pass, k = 1). Prints tokens per second, the peak of the device's memory, and ratios.
"""

import re
import sys
import time

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

ROW, ROWS, STEPS, WARM_UP = 2048, 2, 9, 3

found = re.search(r"train 1b k 1 kept all: (\d+) tokens/s, peak ([\d.]+) GB", open(sys.argv[1]).read())
if not found:
    sys.exit("the benchmark did not measure the 1B model")
pace, peak = float(found[1]), float(found[2])
print(f"train, k = 1       {pace:9.0f} tokens/s  {peak:6.2f} GB")


def load():
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.bfloat16, attn_implementation="sdpa").cuda()
    model.requires_grad_(False)
    return model.train()


def measure(name, model):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    began = 0.0
    for step in range(STEPS + WARM_UP):
        if step == WARM_UP:
            torch.cuda.synchronize()
            began = time.perf_counter()
        ids = torch.randint(model.config.vocab_size, (ROWS, ROW), device="cuda")
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    theirs = STEPS * ROWS * ROW / (time.perf_counter() - began)
    used = torch.cuda.max_memory_allocated() / 1e9
    n = sum(p.numel() for p in trained)
    print(f"{name:18} {theirs:9.0f} tokens/s  {used:6.2f} GB  {n:,} trained: "
          f"train is {pace / theirs:.2f} x as fast in {peak / used:.2f} x of the memory", flush=True)


class Bypass(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear, self.columns = linear, linear.weight.abs().topk(1, dim=1).indices
        self.values = torch.nn.Parameter(torch.zeros(self.columns.shape, dtype=linear.weight.dtype, device="cuda"))

    def forward(self, x):
        return F.linear(x, self.linear.weight.scatter_add(1, self.columns, self.values), self.linear.bias)


model = load()
for layer in model.model.layers:
    for owner in (layer.self_attn, layer.mlp):
        for name, child in list(owner.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(owner, name, Bypass(child))
measure("published bypass", model)
del model, owner, layer, child

try:
    from peft import LoraConfig, get_peft_model
except ImportError:
    print("skipped: peft is not installed")
else:
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    measure("PEFT LoRA, r = 16", get_peft_model(load(), LoraConfig(r=16, lora_alpha=32, target_modules=projections)))
