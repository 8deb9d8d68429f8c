"""Makes a mask with Ray: one task per part, then one that joins them.

    python tests/cluster/mask_ray.py BASE MASK [--k 1] [--parts 8] [--cpus-per-part 1]

BASE and the folder of MASK must be reachable under the same path from every node, and `neuroada-ckpt` must be on the PATH there.
Runs on one machine too: Ray then starts itself. Needs the PyPI package ray.
"""

import argparse
import subprocess
from pathlib import Path

import ray


@ray.remote(max_retries=2)
def part(base, output, k, i, n, threads):
    command = ["neuroada-ckpt", "mask", base, "--k", str(k), "--partition", f"{i}/{n}", "--threads", str(threads)]
    subprocess.run([*command, "--force", "-o", output], check=True)
    return output


@ray.remote(max_retries=2)
def join(output, *parts):
    subprocess.run(["neuroada-ckpt", "mask-join", *parts, "--force", "-o", output], check=True)
    return output


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("mask", type=Path)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--cpus-per-part", type=int, default=1)
    args = parser.parse_args()
    base, mask = str(args.base.resolve()), args.mask.resolve()
    ray.init()
    numbers = range(1, args.parts + 1)
    files = [str(mask.with_name(f"{mask.stem}.part-{i}.safetensors")) for i in numbers]
    run = part.options(num_cpus=args.cpus_per_part)
    parts = [run.remote(base, file, args.k, i, args.parts, args.cpus_per_part) for i, file in zip(numbers, files)]
    print(ray.get(join.remote(str(mask), *parts)))
    for file in files:
        Path(file).unlink()


if __name__ == "__main__":
    main()
