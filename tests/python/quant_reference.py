"""Writes what bitsandbytes and a plain torch reference make of random and adversarial weights.

quant_reference.py FILE    a safetensors file of `<case>/input`, `<case>/<scheme>/<tensor>`

nf4 is bitsandbytes' own code. Its double quantisation has two implementations: one in torch, which
picks the nearest of the 256 codes, and one for the CPU with a table that can be some codes off. The
file holds the first; that the second is never nearer is checked here.
"""

import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes would compile a function for every shape

import bitsandbytes.functional as bnb  # noqa: E402
import torch  # noqa: E402
from optimum.quanto import AbsmaxOptimizer, qint8, quantize_weight  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def default_kernel(name: str):
    """The kernel in torch that serves every device without one of its own."""
    # PrivateUse1 is such a device.
    kernel = torch.library.get_kernel(f"bitsandbytes::{name}", "PrivateUse1")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
    return lambda *args: kernel.call_boxed(keys, *args)


quantize_blockwise = default_kernel("quantize_blockwise")
dequantize_blockwise = default_kernel("dequantize_blockwise")
quantize_4bit = default_kernel("quantize_4bit")
dequantize_4bit = default_kernel("dequantize_4bit")

CODE = bnb.get_4bit_type("nf4", device="cpu")
MAP = bnb.create_dynamic_map()


def weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    cases = {
        "random": randn(32, 256),
        "random_small_scale": randn(48, 128) * 2e-3,
        "many_nested_blocks": randn(300, 192),
        "a_million_values": randn(1030, 1027),
        "bf16": randn(40, 320).bfloat16(),
        "f16": randn(40, 320).half(),
        "bf16_odd": randn(33, 65).bfloat16(),
        "f16_odd": randn(7, 129).half(),
    }
    odd = [(1, 1), (64, 1), (3, 7), (5, 63), (33, 65), (7, 129), (16, 80)]
    for shape in [*odd, (1, 64), (2, 8192), (255, 64), (256, 64), (257, 64)]:
        cases[f"size_{shape[0]}x{shape[1]}"] = randn(*shape)
    for dtype in [torch.float32, torch.bfloat16, torch.float16]:
        name = str(dtype).removeprefix("torch.")
        cases[f"zeros_{name}"] = torch.zeros(8, 96, dtype=dtype)
        cases[f"zeros_short_block_{name}"] = torch.zeros(3, 7, dtype=dtype)
        outlier = randn(8, 128) * 1e-3
        outlier[3, 17] = 1e4
        cases[f"outlier_{name}"] = outlier.to(dtype)
        only = torch.zeros(8, 100)
        only[5, 99] = -3.0
        cases[f"one_value_{name}"] = only.to(dtype)
        cases[f"constant_{name}"] = torch.full((6, 70), -0.3, dtype=dtype)
        cases[f"tiny_{name}"] = (randn(4, 96) * torch.finfo(dtype).tiny * 0.25).to(dtype)
        # Nowhere near enough for the smallest normal number of the scale.
        cases[f"smallest_{name}"] = torch.full((2, 64), torch.finfo(dtype).smallest_normal, dtype=dtype) * 2**-6
        # The sum of the scales must stay finite: bitsandbytes answers NaN otherwise.
        huge = randn(4, 96).clamp(-1, 1) * (torch.finfo(dtype).max / 8)
        huge[:, 5] = torch.finfo(dtype).max / 8
        cases[f"huge_{name}"] = huge.to(dtype)
    zero_rows = randn(16, 80)
    zero_rows[::3] = 0.0
    zero_rows[1] = -0.0
    cases["zero_rows"] = zero_rows
    # Every value that lies half-way between two codes, and its neighbours, under a scale of 1.
    middles = (CODE[:-1] + CODE[1:]) / 2
    up, down = (torch.nextafter(middles, torch.full_like(middles, end)) for end in (2.0, -2.0))
    row = torch.cat([torch.tensor([1.0]), middles, up, down, CODE, torch.zeros(2)])
    cases["half_way"] = torch.stack([row, -row, row.flip(0)])
    # The same for the scales: 512 blocks whose maxima are half-way between codes of the dynamic map.
    middles = (MAP[:-1] + MAP[1:]) / 2
    scales = torch.cat([middles, torch.tensor([1.0]), middles, torch.tensor([-1.0])]) * 0.125 + 0.25
    cases["half_way_scales"] = scales.unsqueeze(1) * torch.linspace(-1, 1, 64)
    cases["same_scales"] = torch.linspace(-1, 1, 64).repeat(300, 1)
    # int8: halves, which round to even, at a scale of exactly 1.
    halves = torch.arange(-126, 127).float() + 0.5
    cases["int8_halves"] = torch.cat([halves, torch.tensor([127.0, 0.0, -127.0])]).repeat(2, 1)
    return cases


