"""Writes what bitsandbytes, optimum-quanto and plain torch references make of random and adversarial weights.

quant_reference.py FILE    a safetensors file of `<case>/input`, `<case>/<scheme>/<tensor>`

nf4 and fp4 are bitsandbytes' own code. Its double quantisation has two implementations: one in torch, which
picks the nearest of the 256 codes, and one for the CPU with a table that can be some codes off. The
file holds the first; that the second is never nearer is checked here.
"""

import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes would compile a function for every shape

import bitsandbytes.functional as bnb  # noqa: E402
import quanto  # noqa: E402, F401
import torch  # noqa: E402
from optimum.quanto import (  # noqa: E402
    AbsmaxOptimizer,
    MaxOptimizer,
    qfloat8_e4m3fn,
    qfloat8_e5m2,
    qint2,
    qint4,
    qint8,
    quantize_weight,
)
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


def four_bit(weight: torch.Tensor, quant_type: str, block: int) -> dict[str, torch.Tensor]:
    packed, absmax = quantize_4bit(weight, block, quant_type, torch.uint8)
    code = bnb.get_4bit_type(quant_type, device="cpu")
    if (quant_type, block) == ("nf4", 64):
        public, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        assert torch.equal(packed, public) and torch.equal(absmax, state.absmax), "the public function is another one"
    return {
        "weight": packed,
        "weight.absmax": absmax,
        "weight.quant_map": code,
        "value": dequantize(weight, packed, absmax, quant_type, block),
    }


def four_bit_double(name: str, weight: torch.Tensor, quant_type: str, figures: dict) -> dict[str, torch.Tensor]:
    packed, absmax = quantize_4bit(weight, 64, quant_type, torch.uint8)
    _, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=True)
    assert state.blocksize == 64 and state.state2.blocksize == 256
    centred = absmax - state.offset
    codes, nested = quantize_blockwise(centred, MAP, 256)
    compare_tables(name, centred, codes, nested, state, figures)
    scale = dequantize_blockwise(codes, nested, MAP, 256, torch.float32) + state.offset
    return {
        "weight": packed,
        "weight.absmax": codes,
        "weight.quant_map": state.code,
        "weight.nested_absmax": nested,
        "weight.nested_quant_map": state.state2.code,
        "weight.nested_offset": state.offset,
        "value": dequantize(weight, packed, scale, quant_type, 64),
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


def dequantize(weight, packed, absmax, quant_type, block) -> torch.Tensor:
    """The values in the weight's dtype."""
    shape, dtype = tuple(weight.shape), weight.dtype
    default = dequantize_4bit(packed, absmax, block, quant_type, shape, dtype)
    # The CPU kernel takes the scales of the wrong blocks where rows don't end with a block, and
    # flushes bf16 values below the smallest normal number to zero: no reference for either.
    subnormal = (default != 0) & (default.abs().float() < torch.finfo(torch.float32).tiny)
    if shape[1] % block == 0 and not subnormal.any():
        native = torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, block, quant_type, shape, dtype)
        # Its -0 of fp4 is 0.
        assert torch.equal(default, native), f"{shape} {dtype}: {int((default != native).sum())} values differ"
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


def llm_int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """bitsandbytes' int8; a row of zeros, which it divides by zero, has codes of zero."""
    if not torch.isfinite(weight.half()).all():
        return {}
    data, scb, _ = bnb.int8_vectorwise_quant(weight.half())
    data[scb == 0] = 0
    value = torch.ops.bitsandbytes.int8_vectorwise_dequant(data, scb).to(weight.dtype)
    return {"weight": data, "SCB": scb, "value": value}


def quanto_group(columns: int, size: int) -> int:
    """The rule of quanto's modules, which know a size of 128 only."""
    if columns <= size:
        return columns
    while columns % size and size > 32:
        size -= 32
    return columns if columns % size else size


