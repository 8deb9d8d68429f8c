"""The tiny models of the matrix: one entry for each family, all weights random and seeded."""

from __future__ import annotations

import torch
from torch.nn import Module

# Each of these adds its families.
import decoders  # noqa: F401
import encoders  # noqa: F401
import towers  # noqa: F401
from family import FAMILIES, Family, Tower

__all__ = ["FAMILIES", "Family", "Tower", "build"]


def build(name: str) -> Module:
    """The family's model. Every weight is shaken, so that no bias is zero and no norm is one."""
    torch.manual_seed(1000 + sum(map(ord, name)))
    model = FAMILIES[name].build().float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if parameter.dim() > 1 else 0.05))
    return model
