"""What a family is, and what the descriptions of families share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch
import transformers as tf
from torch.nn import Module

if not torch.cuda.is_available():
    # Some builds of PyTorch crash where they are asked this on a machine without a GPU.
    torch.cuda.is_current_stream_capturing = lambda: False

VOCAB = 96
HIDDEN = 32
INNER = 48
IMAGE_TOKEN = 90


@dataclass
class Family:
    """How to build a tiny model, what to feed it, and which of its modules the forms of the matrix train."""

    build: Callable[[], Module]
    inputs: Callable[[], dict]
    # The fields of the model's answer that are compared.
    outputs: tuple[str, ...] = ("logits",)
    task: str | None = "CAUSAL_LM"
    # Names as PEFT takes them: the ends of module names.
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    regex: str | None = None
    embedding: str | None = "embed_tokens"
    head: str | None = "lm_head"
    # Parameters that hold all experts of a layer, the router, and a plain weight, as `target_parameters` names them.
    experts: tuple[str, ...] = ()
    router: str | None = None
    plain: str | None = None
    # Parts that have a model class of their own, which people train alone.
    towers: dict[str, Tower] = field(default_factory=dict)


@dataclass
class Tower:
    """A part of a model: the model class that holds it alone, and how it goes back where it was taken from."""

    # Takes the whole model and the folder it was loaded from, and gives the part as a model of its own.
    take: Callable[[Module, Path], Module]
    # Puts the part, which was trained, into the whole model.
    graft: Callable[[Module, Module], None]
    task: str | None = "CAUSAL_LM"
    attention: tuple[str, ...] | None = None


def causal_ids(rows: int = 2, length: int = 9, low: int = 4, high: int = 80) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(low, high, (rows, length), generator=generator)


def text_inputs() -> dict:
    return {"input_ids": causal_ids()}


def pixels(size: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(12))


def llama_like(**more) -> dict:
    """The settings that all models of the Llama kind share."""
    base = dict(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    base.update(more)
    return base


def make(model_class, config_class, **settings) -> Callable[[], Module]:
    return lambda: model_class(config_class(**settings))


def copied(part: Module, *sources: tuple[str, Module]) -> Module:
    """`part` with the weights of the modules that are named beside the places where it has them."""
    for place, source in sources:
        part.get_submodule(place).load_state_dict(source.state_dict())
    return part.eval()


def causal_text(model_class) -> Tower:
    """The text tower of a model with images, with its head: a causal language model."""

    def take(model: Module, folder: Path) -> Module:
        config = model.config.text_config
        config.tie_word_embeddings = model.config.tie_word_embeddings
        inner = ("model", model.model.language_model)
        return copied(model_class(config), inner, ("lm_head", model.lm_head))

    def graft(model: Module, part: Module) -> None:
        model.model.language_model = part.model
        model.lm_head = part.lm_head

    return Tower(take, graft)


def child(path: str, task: str | None, attention: tuple[str, ...] | None = None) -> Tower:
    """A module of the whole model that is a model itself."""

    def take(model: Module, folder: Path) -> Module:
        source = model.get_submodule(path)
        return copied(type(source)(source.config), ("", source))

    def graft(model: Module, part: Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, part)

    return Tower(take, graft, task, attention)


def encoder_of_t5() -> Tower:
    def graft(model: Module, part: Module) -> None:
        model.encoder = part.encoder

    return Tower(lambda model, folder: tf.T5EncoderModel.from_pretrained(folder), graft, "FEATURE_EXTRACTION")


FAMILIES: dict[str, Family] = {}
