"""PEFT's side of layers.rs, parameters.rs and attention.rs: every kind of layer that a weight may belong to.

layers_reference.py make DIR PREFIX…    writes, for each case whose name starts so,
    DIR/<case>/model.pt              the base as a TorchScript module
    DIR/<case>/adapter/              the adapter to start from, all of its tensors random
    DIR/<case>/record.safetensors    outputs, gradients and values over a few steps
and DIR/cases.json, which lists the cases.

layers_reference.py check DIR    loads DIR/<case>/ours, written by the test, and compares outputs.

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
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import MultiheadAttention
from quant_reference import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file
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


class Experts(nn.Module):
    """Parameters of three dimensions, used as the name says; every token goes to every expert, by weight."""

    def __init__(self, form: str):
        super().__init__()
        self.form = form
        self.is_transposed = form in ("bmm", "matmul", "transposed")
        up, down = (16, 64), (64, 8)
        if self.is_transposed:
            up, down = up[::-1], down[::-1]
        self.gate_up = nn.Parameter(torch.randn(3, *up) * 0.2)
        self.bias = nn.Parameter(torch.randn(3, 16) * 0.1)
        self.down = nn.Parameter(torch.randn(3, *down) * 0.2)
        self.router = nn.Linear(64, 3)

        if form == "index":
            # A trace would keep a tensor made on the way where it was made.
            self.register_buffer("chosen", torch.tensor([2, 0, 1, 2]), persistent=False)

    def forward(self, x):
        shares = self.router(x).softmax(-1)
        rows = x.flatten(0, 1)

        def mix(hidden, out):
            gate, up = hidden.chunk(2, -1)
            return out(torch.tanh(gate) * up)

        if self.form == "bmm":
            hidden = torch.bmm(rows.expand(3, -1, -1), self.gate_up) + self.bias[:, None]
            y = mix(hidden, lambda h: torch.bmm(h, self.down))
        elif self.form == "matmul":
            hidden = torch.matmul(rows.expand(3, -1, -1), self.gate_up)
            y = mix(hidden, lambda h: h @ self.down)
        elif self.form == "bmm of transposes":
            hidden = torch.bmm(rows.expand(3, -1, -1), self.gate_up.transpose(1, 2))
            y = mix(hidden, lambda h: torch.bmm(h, self.down.mT))
        elif self.form == "einsum":
            hidden = torch.einsum("ni,eoi->eno", rows, self.gate_up)
            y = mix(hidden, lambda h: torch.einsum("eni,eoi->eno", h, self.down))
        elif self.form == "index":
            hidden = torch.bmm(rows.expand(4, -1, -1), self.gate_up.index_select(0, self.chosen).transpose(1, 2))
            y = mix(hidden, lambda h: torch.bmm(h, self.down[self.chosen].transpose(1, 2)))[1:].roll(1, 0)
        elif self.form == "transposed":
            y = torch.stack([mix(rows @ self.gate_up[e], lambda h: h.matmul(self.down[e])) for e in range(3)])
        else:
            y = torch.stack([
                mix(F.linear(rows, self.gate_up[e], self.bias[e]), lambda h: F.linear(h, self.down[e]))
                for e in range(3)
            ])  # fmt: skip
        return torch.einsum("eno,ne->no", y, shares.flatten(0, 1)).view(*x.shape[:-1], -1)


class Moe(nn.Module):
    def __init__(self, form: str):
        super().__init__()
        self.up = nn.Linear(64, 64)
        self.experts = Experts(form)

    def forward(self, x):
        return self.experts(torch.tanh(self.up(x)))


class Pair(nn.Module):
    """Parameters of two dimensions, used each way."""

    def __init__(self):
        super().__init__()
        self.turned = nn.Parameter(torch.randn(48, 24) * 0.2)
        self.plain = nn.Parameter(torch.randn(8, 24) * 0.2)

    def forward(self, x):
        return F.linear(x @ self.turned, self.plain)


class Matrices(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 48)
        self.inner = Pair()

    def forward(self, x):
        return self.inner(torch.tanh(self.up(x)))


class Attention(nn.Module):
    """Queries, keys and values of as many tensors as `inputs` says."""

    def __init__(self, inputs: int, need_weights: bool = False, **settings):
        super().__init__()
        self.inputs, self.need_weights = inputs, need_weights
        self.mha = nn.MultiheadAttention(64, 4, batch_first=True, **settings)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        keys = x if self.inputs == 1 else x.flip(1)
        values = x.roll(1, 1) if self.inputs == 3 else keys
        return self.head(self.mha(x, keys, values, need_weights=self.need_weights)[0])


def image(dims: int):
    return lambda: torch.randn(2, 4, *(9, 8, 7)[:dims])


def ids():
    return torch.randint(0, 17, (3, 6))


def features():
    return torch.randn(2, 7, 64)


CONV = dict(target_modules=["conv"], r=4, lora_alpha=8)
WORDS = dict(target_modules=["embed"], r=4, lora_alpha=8)
LINEAR = dict(target_modules=["up"], r=4, lora_alpha=8)

# name: (module, inputs, LoraConfig, groups of a convolution)
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

STACKS = dict(target_modules=[], target_parameters=["gate_up", "experts.down"], r=4, lora_alpha=8)
for form in ["linear", "transposed", "bmm", "bmm of transposes", "matmul", "einsum", "index"]:
    CASES[f"parameter_{form.replace(' ', '_')}"] = (lambda form=form: Moe(form), features, STACKS, 1)
CASES |= {
    "parameter_and_modules": (
        lambda: Moe("linear"),
        features,
        STACKS | dict(target_modules=["up", "router"], rank_pattern={"experts.down": 3, "router": 2}, bias="all"),
        1,
    ),
    "parameter_lora_only": (
        lambda: Moe("bmm"), features, STACKS | dict(target_parameters=["gate_up", "up.weight"], bias="lora_only"), 1,
    ),
    "parameter_random_rslora": (
        lambda: Moe("linear"), features, STACKS | dict(init_lora_weights=False, use_rslora=True), 1,
    ),
    "parameter_2d": (
        lambda: Matrices(),
        features,
        dict(target_parameters=["inner.turned", "inner.plain", "up.weight"], r=4, lora_alpha=8),
        1,
    ),
}  # fmt: skip
ATTENTION = dict(target_modules=["mha"], r=4, lora_alpha=8)
CASES |= {
    "attention_of_itself": (lambda: Attention(1), features, ATTENTION, 1),
    "attention_of_itself_with_weights": (lambda: Attention(1, True), features, ATTENTION, 1),
    "attention_of_another": (lambda: Attention(2), features, ATTENTION, 1),
    "attention_of_two_others": (lambda: Attention(3, bias=False), features, ATTENTION, 1),
    # PEFT merges for the time of a pass, in which dropout has no part.
    "attention_dropout": (lambda: Attention(1), features, ATTENTION | dict(lora_dropout=0.3), 1),
    "attention_and_head": (
        lambda: Attention(1, add_bias_kv=True),
        features,
        ATTENTION
        | dict(
            target_modules=["mha", "head"], rank_pattern={"mha": 2}, alpha_pattern={"head": 1}, lora_alpha=2, bias="all"
        ),
        1,
    ),
    "attention_lora_only": (lambda: Attention(2), features, ATTENTION | dict(bias="lora_only"), 1),
}

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


def keep_exactly(attention) -> None:
    inside, output = attention.base_layer, attention.base_layer.out_proj
    output.merge = output.unmerge = lambda *_, **__: None
    weights = [(inside, "in_proj_weight", inside.in_proj_weight), (output.base_layer, "weight", output.weight)]

    def unmerge() -> None:
        attention.merged_adapters.clear()
        for module, name, weight in weights:
            delattr(module, name)
            module.register_parameter(name, weight)

    attention.unmerge = unmerge


def repair(model) -> None:
    """PEFT copies stride and padding to a convolution's A, but neither dilation nor padding mode.

    It adds the delta of an attention's out_proj twice: by itself, and by the layer's own merge after that. And it
    merges and unmerges an attention in each pass, by which a weight of bf16 drifts.
    """
    for module in model.modules():
        if isinstance(module, MultiheadAttention):
            keep_exactly(module)
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
    # The gradients of a bias cancel almost: bf16 leaves nothing of them.
    if case in ("parameter_and_modules", "parameter_lora_only"):
        return dtype == torch.float32
    return not (case.startswith("dora_conv") and dtype == torch.bfloat16)


def based(model, base: str, dtype: torch.dtype):
    """A copy of the module whose linear layers have the values that a scheme keeps."""
    adapted = copy.deepcopy(model)
    if base != "dense":
        for layer in adapted.modules():
            if isinstance(layer, (nn.Linear, Conv1D)):
                layer.weight.data = quantised(layer.weight.data, base).to(dtype)
    return adapted


def build(case: str, dtype: torch.dtype):
    torch.manual_seed(sum(map(ord, case)))
    return CASES[case][0]().to(dtype)


def check(found: dict, out: Path) -> None:
    folder, dtype = out / found["name"], getattr(torch, found["dtype"])
    record = load_file(folder / "record.safetensors")
    model = PeftModel.from_pretrained(based(build(found["case"], dtype), found["base"], dtype), folder / "ours")
    repair(model)
    with torch.no_grad():
        output, expected = model.eval()(record["0.x"]).float(), record["trained"].float()
    error = float((output - expected).norm() / expected.norm())
    assert error <= (2e-2 if dtype == torch.bfloat16 else 1e-5), f"{found['name']}: {error}"


def make(case: str, base: str, dtype: torch.dtype, out: Path) -> dict:
    _, inputs, settings, groups = CASES[case]
    model = build(case, dtype)
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
        settings = copy.deepcopy(settings)
        kind = settings.pop("kind", LoraConfig)
        peft_model = get_peft_model(based(model, base, dtype), kind(**settings))
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
    if case.startswith(("parameter", "attention")) or (kind is not LoraConfig and dtype == torch.float32):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record |= snapshot("", {"merged": peft_model.merge_and_unload()(xs[0])})
    save_file({name: t.contiguous() for name, t in record.items()}, folder / "record.safetensors")
    is_transposed = any(getattr(module, "is_transposed", False) for module in model.modules())
    return {
        "name": folder.name, "case": case, "base": base, "dtype": str(dtype).split(".")[1], "groups": groups,
        "is_transposed": is_transposed,
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(2)
    out = Path(sys.argv[2])
    if sys.argv[1] == "check":
        for found in json.loads((out / "cases.json").read_text()):
            check(found, out)
        return
    chosen = [case for case in CASES if case.startswith(tuple(sys.argv[3:]))]
    cases = [make(case, base, dtype, out) for case in chosen for base, dtype in VARIANTS if runs(case, base, dtype)]
    (out / "cases.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    main()
