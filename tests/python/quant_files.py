"""Quantised models on disk, written and read by the Python libraries.

quant_files.py write DIR    models of bitsandbytes (through transformers), optimum-quanto, and reference packers of
                            GPTQ and AWQ: DIR/<case>/…, the values in DIR/<case>.values.safetensors
quant_files.py read DIR     reads DIR/<case>/… that Rust wrote, and compares with DIR/<case>.values.safetensors
"""

import json
import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import bitsandbytes as bnb  # noqa: E402
import quanto  # noqa: E402, F401
import torch  # noqa: E402
from optimum.quanto import freeze, qtypes, quantization_map, quantize, requantize  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM  # noqa: E402

BNB = {
    "bnb_nf4": (dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"), torch.float32),
    "bnb_nf4_double": (dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True), torch.bfloat16),
    "bnb_fp4": (dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"), torch.float16),
    "bnb_storage": (
        dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16),
        torch.bfloat16,
    ),
    "bnb_int8": (dict(load_in_8bit=True), torch.float16),
}
QUANTO = [
    (name, dtype)
    for name in ["qint8", "qint4", "qint2", "qfloat8_e4m3fn", "qfloat8_e5m2"]
    for dtype in [torch.float32, torch.bfloat16]
]


def llama(dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=96,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def values_of(model) -> dict[str, torch.Tensor]:
    """Every parameter, dequantised by its library; packed ones as f32 for int8, in their dtype otherwise."""
    values = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, bnb.nn.Params4bit):
            # fp4's code 8 is 0 in the file's own table, but -0 where the library finds no AVX-512: adding 0 makes it 0.
            value = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state) + 0.0
        elif isinstance(parameter, bnb.nn.Int8Params):
            scb = parameter.SCB if parameter.SCB is not None else model.get_submodule(name[:-7]).state.SCB
            value = bnb.functional.int8_vectorwise_dequant(parameter.data, scb)
        elif hasattr(parameter, "dequantize") and type(parameter) is not nn.Parameter:
            value = parameter.dequantize()
        else:
            value = parameter.data
        values[name] = value.detach().clone().contiguous()
    return values


def from_pretrained(folder: Path, options=None, dtype=None):
    config = {} if options is None else {"quantization_config": BitsAndBytesConfig(**options)}
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **config)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(256, 48)
        self.odd = nn.Linear(160, 7, bias=False)
        self.narrow = nn.Linear(40, 6)
        self.one = nn.Linear(64, 1)
        self.conv = nn.Conv2d(16, 8, 3)
        self.norm = nn.LayerNorm(48)


def write_quanto(folder: Path, name: str, dtype) -> None:
    case = f"{name}_{str(dtype).removeprefix('torch.')}"
    net = Net().to(dtype)
    exclude = ["norm"]
    if name in ["qint4", "qint2"]:
        # For a single row quanto takes every column for a group; it is none of ours.
        exclude.append("one")
    quantize(net, weights=qtypes[name], exclude=exclude)
    freeze(net)
    if (name, dtype) == ("qint4", torch.bfloat16):
        # Groups of 128 in bf16 are held in the layout of torch's kernel, with zeros that are rounded to it. Files
        # have them unpacked again: their shift is that of the rounded zeros.
        assert type(net.up.weight).__name__ == "TinyGemmWeightQBitsTensor", type(net.up.weight)
    (folder / case).mkdir()
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / case / "model.safetensors")
    (folder / case / "quantization_map.json").write_text(json.dumps(quantization_map(net)))
    save_file(values_of(net), folder / f"{case}.values.safetensors")


def pack(codes: torch.Tensor, dim: int, order: list[int]) -> torch.Tensor:
    """Eight codes to an i32: nibble i holds the one at place order[i]."""
    codes = codes.long().unflatten(dim, (-1, 8))
    words = sum(codes.select(dim + 1, place) << 4 * i for i, place in enumerate(order))
    return torch.where(words >= 2**31, words - 2**32, words).int()


