"""torch.topk on the shapes that the GPU benchmark measured: python3 torch_topk.py BENCHMARK-OUTPUT

Prints, for each line `topk DTYPE ROWS D_IN K RATE ...`, torch's rate on the same machine and how many times faster the kernel is.
torch.topk works on |w|, which is not counted in its time.
"""

import re
import sys
import time

import torch

for line in open(sys.argv[1]):
    found = re.match(r"topk (\w+) (\d+) (\d+) (\d+) ([\d.]+) GB/s", line)
    if not found:
        continue
    dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[found[1]]
    n_rows, d_in, k, rate = int(found[2]), int(found[3]), int(found[4]), float(found[5])
    weights = torch.randn(n_rows, d_in, device="cuda").to(dtype).abs_()
    torch.topk(weights, k, dim=1)
    torch.cuda.synchronize()
    repeats, began = 5, time.perf_counter()
    for _ in range(repeats):
        torch.topk(weights, k, dim=1)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / repeats
    theirs = weights.numel() * weights.element_size() / seconds / 1e9
    print(f"torch.topk {found[1]} {n_rows} {d_in} {k} {theirs:.1f} GB/s: {rate / theirs:.1f} x", flush=True)
    del weights
