#!/usr/bin/env python3
"""Opt-in: are merged LoRA adapters of every form the weights that PEFT's own merge_and_unload makes?

usage: peft_lora.py NEUROADA_CKPT [FOLDER]      (Python with torch, transformers, peft; FOLDER is kept where given)

Makes tiny random models (Llama, GPT-2, Qwen3-MoE), adapters of every form on them, merges each with PEFT and with this program, compares
every tensor of the two checkpoints, then verifies and undoes the merge. Prints one line per form: the largest difference relative to the
largest weight of its tensor, and the share of elements with the same bits; for bf16 the largest distance in units of the last place (of the
largest of base and results), and which of the two is nearer to the same merge in float32 where they differ.
"""
import os, shutil, subprocess, sys, tempfile, warnings
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

warnings.filterwarnings("ignore")
tool = os.path.abspath(sys.argv[1])
root = os.path.abspath(sys.argv[2]) if len(sys.argv) > 2 else tempfile.mkdtemp()
os.makedirs(root, exist_ok=True)

sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)


def llama(tied=False, bias=False):
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied, attention_bias=bias))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4))


def moe():
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, head_dim=8, num_experts=4, num_experts_per_tok=2,
                                              moe_intermediate_size=24, decoder_sparse_step=1))


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["--expert-order", "rank-first"]
# name, model, dtype, LoraConfig, further arguments of merge
forms = [
    ("plain", llama, torch.float32, dict(r=4, target_modules=LINEAR), []),
    ("plain bf16", llama, torch.bfloat16, dict(r=4, lora_alpha=16, target_modules=LINEAR), []),
    ("plain f16", llama, torch.float16, dict(r=4, lora_alpha=16, target_modules=LINEAR), []),
    ("rslora", llama, torch.float32, dict(r=4, use_rslora=True, target_modules=LINEAR), []),
    ("dora", llama, torch.float32, dict(r=4, use_dora=True, target_modules=LINEAR), []),
    ("dora bf16", llama, torch.bfloat16, dict(r=4, use_dora=True, target_modules=LINEAR), []),
    ("patterns", llama, torch.float32, dict(r=4, target_modules=LINEAR, rank_pattern={"q_proj": 2, r"layers\.1\.mlp\..*": 8},
                                            alpha_pattern={"^model.layers.0.*v_proj": 3}), []),
    ("modules_to_save", llama, torch.float32, dict(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]), []),
    ("bias all", lambda: llama(bias=True), torch.float32, dict(r=4, target_modules=LINEAR[:4], bias="all"), []),
    ("bias lora_only", lambda: llama(bias=True), torch.float32, dict(r=4, target_modules=LINEAR[:4], bias="lora_only"), []),
    ("lora_bias", lambda: llama(bias=True), torch.float32, dict(r=4, target_modules=LINEAR[:4], lora_bias=True), []),
    ("embedding", llama, torch.float32, dict(r=4, target_modules=["embed_tokens", "q_proj"]), []),
    ("embedding dora", llama, torch.float32, dict(r=4, use_dora=True, target_modules=["embed_tokens"]), []),
    ("head", llama, torch.float32, dict(r=4, target_modules=["lm_head"]), []),
    ("tied head", lambda: llama(tied=True), torch.float32, dict(r=4, target_modules=["lm_head"]), ["--tied-head"]),
    ("tied embedding", lambda: llama(tied=True), torch.float32, dict(r=4, target_modules=["embed_tokens"]), ["--tied-head"]),
    ("conv1d", gpt2, torch.float32, dict(r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True), []),
    ("conv1d dora", gpt2, torch.float32, dict(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True), []),
    ("experts", moe, torch.float32, dict(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]), EXPERTS),
    ("experts bf16", moe, torch.bfloat16, dict(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"]), EXPERTS),
]


def tensors(folder):
    found = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            found.update(load_file(os.path.join(folder, name)))
    return found


def run(*arguments):
    done = subprocess.run([tool, *arguments, "-q"], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}{done.stderr}"


for form, model, dtype, config, arguments in forms:
    torch.manual_seed(7)
    folder = os.path.join(root, form.replace(" ", "-"))
    shutil.rmtree(folder, ignore_errors=True)
    paths = {name: os.path.join(folder, name) for name in ("base", "lora", "peft", "ours", "undone")}
    model().to(dtype).save_pretrained(paths["base"])
    base = AutoModelForCausalLM.from_pretrained(paths["base"], dtype=dtype)
    adapted = get_peft_model(base, LoraConfig(**config))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name or (config.get("bias", "none") != "none" and name.endswith("bias")):
            noise = torch.randn_like(parameter) * 0.05
            parameter.data = parameter.data * 1.1 if "magnitude" in name else parameter.data + noise
    adapted.save_pretrained(paths["lora"])
    fresh = AutoModelForCausalLM.from_pretrained(paths["base"], dtype=dtype)
    PeftModel.from_pretrained(fresh, paths["lora"]).merge_and_unload().save_pretrained(paths["peft"])
    run("merge", paths["base"], "--adapter", paths["lora"], "-o", paths["ours"], *arguments)
    ours, theirs, before = tensors(paths["ours"]), tensors(paths["peft"]), tensors(paths["base"])
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    exact = {}
    if dtype == torch.bfloat16:
        wide = AutoModelForCausalLM.from_pretrained(paths["base"], dtype=torch.float32)
        PeftModel.from_pretrained(wide, paths["lora"]).merge_and_unload().save_pretrained(paths["peft"] + "-f32")
        exact = tensors(paths["peft"] + "-f32")
    worst, units, n, n_same, n_changed, n_nearer, n_further = 0.0, 0.0, 0, 0, 0, 0, 0
    for name, mine in ours.items():
        other = theirs[name]
        assert mine.dtype == other.dtype and mine.shape == other.shape, name
        difference = (mine.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1e-30)
        worst = max(worst, difference.item())
        if dtype == torch.bfloat16:
            a, b, e = mine.double(), other.double(), exact[name].double()
            largest = torch.maximum(torch.maximum(a.abs(), b.abs()), before[name].double().abs()).clamp_min(1e-30)
            units = max(units, ((a - b).abs() / 2 ** (largest.log2().floor() - 7)).max().item())
            n_nearer += ((a - e).abs() < (b - e).abs()).sum().item()
            n_further += ((a - e).abs() > (b - e).abs()).sum().item()
        n, n_same = n + mine.numel(), n_same + (mine == other).sum().item()
        n_changed += (mine != before[name]).sum().item()
    run("verify", paths["ours"], "--base", paths["base"])
    run("unmerge", paths["ours"], "--base", paths["base"], "-o", paths["undone"])
    undone = tensors(paths["undone"])
    assert all(torch.equal(undone[name], before[name]) for name in before), "undoing left something"
    far = f", {units:.0f} units at most ({n_nearer} nearer than PEFT, {n_further} further)" if exact else ""
    print(f"{form:16} {n_changed:6} weights changed, largest difference {worst:.1e}{far}, {100 * n_same / n:.2f} % the same bits", flush=True)
    assert n_changed > 0, "the adapter does nothing"
    assert worst <= 1e-6 if dtype == torch.float32 else units <= 1, "too far from PEFT"