def affine(name: str, weight: torch.Tensor, qtype, size: int, figures: dict) -> dict[str, torch.Tensor]:
    """qint4 and qint2: quanto's own, but for groups of equal values, which it divides by a scale of zero."""
    if weight.abs().max() > torch.finfo(weight.dtype).max / 4:
        return {}
    group = quanto_group(weight.shape[1], size)
    grouped = weight.reshape(-1, group)
    scale = (grouped.amax(1, keepdim=True) - grouped.amin(1, keepdim=True)) / (2**qtype.bits - 1)
    # Which of two zeros is the least depends on the order: it is the one without a sign.
    shift = -(grouped.amin(1, keepdim=True) + 0.0)
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = torch.round((grouped + shift) / safe).clamp(0, 2**qtype.bits - 1).to(torch.uint8)
    value = scale * codes - shift

    per_byte = 8 // qtype.bits
    rows = -(-len(codes) // per_byte)
    padded = torch.cat([codes, torch.zeros(rows * per_byte - len(codes), group, dtype=torch.uint8)])
    packed = torch.zeros(rows, group, dtype=torch.uint8)
    for part in range(per_byte):
        packed |= padded[part * rows : (part + 1) * rows] << (qtype.bits * part)

    if weight.shape[0] > 1:
        group_size = None if group == weight.shape[1] else group
        peers_scale, peers_shift = MaxOptimizer()(weight, qtype, axis=0, group_size=group_size)
        peers = quantize_weight(weight, qtype, 0, peers_scale, peers_shift, group_size, optimized=False)
        assert same_bits(peers_scale, scale) and same_bits(peers_shift + 0.0, shift + 0.0), f"{name}: scales"
        used = (scale != 0).squeeze(1)
        theirs = peers._data.unpack().reshape(-1, group)
        assert torch.equal(theirs[used], codes[used]), f"{name}: codes"
        assert same_bits(peers.dequantize().reshape(-1, group)[used], value[used]), f"{name}: values"
        if used.all():
            assert torch.equal(peers._data._data, packed), f"{name}: bytes"
        figures["groups"] += int(used.sum())
        figures["constant groups"] += int((~used).sum())
    return {
        "weight": packed,
        "weight.scale": scale,
        "weight.shift": shift,
        "value": value.reshape(weight.shape),
    }


def fp8(name: str, weight: torch.Tensor, qtype, figures: dict) -> dict[str, torch.Tensor]:
    """qfloat8: quanto's, but for scales below the normal numbers of the dtype, which are raised."""
    info, dtype = torch.finfo(qtype.dtype), weight.dtype
    raw = weight.abs().amax(dim=1, keepdim=True) / info.max
    scale = raw.clamp(min=torch.finfo(dtype).smallest_normal)
    if not torch.isfinite(scale * info.max).all():
        return {}
    data = (weight / scale).clamp(info.min, info.max).to(qtype.dtype)
    value = data.to(dtype) * scale
    normal = (raw == scale).squeeze(1)
    if weight.shape[0] > 1:
        peers_scale = AbsmaxOptimizer()(weight, qtype, axis=0)
        peers = quantize_weight(weight, qtype, 0, peers_scale, optimized=False)
        assert same_bits(peers_scale[normal], scale[normal]), f"{name}: scales"
        as_bytes = lambda t: t.view(torch.uint8)[normal]  # noqa: E731
        assert torch.equal(as_bytes(peers._data), as_bytes(data)), f"{name}: codes"
        assert same_bits(peers.dequantize()[normal], value[normal]), f"{name}: values"
        figures["fp8 rows"] += int(normal.sum())
        figures["fp8 rows with a raised scale"] += int((~normal).sum())
    return {"weight": data.view(torch.uint8), "weight.scale": scale, "value": value}


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def mxfp4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The OCP specification's conversion, in double precision; scales through torch's e8m0."""
    rows, columns = weight.shape
    wide = torch.nn.functional.pad(weight.double(), (0, -columns % 32)).reshape(rows, -1, 32)
    largest = wide.abs().amax(2, keepdim=True)
    exponent = torch.where(largest == 0, -127.0, torch.floor(torch.log2(largest)) - 2).clamp(-127, 127)
    power = torch.exp2(exponent)
    scale = power.float().to(torch.float8_e8m0fnu)
    assert torch.equal(scale.float().double(), power)
    # Distances to all eight magnitudes; of two that are as near, the even code.
    distance = ((wide / power).abs().unsqueeze(-1) - E2M1.double()).abs()
    nearest = distance.amin(-1, keepdim=True)
    even_first = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    code = even_first[(distance == nearest)[..., even_first].int().argmax(-1)]
    sign = torch.signbit(wide).long() * 8
    value = torch.where(sign > 0, -E2M1[code], E2M1[code]).double() * power
    codes = (code | sign).to(torch.uint8).reshape(rows, -1, 2)
    packed = (codes[..., 0] | codes[..., 1] << 4)[:, : (columns + 1) // 2]
    return {
        "weight": packed,
        "weight.scale": scale.squeeze(2).view(torch.uint8),
        "value": value.reshape(rows, -1)[:, :columns].to(weight.dtype),
    }


def cast(weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    data = weight.to(dtype)
    return {"weight": data, "value": data.to(weight.dtype)} if torch.isfinite(data).all() else {}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    as_integers = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(as_integers), b.contiguous().view(as_integers))


def main() -> None:
    file = Path(sys.argv[1])
    out = {}
    double = dict.fromkeys(["scales", "other", "off", "degenerate"], 0)
    rows = dict.fromkeys(
        ["rows", "zero rows", "groups", "constant groups", "fp8 rows", "fp8 rows with a raised scale"], 0
    )
    for name, weight in weights().items():
        made = {
            "int8": int8(name, weight, rows),
            "llm_int8": llm_int8(weight),
            "int4": affine(name, weight, qint4, 128, rows),
            "int4-g32": affine(name, weight, qint4, 32, rows),
            "int2": affine(name, weight, qint2, 128, rows),
            "int2-g64": affine(name, weight, qint2, 64, rows),
            "fp8-e4m3": fp8(name, weight, qfloat8_e4m3fn, rows),
            "fp8-e5m2": fp8(name, weight, qfloat8_e5m2, rows),
            "mxfp4": mxfp4(weight),
            "bf16": cast(weight, torch.bfloat16),
            "f16": cast(weight, torch.float16),
        }
        for quant_type in ["nf4", "fp4"]:
            made[quant_type] = four_bit(weight, quant_type, 64)
            made[f"{quant_type}+dq"] = four_bit_double(name, weight, quant_type, double)
            for block in [32, 4096]:
                made[f"{quant_type}-b{block}"] = four_bit(weight, quant_type, block)
        out[f"{name}/input"] = weight
        for scheme, tensors in made.items():
            out |= {f"{name}/{scheme}/{key}": tensor.clone().contiguous() for key, tensor in tensors.items()}
    save_file(out, file)
    print(f"bitsandbytes' CPU kernel for scales: {double}; equal to quanto: {rows}")


if __name__ == "__main__":
    main()
