"""PEFT's side of layers.rs: every kind of layer that a weight may belong to.

layers_reference.py DIR    writes, for each case,
    DIR/<case>/model.pt              the base as a TorchScript module
    DIR/<case>/adapter/              the adapter to start from, all of its tensors random
    DIR/<case>/record.safetensors    outputs, gradients and values over a few steps
and DIR/cases.json, which lists the cases.

Where PEFT is known to be wrong, its module is repaired to follow the formula; see `repair`.
"""

import copy
import json
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from mirror import adapters, snapshot
from optimum.quanto import AbsmaxOptimizer, qint8, quantize_weight
from peft import LoraConfig, get_peft_model
from quant_reference import dequantize_4bit, quantize_4bit
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

STEPS, LR = 3, 0.05


class Convs(nn.Module):
    """`dims` times a convolution and a linear head over the mean."""

    def __init__(self, dims: int, **settings):
        super().__init__()
        kind = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1]
        settings = dict(kernel_size=3, bias=True) | settings
        self.conv = kind(4, 6, **settings)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x)).flatten(2).mean(-1))


class Words(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.embed = nn.Embedding(17, 64, **settings)
        self.head = nn.Linear(64, 5)

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


class Linears(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.up = nn.Linear(64, 48, bias=bias)
        self.head = nn.Linear(48, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.up(x)))


class Gpt(nn.Module):
    """HF's Conv1D: `addmm` with a weight (in, out)."""

    def __init__(self):
        super().__init__()
        self.c_fc = Conv1D(48, 64)
        self.c_proj = Conv1D(5, 48)

    def forward(self, x):
        return self.c_proj(torch.tanh(self.c_fc(x)))


def image(dims: int):
    return lambda: torch.randn(2, 4, *(9, 8, 7)[:dims])


def ids():
    return torch.randint(0, 17, (3, 6))


def features():
    return torch.randn(2, 7, 64)


CONV = dict(target_modules=["conv"], r=4, lora_alpha=8)
WORDS = dict(target_modules=["embed"], r=4, lora_alpha=8)
LINEAR = dict(target_modules=["up"], r=4, lora_alpha=8)

# name: (module, inputs, the fields of LoraConfig or of another `kind`, groups of a convolution)
CASES = {
    "conv1d": (lambda: Convs(1), image(1), CONV, 1),
    "conv1d_stride": (lambda: Convs(1, stride=2, padding=1), image(1), CONV, 1),
    "conv1d_groups": (lambda: Convs(1, groups=2), image(1), CONV, 2),
    "conv2d": (lambda: Convs(2, padding=1), image(2), CONV, 1),
    "conv2d_stride": (lambda: Convs(2, stride=(2, 3), padding=(1, 0)), image(2), CONV, 1),
    "conv2d_dilation": (lambda: Convs(2, dilation=(2, 1), padding=2), image(2), CONV, 1),
    "conv2d_same": (lambda: Convs(2, kernel_size=(4, 3), padding="same"), image(2), CONV, 1),
    "conv2d_same_dilation": (lambda: Convs(2, kernel_size=3, padding="same", dilation=2), image(2), CONV, 1),
    "conv2d_reflect": (lambda: Convs(2, padding=1, padding_mode="reflect"), image(2), CONV, 1),
    "conv2d_circular": (lambda: Convs(2, padding=1, padding_mode="circular"), image(2), CONV, 1),
    "conv2d_groups": (lambda: Convs(2, groups=2, padding=1), image(2), CONV, 2),
    "conv2d_pointwise": (lambda: Convs(2, kernel_size=1), image(2), CONV, 1),
    "conv2d_dropout": (lambda: Convs(2), image(2), CONV | dict(lora_dropout=0.3), 1),
    "conv2d_no_bias": (lambda: Convs(2, bias=False), image(2), CONV, 1),
    "conv3d": (lambda: Convs(3, padding=1), image(3), CONV, 1),
    "conv3d_stride": (lambda: Convs(3, stride=2), image(3), CONV, 1),
    "conv3d_pointwise": (lambda: Convs(3, kernel_size=1), image(3), CONV, 1),
    "embedding": (lambda: Words(), ids, WORDS, 1),
    "embedding_padding": (lambda: Words(padding_idx=3), ids, WORDS, 1),
    "embedding_scale_grad": (lambda: Words(scale_grad_by_freq=True), ids, WORDS, 1),
    "linear": (lambda: Linears(), features, LINEAR, 1),
    "linear_no_bias": (lambda: Linears(bias=False), features, LINEAR, 1),
    "linear_dropout": (lambda: Linears(), features, LINEAR | dict(lora_dropout=0.3), 1),
    "gpt": (lambda: Gpt(), features, LINEAR | dict(target_modules=["c_fc", "c_proj"], fan_in_fan_out=True), 1),
}
for name, settings in {"linear": LINEAR, "conv2d": CONV, "conv1d": CONV}.items():
    CASES[f"{name}_lora_bias"] = (*CASES[name][:2], settings | dict(lora_bias=True), 1)
for name in ["linear", "linear_dropout", "linear_no_bias", "gpt", "embedding", "conv1d", "conv2d_stride", "conv2d_dropout", "conv3d"]:
    module, inputs, settings, groups = CASES[name]
    CASES[f"dora_{name}"] = (module, inputs, settings | dict(use_dora=True), groups)

for init in ["pissa", "olora"]:
    CASES[f"init_{init}"] = (lambda: Linears(), features, LINEAR | dict(init_lora_weights=init), 1)
# On HF's Conv1D, PEFT's olora fails.
CASES["init_pissa_gpt"] = (*CASES["gpt"][:2], CASES["gpt"][2] | dict(init_lora_weights="pissa"), 1)

# Which cases also run on quantised bases and in bf16.
VARIANTS = [("dense", torch.float32), ("dense", torch.bfloat16), ("int8", torch.float32), ("nf4", torch.float32)]


def quantised(weight: torch.Tensor, base: str) -> torch.Tensor:
    """The values that a scheme keeps of a weight, by its reference."""
    matrix = weight.detach().flatten(1)
    if base == "int8":
        values = quantize_weight(matrix, qint8, 0, AbsmaxOptimizer()(matrix, qint8, axis=0), optimized=False).dequantize()
    else:
        packed, scales = quantize_4bit(matrix, 64, "nf4", torch.uint8)
        values = dequantize_4bit(packed, scales, 64, "nf4", matrix.shape, matrix.dtype)
    return values.view(weight.shape)


def repair(model) -> None:
    """PEFT copies stride and padding to a convolution's A, but neither dilation nor padding mode."""
    for module in model.modules():
        if not hasattr(module, "lora_A") or not isinstance(module.get_base_layer(), nn.modules.conv._ConvNd):
            continue
        base = module.get_base_layer()
        for name, a in module.lora_A.items():
            twin = type(base)(
                a.in_channels, a.out_channels, base.kernel_size, base.stride, base.padding, base.dilation,
                bias=False, padding_mode=base.padding_mode,
            )  # fmt: skip
            twin.weight = a.weight
            module.lora_A[name] = twin


def randomise(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(adapters(model).items()):
            noise = torch.randn(p.shape, generator=generator) * 0.2
            p.copy_(p * (1 + noise) if "magnitude" in name else noise)


def key(name: str) -> str:
    """The key of a parameter in a file, where it isn't PEFT's own name."""
    return name.removesuffix(".default").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def runs(case: str, base: str, dtype: torch.dtype) -> bool:
    """PEFT's DoRA of a convolution fails in bf16: it computes with inputs of f32 and weights of bf16.

    The values of a quantised base, which PEFT has here as dense ones, can't be packed again with a part taken out.
    """
    if case.startswith("init"):
        return base == "dense"
    return not (case.startswith("dora_conv") and dtype == torch.bfloat16)


def make(case: str, base: str, dtype: torch.dtype, out: Path) -> dict:
    module, inputs, settings, groups = CASES[case]
    torch.manual_seed(sum(map(ord, case)))
    model = module().to(dtype)
    drawn = [inputs() for _ in range(STEPS)]
    xs = [x.to(dtype) if x.is_floating_point() else x for x in drawn]
    labels = [None] * STEPS

    folder = out / f"{case}-{base}-{str(dtype).split('.')[1]}"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Traced for evaluation: attention's fast path is not part of training.
        traced = torch.jit.trace(model.train(), (xs[0],), check_trace=False)
        traced.save(str(folder / "model.pt"))
        adapted = copy.deepcopy(model)
        if base != "dense":
            for layer in adapted.modules():
                if isinstance(layer, (nn.Linear, Conv1D)):
                    layer.weight.data = quantised(layer.weight.data, base).to(dtype)
        settings = copy.deepcopy(settings)
        kind = settings.pop("kind", LoraConfig)
        peft_model = get_peft_model(adapted, kind(**settings))
        repair(peft_model)
        if not case.startswith("init"):
            randomise(peft_model, seed=1)
        peft_model.save_pretrained(folder / "adapter", save_embedding_layers=False)

    record = {}
    for step, x in enumerate(xs):
        with torch.no_grad():
            record |= snapshot(f"{step}.", {"eval": peft_model.eval()(x)})
        peft_model.train()
        torch.manual_seed(100 + step)
        if x.is_floating_point():
            x = x.clone().requires_grad_()
        output = peft_model(x)
        if labels[step] is None:
            labels[step] = torch.randn(output.shape).to(output.dtype)
        loss = F.mse_loss(output.float(), labels[step].float())
        loss.backward()
        record |= {f"{step}.x": x.detach(), f"{step}.label": labels[step]}
        record |= snapshot(f"{step}.", {"output": output, "loss": loss})
        if x.is_floating_point():
            record |= snapshot(f"{step}.", {"x_grad": x.grad})
        parameters = adapters(peft_model)
        for p in parameters.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        record |= snapshot(f"{step}.grad.", {key(name): p.grad for name, p in parameters.items()})
        with torch.no_grad():
            for p in parameters.values():
                p -= LR * p.grad
                p.grad = None
    with torch.no_grad():
        record |= snapshot("", {"trained": peft_model.eval()(xs[0])})
    peft_model.save_pretrained(folder / "trained", save_embedding_layers=False)
    if kind is not LoraConfig:
        peft_model.merge_adapter()
        with torch.no_grad():
            record |= snapshot("", {"merged": peft_model(xs[0])})
    save_file({name: t.contiguous() for name, t in record.items()}, folder / "record.safetensors")
    return {"name": folder.name, "base": base, "dtype": str(dtype).split(".")[1], "groups": groups}


def main(out: Path) -> None:
    torch.set_num_threads(2)
    cases = [make(case, base, dtype, out) for case in CASES for base, dtype in VARIANTS if runs(case, base, dtype)]
    (out / "cases.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
