#!/usr/bin/env python3
"""Peak resident memory of every command, cold and warm, under several limits.

usage: memory.py PROGRAM CHECKPOINT WORK [--limits 64M,256M,1G] [--only TEXT] [--lora FOLDER] [--io IO]

PROGRAM is a release build, CHECKPOINT a folder of Llama layout (about 2 GB), WORK a folder on the same disk with three times
that free. `cold` drops the page cache before each command (as root), `warm` reads the inputs into it. The peak is what the
program itself reports with -v (VmHWM: mapped pages and buffers counted). A row fails where a peak is above the limit,
three times the headers and 32 MiB. Standard library only.
"""
import argparse, json, os, re, shutil, struct, subprocess, sys

SLACK = 32 << 20
UNITS = {"M": 20, "G": 30}


def n_bytes(limit):
    return int(limit[:-1]) << UNITS[limit[-1]]


def header(path):
    with open(path, "rb") as file:
        (n,) = struct.unpack("<Q", file.read(8))
        return n, json.loads(file.read(n))


def headers(path):
    """Bytes of all safetensors headers in a folder."""
    files = [os.path.join(path, f) for f in os.listdir(path)] if os.path.isdir(path) else [path]
    return sum(header(f)[0] for f in files if f.endswith(".safetensors"))