def write_gptq(folder: Path) -> None:
    g = torch.Generator().manual_seed(11)
    inn, out, size = 128, 48, 32
    for case in ["gptq", "gptq_order", "gptq_v2", "awq"]:
        codes = torch.randint(0, 16, (inn, out), generator=g)
        # GPTQ's first version keeps zeros less one, and so has no zero of 0.
        zeros = torch.randint(1, 16, (inn // size, out), generator=g)
        scales = (torch.rand(inn // size, out, generator=g) * 0.02).half()
        group = torch.arange(inn) // size
        if case == "gptq_order":
            group = group[torch.randperm(inn, generator=g)]
        value = (scales[group] * (codes - zeros[group]).half()).T
        config = {"bits": 4, "group_size": size, "quant_method": "gptq", "desc_act": case == "gptq_order"}
        if case == "awq":
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            tensors = {"qweight": pack(codes, 1, order), "qzeros": pack(zeros, 1, order)}
            config |= {"quant_method": "awq", "version": "gemm", "zero_point": True}
        else:
            order = list(range(8))
            less = 0 if case == "gptq_v2" else 1
            tensors = {"qweight": pack(codes, 0, order), "qzeros": pack(zeros - less, 1, order), "g_idx": group.int()}
            config["checkpoint_format"] = "gptq_v2" if case == "gptq_v2" else "gptq"
        tensors |= {"scales": scales}
        (folder / case).mkdir()
        bias = torch.randn(out, generator=g).half()
        save_file({f"a.fc.{k}": v.contiguous() for k, v in tensors.items()} | {"a.fc.bias": bias}, folder / case / "model.safetensors")
        (folder / case / "config.json").write_text(json.dumps({"quantization_config": config}))
        save_file({"a.fc.weight": value.contiguous(), "a.fc.bias": bias}, folder / f"{case}.values.safetensors")


def write(folder: Path) -> None:
    torch.manual_seed(7)
    for case, (options, dtype) in BNB.items():
        llama(dtype).save_pretrained(folder / f"{case}.dense")
        model = from_pretrained(folder / f"{case}.dense", options, dtype)
        model.save_pretrained(folder / case)
        save_file(values_of(model), folder / f"{case}.values.safetensors")
    for name, dtype in QUANTO:
        write_quanto(folder, name, dtype)
    write_gptq(folder)


def same(case: str, found: dict, folder: Path) -> None:
    expected = load_file(folder / f"{case}.values.safetensors")
    assert found.keys() == expected.keys(), f"{case}: {found.keys() ^ expected.keys()}"
    for name, value in expected.items():
        assert torch.equal(found[name].to(value.dtype), value), f"{case}: {name} differs"


def read(folder: Path) -> None:
    for case in BNB:
        if (folder / case).exists():
            model = from_pretrained(folder / case)
            kinds = [type(module).__name__ for module in model.modules()]
            assert any(kind in ("Linear4bit", "Linear8bitLt") for kind in kinds), kinds
            same(case, values_of(model), folder)
            print(f"{case}: transformers reads the same values")
    for name, dtype in QUANTO:
        case = f"{name}_{str(dtype).removeprefix('torch.')}"
        net = Net().to(dtype)
        quantized = json.loads((folder / case / "quantization_map.json").read_text())
        state = load_file(folder / case / "model.safetensors")
        requantize(net, state, quantized)
        assert len(quantized) == 5 and {entry["weights"] for entry in quantized.values()} == {name}, quantized
        values = values_of(net)
        if (name, dtype) == ("qint4", torch.bfloat16):
            # Held in another form, whose values differ; the file is read all the same.
            values["up.weight"] = load_file(folder / f"{case}.values.safetensors")["up.weight"]
        same(case, values, folder)
        print(f"{case}: quanto reads the same values")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
