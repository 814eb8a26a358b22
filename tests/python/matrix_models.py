"""The networks of matrix.rs, and what packing leaves of a weight."""

import torch
from layers_reference import quantised
from quant_reference import (
    MAP,
    bnb,
    dequantize_4bit,
    dequantize_blockwise,
    quantize_4bit,
    quantize_blockwise,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

# The layers to adapt: how the first and the second of a network are made, and the number of groups.
CONVS = {
    "conv1d": (1, {}),
    "conv1d_groups": (1, dict(groups=2, padding=1)),
    "conv2d_stride": (2, dict(stride=(2, 1), padding=(1, 0))),
    "conv2d_dilation": (2, dict(dilation=(2, 1), padding=2)),
    "conv2d_same": (2, dict(kernel_size=(4, 3), padding="same")),
    "conv2d_reflect": (2, dict(padding=1, padding_mode="reflect")),
    "conv2d_circular": (2, dict(padding=1, padding_mode="circular")),
    "conv2d_groups": (2, dict(groups=2, padding=1)),
    "conv2d_pointwise": (2, dict(kernel_size=1)),
    "conv3d": (3, dict(padding=1, bias=False)),
    "conv3d_pointwise": (3, dict(kernel_size=1)),
}
TOKENS = 17


def layers(kind: str) -> list[nn.Module]:
    if kind in CONVS:
        dims, settings = CONVS[kind]
        conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1]
        settings = dict(kernel_size=3) | settings
        return [conv(4, 8, **settings), conv(8, 16, **settings)]
    if kind.startswith("embedding"):
        settings = dict(padding_idx=3) if kind == "embedding_padding" else {}
        return [nn.Embedding(TOKENS, 64, **settings), nn.Embedding(TOKENS, 64, **settings)]
    if kind == "hf_conv1d":
        return [Conv1D(128, 64), Conv1D(64, 128)]
    bias = kind != "linear_no_bias"
    return [nn.Linear(64, 128, bias=bias), nn.Linear(128, 64, bias=bias)]


class Block(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.tanh(self.layer(x))


class Net(nn.Module):
    """Two blocks `h.0.layer` and `h.1.layer`, a norm and a linear head."""

    def __init__(self, kind: str):
        super().__init__()
        made = layers(kind)
        self.of_tokens = kind.startswith("embedding")
        self.h = nn.ModuleList([Block(layer) for layer in made])
        self.of_images = kind in CONVS
        width = 16 if self.of_images else 64
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        if self.of_tokens:
            x = self.h[0](x) + self.h[1](x)
        else:
            x = self.h[1](self.h[0](x))
            if self.of_images:
                x = x.flatten(2).transpose(1, 2)
        return self.head(self.norm(x))


def inputs(kind: str) -> torch.Tensor:
    if kind in CONVS:
        return torch.randn(2, 4, *(9, 8, 7)[: CONVS[kind][0]])
    if kind.startswith("embedding"):
        return torch.randint(0, TOKENS, (3, 6))
    return torch.randn(2, 7, 64)


def values(weight: torch.Tensor, base: str) -> torch.Tensor:
    """The values that a scheme keeps of a weight, in its dtype, by bitsandbytes or optimum-quanto."""
    if base == "dense":
        return weight.detach().clone()
    if base in ("int8", "nf4", "nf4_bnb"):
        return quantised(weight, base.removesuffix("_bnb")).to(weight.dtype)
    matrix = weight.detach().flatten(1)
    if base == "llm_int8":
        data, scb, _ = bnb.int8_vectorwise_quant(matrix.half())
        kept = torch.ops.bitsandbytes.int8_vectorwise_dequant(data, scb)
    else:
        packed, absmax = quantize_4bit(matrix, 64, "nf4", torch.uint8)
        offset = absmax.mean()
        codes, nested = quantize_blockwise(absmax - offset, MAP, 256)
        scales = dequantize_blockwise(codes, nested, MAP, 256, torch.float32) + offset
        kept = dequantize_4bit(packed, scales, 64, "nf4", matrix.shape, matrix.dtype)
    return kept.view(weight.shape).to(weight.dtype)


def spread(weight: torch.Tensor) -> None:
    """Gives a matrix singular values that fall in pairs: a randomised decomposition finds the largest exactly."""
    u, s, vh = torch.linalg.svd(weight.data.float(), full_matrices=False)
    s = s[0] * 3.0 ** -(torch.arange(len(s)) // 2).clamp(max=4)
    weight.data = (u * s @ vh).to(weight.dtype)


def on_bitsandbytes(linear: nn.Linear) -> nn.Module:
    """The layer with nf4 weights as bitsandbytes packs them and computes with them."""
    import bitsandbytes

    out, inn = linear.weight.shape
    layer = bitsandbytes.nn.Linear4bit(
        inn, out, bias=linear.bias is not None, compute_dtype=torch.float32, compress_statistics=False, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data.clone(), requires_grad=False, compress_statistics=False, quant_type="nf4"
    )
    layer.bias = linear.bias
    return layer.to("cpu")
