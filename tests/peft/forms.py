"""The forms of adapters that PEFT writes: each one turns a family into the settings of a `LoraConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
from torch.nn import Module

from families import Family


class DoesNotApply(Exception):
    """The family has nothing that this form could train."""


@dataclass
class Form:
    """What is trained, and what it is in one sentence."""

    about: str
    # Settings of the `LoraConfig` for a family; the model is there to look at.
    settings: Callable[[Family, Module], dict]
    # The part of the model that is trained: "whole", "bare" (`AutoModel`), or the name of one of the family's towers.
    part: str = "whole"


def named(family: Family, what: str) -> str:
    """The name that the family has for `what`, such as its head."""
    name = getattr(family, what)
    if not name:
        raise DoesNotApply(f"the family has no {what} of this kind")
    return name


def with_embedding(family: Family, model: Module) -> dict:
    return {"target_modules": [family.attention[0], named(family, "embedding")]}


def with_head(family: Family, model: Module) -> dict:
    return {"target_modules": [family.attention[0], named(family, "head")]}


def tied_input(family: Family, model: Module) -> str:
    """The name of the embedding that PEFT ties other modules to."""
    if not getattr(model, "_tied_weights_keys", None):
        raise DoesNotApply("the model class ties nothing")
    embedding = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embedding)


def tie_target(family: Family, model: Module) -> dict:
    tied_input(family, model)
    target = [family.attention[0], named(family, "embedding")]
    return {"target_modules": target, "ensure_weight_tying": True}


def tie_save(family: Family, model: Module) -> dict:
    tied_input(family, model)
    save = [named(family, "embedding")]
    return {"target_modules": [family.attention[0]], "modules_to_save": save, "ensure_weight_tying": True}


def tie_head(family: Family, model: Module) -> dict:
    tied_input(family, model)
    return with_head(family, model) | {"ensure_weight_tying": True}


def tie_save_head(family: Family, model: Module) -> dict:
    tied_input(family, model)
    save = [named(family, "head")]
    return {"target_modules": [family.attention[0]], "modules_to_save": save, "ensure_weight_tying": True}


def experts(family: Family, model: Module) -> dict:
    if not family.experts:
        raise DoesNotApply("the family has no stacks of experts")
    return {"target_modules": list(family.attention), "target_parameters": list(family.experts)}


def one_stack(family: Family, model: Module) -> dict:
    return {"target_modules": [], "target_parameters": [experts(family, model)["target_parameters"][1]]}


def convolutions(family: Family, model: Module) -> dict:
    kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kinds)}
    if not names:
        raise DoesNotApply("the family has no convolutions")
    return {"target_modules": sorted(names)}


def norms(family: Family, model: Module) -> dict:
    found = [name for name, module in model.named_modules() if "Norm" in type(module).__name__]
    return {"target_modules": list(family.attention), "modules_to_save": [found[-1].rpartition(".")[2]]}


def patterns(family: Family, model: Module) -> dict:
    first, last = family.attention[0].rpartition(".")[2], family.attention[-1]
    return {
        "target_modules": list(family.attention),
        "use_rslora": True,
        "rank_pattern": {first: 2},
        "alpha_pattern": {last: 3},
    }


def tokens(family: Family, model: Module) -> dict:
    if family.embedding is None:
        raise DoesNotApply("the family has no embedding of this kind")
    # All tokens that the fixed inputs may hold.
    return {"target_modules": [family.attention[0]], "trainable_token_indices": list(range(20, 60))}


def attention(**more) -> Callable[[Family, Module], dict]:
    return lambda family, model: {"target_modules": list(family.attention), **more}


def saved(*what: str) -> Callable[[Family, Module], dict]:
    return lambda family, model: {
        "target_modules": list(family.attention),
        "modules_to_save": [named(family, part) for part in what],
    }


def plus(build: Callable[[Family, Module], dict], **more) -> Callable[[Family, Module], dict]:
    return lambda family, model: {**build(family, model), **more}


FORMS: dict[str, Form] = {
    "attention": Form("LoRA on the attention's projections, by a list of names", attention()),
    "all-linear": Form("`target_modules=\"all-linear\"`", lambda family, model: {"target_modules": "all-linear"}),
    "regex": Form(
        "`target_modules` is a regular expression",
        lambda family, model: {"target_modules": named(family, "regex")},
    ),
    "layers": Form("`layers_to_transform`", attention(layers_to_transform=[1])),
    "experts": Form("the attention, and both stacks of experts by `target_parameters`", experts),
    "one-stack": Form("one stack of experts by `target_parameters`, nothing else", one_stack),
    "router": Form(
        "the router by `target_parameters`",
        lambda family, model: {"target_modules": [], "target_parameters": [named(family, "router")]},
    ),
    "parameter": Form(
        "a linear layer's weight by `target_parameters`",
        lambda family, model: {"target_modules": [], "target_parameters": [named(family, "plain")]},
    ),
    "embedding": Form("the token embedding in `target_modules`", with_embedding),
    "head": Form("the head in `target_modules`", with_head),
    "embedding+head": Form(
        "both of them in `target_modules`",
        lambda family, model: {"target_modules": [named(family, "embedding"), named(family, "head")]},
    ),
    "save-head": Form("the head in `modules_to_save`", saved("head")),
    "save-embedding": Form("the token embedding in `modules_to_save`", saved("embedding")),
    "save-both": Form("embedding and head in `modules_to_save`", saved("embedding", "head")),
    "save-norm": Form("a normalization in `modules_to_save`", norms),
    "tie-target": Form("`ensure_weight_tying`, the embedding in `target_modules`", tie_target),
    "tie-save": Form("`ensure_weight_tying`, the embedding in `modules_to_save`", tie_save),
    "tie-head": Form("`ensure_weight_tying`, the head in `target_modules`", tie_head),
    "tie-save-head": Form("`ensure_weight_tying`, the head in `modules_to_save`", tie_save_head),
    "tokens": Form("`trainable_token_indices`", tokens),
    "dora": Form("DoRA", attention(use_dora=True)),
    "dora-embedding": Form("DoRA with the token embedding", plus(with_embedding, use_dora=True)),
    "rslora": Form("rsLoRA with `rank_pattern` and `alpha_pattern`", patterns),
    "fan-in-fan-out": Form("`fan_in_fan_out=True`, as PEFT then leaves it", attention(fan_in_fan_out=True)),
    "bias-all": Form("`bias=\"all\"`", attention(bias="all")),
    "bias-lora-only": Form("`bias=\"lora_only\"`", attention(bias="lora_only")),
    "lora-bias": Form("`lora_bias=True`", attention(lora_bias=True)),
    "convolution": Form("LoRA on all convolutions", convolutions),
    "bare": Form("trained on the bare model (`AutoModel`)", attention(), part="bare"),
    "text-tower": Form("trained on the text tower alone", attention(), part="text"),
    "vision-tower": Form("trained on the vision tower alone", attention(), part="vision"),
}
