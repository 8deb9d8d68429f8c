#!/usr/bin/env python3
"""Opt-in: do other tools read what `convert` writes, and does it give them the same weights?

usage: convert_formats.py NEUROADA_CKPT BASE ADAPTER      (Python with torch, peft, transformers, safetensors, numpy, xxhash,
                                                           blake3, zstandard)

Converts ADAPTER, made for the Llama checkpoint BASE, to every foreign format and compares with a merge by NEUROADA_CKPT, bit for bit:
PEFT loads the SHiRA and Super-Tuning folders and merges them; torch.load(weights_only=True) and numpy.load read the published code's
files, which are merged with its own steps; numpy reads the coordinates; and the weight-sync folders are applied with the steps
of slime's engine.
"""
import json, os, subprocess, sys, tempfile, zlib
import blake3, numpy as np, torch, xxhash, zstandard
from safetensors import safe_open
from safetensors.torch import load_file

program, base, adapter = sys.argv[1:]
place = tempfile.mkdtemp()


def run(*words):
    subprocess.run([program, *words, "-q"], check=True)


def at(name):
    return os.path.join(place, name)


def tensors(folder):
    found = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            found.update(load_file(os.path.join(folder, name)))
    return found


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def compare(what, found):
    for name, weight in found.items():
        if name in merged:
            assert torch.equal(bits(weight), bits(merged[name])), f"{what}: {name} differs"
    missing = set(touched) - set(found)
    assert not missing, f"{what}: {missing}"
    print(f"{what}: {len(found)} tensors equal, bit for bit")


run("merge", base, "--adapter", adapter, "-o", at("merged"))
before, merged = tensors(base), tensors(at("merged"))
touched = [name for name in before if not torch.equal(bits(before[name]), bits(merged[name]))]

for method in ["shira", "supertuning"]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run("convert", adapter, "--to", method, "-o", at(method))
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = PeftModel.from_pretrained(model, at(method)).merge_and_unload()
    compare(f"PEFT {method}", model.state_dict())

run("convert", adapter, "--to", "published", "-o", at("published"))
positions = np.load(at("published/positions.npy"), allow_pickle=True).item()
values = torch.load(at("published/tunable_para/state_dict_tunable.pt"), weights_only=True)
found = {}
for name, where in positions.items():
    weight = before[name]
    flat = where[:, 0] * weight.shape[1] + where[:, 1]
    found[name] = weight.flatten().scatter_add(0, flat, values[name + "_new"]).view_as(weight)
compare("published", found)

run("convert", adapter, "--to", "npz", "-o", at("deltas.npz"))
arrays = np.load(at("deltas.npz"))
found = {}
for name in {key.rsplit(".", 1)[0] for key in arrays.files}:
    weight = before[name].float()
    rows, cols, deltas = (torch.from_numpy(arrays[f"{name}.{part}"]) for part in ["rows", "cols", "values"])
    assert tuple(arrays[f"{name}.shape"]) == tuple(weight.shape)
    weight[rows, cols] += deltas
    found[name] = weight.to(before[name].dtype)
compare("npz", found)

checksums = {
    "xxh3-128": lambda b: xxhash.xxh3_128(b).hexdigest(),
    "blake3": lambda b: blake3.blake3(b).hexdigest(),
    "adler32": lambda b: f"{zlib.adler32(b):08x}",
}
for encoding in ["overwrite", "xor"]:
    for algorithm, checksum in checksums.items():
        folder = at(f"{encoding}-{algorithm}/weight_v000001")
        os.mkdir(os.path.dirname(folder))
        run("sync", "export", adapter, "--base", base, "--encoding", encoding, "--checksum", algorithm, "-o", folder)
        index = json.load(open(os.path.join(folder, "model.safetensors.index.json")))
        assert index["metadata"] == {"version": "000001", "base_version": "000000", "delta_encoding": encoding,
                                     "compression_format": "zstd", "checksum_format": algorithm}
        found = {}
        for shard in set(index["weight_map"].values()):
            with safe_open(os.path.join(folder, shard), framework="np") as f:
                for name in f.keys():
                    delta = np.frombuffer(zstandard.ZstdDecompressor().decompress(f.get_tensor(name).tobytes()), np.uint8)
                    new = bits(before[name]).flatten().numpy().copy()
                    if encoding == "xor":
                        new ^= delta
                    else:
                        n = int(delta[:4].view("<u4")[0])
                        new[delta[4 : 4 + 4 * n].view("<u4")] = delta[4 + 4 * n :]
                    assert checksum(new.tobytes()) == f.metadata()[name], f"{name}: checksum"
                    found[name] = torch.from_numpy(new).view(before[name].dtype).view_as(before[name])
        compare(f"weight sync, {encoding}, {algorithm}", found)