def write_values(mask, path, value):
    """Values for `init`: the same for each of the mask's positions."""
    shapes = {n[: -len(".columns")]: t["shape"] for n, t in header(mask)[1].items() if n.endswith(".columns")}
    at, tensors = 0, {}
    for name, shape in shapes.items():
        n = 4 * shape[0] * shape[1]
        tensors[name + ".values"] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(tensors).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + struct.pack("<f", value) * (at // 4))


def drop_caches():
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3\n")


def warm(paths):
    for path in paths:
        for folder, _, files in os.walk(path) if os.path.isdir(path) else [(os.path.dirname(path), [], [os.path.basename(path)])]:
            for name in files:
                with open(os.path.join(folder, name), "rb") as file:
                    while file.read(1 << 24):
                        pass


def run(program, args, may_say_no=False):
    done = subprocess.run([program, "-v", *args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode not in ((0, 1) if may_say_no else (0,)):
        return None, f"exit {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
    return int(re.search(r"(\d+) MiB of memory at the peak", done.stderr).group(1)), ""


def remove(path):
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


def prepare(program, base, at):
    """What the commands work on."""
    def once(out, *args):
        if not os.path.exists(out):
            peak, why = run(program, list(args))
            if peak is None:
                sys.exit(f"{args}: {why}")
    once(at("m1"), "mask", base, "--k", "1", "-o", at("m1"))
    once(at("m20"), "mask", base, "--k", "20", "-o", at("m20"))
    for k in ("1", "20"):
        if not os.path.exists(at("v" + k)):
            write_values(at("m" + k), at("v" + k), 0.01)
        once(at("a" + k), "init", base, "--mask", at("m" + k), "--values", at("v" + k), "-o", at("a" + k))
    once(at("merged"), "merge", base, "-a", at("a20"), "-o", at("merged"))
    once(at("packed"), "pack", at("a20"), "-o", at("packed"))
    os.makedirs(at("delta"), exist_ok=True)
    once(at("delta") + "/weight_v000001", "sync", "export", at("merged"), "--base", base, "-o", at("delta") + "/weight_v000001")
    if not os.path.exists(at("place")):
        shutil.copytree(base, at("place"))


def commands(base, at, lora):
    """Name, arguments, inputs, whether there is an output."""
    sync = at("delta") + "/weight_v000001"
    listed = [
        ("inspect", ["inspect", base], [base], False),
        ("mask --k 1", ["mask", base, "--k", "1"], [base], True),
        ("mask --k 20", ["mask", base, "--k", "20"], [base], True),
        ("mask --k 1 --hash", ["mask", base, "--k", "1", "--hash"], [base], True),
        ("mask --scope tensor", ["mask", base, "--budget", "1%", "--scope", "tensor"], [base], True),
        ("mask --scope global", ["mask", base, "--budget", "1%", "--scope", "global"], [base], True),
        ("init", ["init", base, "--mask", at("m20")], [base, at("m20")], True),
        ("extract", ["extract", base, at("merged")], [base, at("merged")], True),
        ("merge -o", ["merge", base, "-a", at("a20")], [base, at("a20")], True),
        ("merge --in-place", ["merge", at("place"), "-a", at("a20"), "--in-place"], [at("place"), at("a20")], False),
        ("verify --base", ["verify", at("place"), "--base", base], [at("place"), base], False),
        ("unmerge", ["unmerge", at("place"), "--in-place"], [at("place")], False),
        ("diff of checkpoints", ["diff", base, at("merged")], [base, at("merged")], False),
        ("diff of adapters", ["diff", at("a1"), at("a20")], [at("a1"), at("a20")], False),
        ("pack", ["pack", at("a20")], [at("a20")], True),
        ("pack --base", ["pack", at("a20"), "--base", base], [at("a20"), base], True),
        ("unpack", ["unpack", at("packed")], [at("packed")], True),
        ("combine", ["combine", at("a1"), at("a20"), "--base", base], [at("a1"), at("a20"), base], True),
        ("combine, TIES", ["combine", at("a1"), at("a20"), "--base", base, "--method", "ties", "--density", "0.5"], [at("a1"), at("a20")], True),
        ("convert --to npz", ["convert", at("a20"), "--to", "npz"], [at("a20")], True),
        ("convert --to shira", ["convert", at("a20"), "--to", "shira"], [at("a20")], True),
        ("sync export", ["sync", "export", at("merged"), "--base", base], [at("merged"), base], True),
        ("sync apply", ["sync", "apply", sync, "--base", base], [sync, base], True),
    ]
    if lora:
        listed.append(("merge of a LoRA", ["merge", base, "-a", lora], [base, lora], True))
    return listed


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program"), parser.add_argument("checkpoint"), parser.add_argument("work")
    parser.add_argument("--limits", default="64M,256M,1G"), parser.add_argument("--only", default="")
    parser.add_argument("--lora"), parser.add_argument("--io", default="auto")
    given = parser.parse_args()
    os.makedirs(given.work, exist_ok=True)
    at = lambda name: os.path.join(given.work, name)
    prepare(given.program, given.checkpoint, at)
    limits = given.limits.split(",")
    head = ["| command | " + " | ".join(f"{limit} {how}" for limit in limits for how in ("cold", "warm")) + " |"]
    head.append("| --- |" + " --- |" * (2 * len(limits)))
    failed = []
    listed = [c for c in commands(given.checkpoint, at, given.lora) if given.only in c[0]]
    table = {name: [] for name, *_ in listed}
    # Merging in place, verifying and undoing follow one another.
    for limit in limits:
        for how in ("cold", "warm"):
            for name, args, inputs, has_output in listed:
                out = at("out/weight_v000001" if name == "sync export" else "out")
                args = [*args, "--max-memory", limit, "--io", given.io] + (["-o", out] if has_output else [])
                if name == "sync export":
                    os.makedirs(at("out"))
                drop_caches() if how == "cold" else warm(inputs)
                peak, why = run(given.program, args, name.startswith("diff"))
                remove(at("out"))
                allowed = n_bytes(limit) + 3 * sum(headers(p) for p in inputs) + SLACK
                if peak is None or peak << 20 > allowed:
                    failed.append(f"{name}, {limit}, {how}: {peak} MiB, {allowed >> 20} allowed; {why}")
                table[name].append("-" if peak is None else str(peak))
                print(f"{limit} {how} {name}: {peak} MiB {why}", file=sys.stderr, flush=True)
    print("\n".join(head))
    for name, peaks in table.items():
        print(f"| `{name}` | " + " | ".join(peaks) + " |")
    print("\n".join(failed), file=sys.stderr)
    sys.exit(1 if failed else 0)


main()
