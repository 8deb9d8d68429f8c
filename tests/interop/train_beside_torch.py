#!/usr/bin/env python3
"""Opt-in: the trainer beside PyTorch on this machine: the same loss on a merged checkpoint, and tokens per second.

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install torch transformers safetensors
    cargo build --release
    /tmp/venv/bin/python tests/interop/train_beside_torch.py target/release/neuroada-ckpt BASE DATA [MERGED] [--steps N] [--template T]

1. Loss: MERGED (or BASE) on the first 64 rows of DATA, by `eval` and by transformers in float32 with no padding; more than 1e-3 between
   them, relative, is exit code 1.
2. Speed: the median of N steps on batches of 16 rows, in tokens per second, padding not counted:
   - `train -k 1` with weights as stored;
   - torch, float32, padded batches, frozen backbone: the loss's gradient by the embeddings, so that every activation gradient is computed
     and no weight gradient is; all tokens go through the head, as transformers has it;
   - torch, float32, the published bypass: `weight.scatter_add(columns, values)` in every forward pass.
"""
import argparse, json, os, subprocess, sys, tempfile, time
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser(usage=__doc__)
parser.add_argument("binary")
parser.add_argument("base")
parser.add_argument("data")
parser.add_argument("merged", nargs="?")
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--template", default="auto")
parser.add_argument("--no-bypass", action="store_true")
args = parser.parse_args()
torch.manual_seed(0)


def run(*words):
    return subprocess.run([args.binary, *map(str, words)], check=True, stdout=subprocess.PIPE).stdout


def examples(n):
    shown = json.loads(run("eval", args.base, *of_data, "--show", n, "--json", "-q"))["examples"]
    return [(e["tokens"], e["learned"]) for e in shown]


def labels(tokens, learned):
    wanted = [-100] * len(tokens)
    for begin, end in learned:
        wanted[begin:end] = tokens[begin:end]
    return wanted


of_data = ["--data", args.data, "--template", args.template]

# --- the loss
checkpoint = args.merged or args.base
found = json.loads(run("eval", checkpoint, *of_data, "--limit", 64, "--task", "loss", "--json", "-q"))["loss"]
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
total, n = 0.0, 0
with torch.no_grad():
    for tokens, learned in examples(64):
        logits = model(torch.tensor([tokens])).logits[0, :-1]
        wanted = torch.tensor(labels(tokens, learned)[1:])
        total += F.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum").item()
        n += (wanted != -100).sum().item()
off = abs(found / (total / n) - 1)
print(f"loss of {os.path.basename(checkpoint.rstrip('/'))} on {n} learned tokens: {found:.6f}, transformers {total / n:.6f}, off by {off:.1e}")
if off > 1e-3:
    sys.exit(1)

# --- speed
rows = examples(16 * args.steps)
batches = [rows[i : i + 16] for i in range(0, len(rows), 16)]


def padded(batch):
    longest = max(len(tokens) for tokens, _ in batch)
    fill = lambda values, by: torch.tensor([v + [by] * (longest - len(v)) for v in values])
    ids, wanted = fill([t for t, _ in batch], 0), fill([labels(*e) for e in batch], -100)
    return ids, wanted, fill([[1] * len(t) for t, _ in batch], 0), sum(len(t) for t, _ in batch)


def speed(step):
    paces = []
    for batch in batches:
        ids, wanted, attended, n_tokens = padded(batch)
        began = time.time()
        step(ids, wanted, attended)
        paces.append(n_tokens / (time.time() - began))
    return sorted(paces)[len(paces) // 2]


model.requires_grad_(False)
model.train()


def frozen(ids, wanted, attended):
    x = model.get_input_embeddings()(ids).requires_grad_(True)
    model(inputs_embeds=x, attention_mask=attended, labels=wanted).loss.backward()


class Bypass(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear, self.columns = linear, linear.weight.abs().topk(1, dim=1).indices
        self.values = torch.nn.Parameter(torch.zeros(self.columns.shape))

    def forward(self, x):
        weight = self.linear.weight.scatter_add(1, self.columns, self.values)
        return F.linear(x, weight, self.linear.bias)


with tempfile.TemporaryDirectory() as folder:
    log = os.path.join(folder, "a.log.jsonl")
    run("train", args.base, "-k", 1, *of_data, "--limit", len(rows), "--no-shuffle", "--max-steps", args.steps, "--batch-size", 16,
        "--batch-tokens", 1 << 20, "-o", os.path.join(folder, "a.safetensors"), "-q")
    paces = sorted(r["n_tokens"] / r["seconds"] for r in map(json.loads, open(log)) if "loss" in r)
    ours = paces[len(paces) // 2]
print(f"train -k 1            {ours:8.0f} tokens/s   1.00")
pace = speed(frozen)
print(f"torch, frozen         {pace:8.0f} tokens/s   train is {ours / pace:.2f} x")
if not args.no_bypass:
    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, child in list(owner.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(owner, name, Bypass(child))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=8e-3)

    def bypass(ids, wanted, attended):
        model(ids, attention_mask=attended, labels=wanted).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    pace = speed(bypass)
    print(f"torch, the bypass     {pace:8.0f} tokens/s   train is {ours / pace:.2f} x")