def nf4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    for given, default in zip((packed, state.absmax), quantize_4bit(weight, 64, "nf4", torch.uint8)):
        assert torch.equal(given, default), "the public function no longer is the kernel in torch"
    return {
        "weight": packed,
        "weight.absmax": state.absmax,
        "weight.quant_map": state.code,
        "value": dequantize(weight, packed, state.absmax),
    }


def nf4_double(name: str, weight: torch.Tensor, figures: dict) -> dict[str, torch.Tensor]:
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    _, plain = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert state.blocksize == 64 and state.state2.blocksize == 256
    centred = plain.absmax - state.offset
    codes, nested = quantize_blockwise(centred, MAP, 256)
    compare_tables(name, centred, codes, nested, state, figures)
    absmax = dequantize_blockwise(codes, nested, MAP, 256, torch.float32) + state.offset
    return {
        "weight": packed,
        "weight.absmax": codes,
        "weight.quant_map": state.code,
        "weight.nested_absmax": nested,
        "weight.nested_quant_map": state.state2.code,
        "weight.nested_offset": state.offset,
        "value": dequantize(weight, packed, absmax),
    }


def compare_tables(name, centred, codes, nested, state, figures) -> None:
    """The table of the CPU kernel against the nearest code."""
    figures["scales"] += codes.numel()
    other = codes != state.absmax
    # A block of equal scales: all of its codes stand for 0 times something.
    scale = nested.repeat_interleave(256)[: codes.numel()].double()
    degenerate = scale <= 1.1e-38
    scaled = (centred.double() / scale).clamp(-1, 1)
    distance = lambda c: (MAP.double()[c.long()] - scaled).abs()  # noqa: E731
    nearer = other & ~degenerate & (distance(state.absmax) < distance(codes) - 1e-7)
    assert not nearer.any(), f"{name}: the CPU kernel is nearer for {nearer.sum()} scales"
    figures["other"] += int((other & ~degenerate).sum())
    figures["degenerate"] += int((other & degenerate).sum())
    off = (codes.int() - state.absmax.int())[other & ~degenerate].abs()
    figures["off"] = max([figures["off"], *off.tolist()])


def dequantize(weight, packed, absmax) -> torch.Tensor:
    """The values in the weight's dtype."""
    shape, dtype = tuple(weight.shape), weight.dtype
    default = dequantize_4bit(packed, absmax, 64, "nf4", shape, dtype)
    # The CPU kernel takes the scales of the wrong blocks where rows don't end with a block, and
    # flushes bf16 values below the smallest normal number to zero: no reference for either.
    subnormal = (default != 0) & (default.abs().float() < torch.finfo(torch.float32).tiny)
    if shape[1] % 64 == 0 and not subnormal.any():
        native = torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, 64, "nf4", shape, dtype)
        assert same_bits(default, native), f"{shape} {dtype}: {int((default != native).sum())} values differ"
    return default


def int8(name: str, weight: torch.Tensor, figures: dict) -> dict[str, torch.Tensor]:
    """quanto's qint8, all in the weight's dtype: scale max|w| / 127 by row, q the nearest integer, ties to even."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    data = torch.round(weight / safe).clamp(-128, 127).to(torch.int8)
    value = data.to(weight.dtype) * scale

    # quanto has one scale for a single row, and divides by the scale of a row of zeros.
    peers_scale = AbsmaxOptimizer()(weight, qint8, axis=0)
    peers = quantize_weight(weight, qint8, 0, peers_scale, optimized=False)
    assert same_bits(peers_scale.reshape(-1, 1), scale), f"{name}: scales"
    dense = (scale != 0).squeeze(1)
    assert torch.equal(peers._data[dense], data[dense]), f"{name}: codes"
    assert same_bits(peers.dequantize()[dense], value[dense]), f"{name}: values"
    figures["rows"] += int(dense.sum())
    figures["zero rows"] += int((~dense).sum())
    return {"weight": data, "weight.scale": scale, "value": value}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    as_integers = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(as_integers), b.contiguous().view(as_integers))


def main() -> None:
    file = Path(sys.argv[1])
    out = {}
    double = dict.fromkeys(["scales", "other", "off", "degenerate"], 0)
    rows = dict.fromkeys(["rows", "zero rows"], 0)
    for name, weight in weights().items():
        made = {"nf4": nf4(weight), "nf4+dq": nf4_double(name, weight, double), "int8": int8(name, weight, rows)}
        out[f"{name}/input"] = weight
        for scheme, tensors in made.items():
            out |= {f"{name}/{scheme}/{key}": tensor.clone().contiguous() for key, tensor in tensors.items()}
    save_file(out, file)
    print(f"bitsandbytes' CPU kernel for scales: {double}; int8 equal to quanto: {rows}")


if __name__ == "__main__":
    main()
