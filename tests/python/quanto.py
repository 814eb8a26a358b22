"""optimum-quanto without its C++ extension, which it would compile at first use."""

from types import SimpleNamespace

import torch
from optimum.quanto.library.extensions.cpp import ext


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """What the extension does: the codes in the low bits of all bytes, then those in the next bits."""
    return torch.cat([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)])


ext._lib = SimpleNamespace(unpack=unpack)
