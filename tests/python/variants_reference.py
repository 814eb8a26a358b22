"""PEFT's side of variants.rs: LoHa and LoKr, by the steps of layers_reference.py.

variants_reference.py steps DIR      writes the records of all cases, see layers_reference.py
variants_reference.py configs DIR    writes configurations as PEFT writes them
variants_reference.py check DIR      reads those that Rust wrote, and compares every field
"""

import json
import sys
from pathlib import Path

import layers_reference as layers
import torch
from layers_reference import Convs, Linears, features, image
from peft import LoHaConfig, LoKrConfig
from peft.tuners.loha import layer as loha
from peft.tuners.lokr import layer as lokr

UP, CONV = dict(target_modules=["up"]), dict(target_modules=["conv"])
LOHA = dict(kind=LoHaConfig, r=4, alpha=64)
LOKR = dict(kind=LoKrConfig, r=4, alpha=16)
DROPOUT = dict(rank_dropout=0.3, module_dropout=0.3)


def conv(dims: int, **settings):
    return lambda: Convs(dims, **settings), image(dims)


LINEAR = (lambda: Linears(), features)
CASES = {
    "loha_linear": (*LINEAR, LOHA | UP),
    "loha_linear_dropout": (*LINEAR, LOHA | UP | DROPOUT),
    "loha_conv1d": (*conv(1), LOHA | CONV),
    "loha_conv1d_effective": (*conv(1, stride=2), LOHA | CONV | dict(use_effective_conv2d=True)),
    "loha_conv2d": (*conv(2, padding=1), LOHA | CONV),
    "loha_conv2d_effective": (*conv(2, dilation=2), LOHA | CONV | dict(use_effective_conv2d=True)),
    "loha_conv2d_pointwise": (*conv(2, kernel_size=1), LOHA | CONV | dict(use_effective_conv2d=True)),
    "loha_conv2d_groups": (*conv(2, groups=2), LOHA | CONV, 2),
    "loha_conv2d_dropout": (*conv(2), LOHA | CONV | DROPOUT),
    "lokr_linear_whole": (*LINEAR, LOKR | UP),
    "lokr_linear": (*LINEAR, LOKR | UP | dict(r=2)),
    "lokr_linear_both": (*LINEAR, LOKR | UP | dict(r=2, decompose_both=True)),
    "lokr_linear_factor": (*LINEAR, LOKR | UP | dict(decompose_factor=4)),
    "lokr_linear_dropout": (*LINEAR, LOKR | UP | DROPOUT),
    "lokr_linear_dropout_scale": (*LINEAR, LOKR | UP | DROPOUT | dict(rank_dropout_scale=True)),
    # PEFT pads the left factor on the wrong side here; its files mean that.
    "lokr_conv1d_whole": (*conv(1), LOKR | CONV),
    "lokr_conv1d": (*conv(1, stride=2), LOKR | CONV | dict(r=1)),
    "lokr_conv1d_effective": (*conv(1), LOKR | CONV | dict(r=1, use_effective_conv2d=True)),
    "lokr_conv2d_whole": (*conv(2, padding=1), LOKR | CONV),
    "lokr_conv2d": (*conv(2, dilation=2), LOKR | CONV | dict(r=1)),
    "lokr_conv2d_effective": (*conv(2, stride=2), LOKR | CONV | dict(r=1, use_effective_conv2d=True)),
    "lokr_conv2d_groups": (*conv(2, groups=2), LOKR | CONV, 2),
}

# Each field at a value other than its default.
ONE = dict(target_modules=["q_proj"])
SHARED = {
    "defaults": ONE,
    "numbers": dict(r=3, alpha=2.5, rank_dropout=0.25, module_dropout=0.5, use_effective_conv2d=True, **ONE),
    "all_linear": dict(target_modules="all-linear", exclude_modules=["h.0.q_proj"]),
    "layers": dict(layers_to_transform=[0, 2], layers_pattern="h", exclude_modules=r"h\.0\..*", **ONE),
    "patterns": dict(rank_pattern={"a": 4, "^b.c": 2}, alpha_pattern={"a": 3, "c": 1.5}, **ONE),
    "others": dict(modules_to_save=["head"], task_type="CAUSAL_LM", base_model_name_or_path="org/model", **ONE),
    "init_false": dict(init_weights=False, **ONE),
}
OF_LOKR = {
    "lycoris": dict(init_weights="lycoris", **ONE),
    "decompose": dict(decompose_both=True, decompose_factor=8, rank_dropout_scale=True, **ONE),
}


def repair() -> None:
    """PEFT's backward pass of a decomposed kernel in LoHa takes the gradients of `hada_w1_a` and `hada_w2_a` with
    the other half's core; torch's own follows the formula. And its LoKr fails on a decomposed kernel of one
    dimension, as torch.kron wants other strides.
    """
    def half(t, a, b):
        return torch.einsum("i j k l, j r, i p -> p r k l", t, b, a)

    loha.make_weight_cp = lambda t1, w1a, w1b, t2, w2a, w2b, scale: half(t1, w1a, w1b) * half(t2, w2a, w2b) * scale
    make_kron = lokr.make_kron
    lokr.make_kron = lambda w1, w2, scale: make_kron(w1, w2.clone(memory_format=torch.contiguous_format), scale)


def through_layers(*args: str) -> None:
    repair()
    layers.CASES = {name: (*case, 1)[:4] for name, case in CASES.items()}
    sys.argv = [sys.argv[0], *args]
    layers.main()


def steps(out: Path) -> None:
    # All of them.
    through_layers("make", str(out), "")


def load(out: Path) -> None:
    through_layers("check", str(out))


def configs(out: Path) -> None:
    fields = set()
    for name, settings in SHARED.items():
        fields |= settings.keys()
        LoHaConfig(**settings).save_pretrained(out / f"loha_{name}")
    for name, settings in (SHARED | OF_LOKR).items():
        fields |= settings.keys()
        LoKrConfig(**settings).save_pretrained(out / f"lokr_{name}")
    written = json.loads((out / "lokr_defaults/adapter_config.json").read_text()).keys()
    untested = written - fields - {"peft_type", "peft_version", "auto_mapping", "inference_mode", "revision"}
    assert not untested, f"fields without a case: {untested}"


def check(out: Path) -> None:
    shared = dict(
        r=3, alpha=2.5, rank_dropout=0.25, module_dropout=0.5, use_effective_conv2d=True, target_modules=["q", "v"],
        exclude_modules=r"h\.0\..*", layers_to_transform=[1, 2], layers_pattern="h", rank_pattern={"a": 4, "b": 2},
        alpha_pattern={"a": 3}, modules_to_save=["head"], task_type="CAUSAL_LM", base_model_name_or_path="org/model",
    )  # fmt: skip
    lokr = dict(init_weights="lycoris", decompose_both=True, decompose_factor=8, rank_dropout_scale=True)
    for name, wanted in {
        "loha": LoHaConfig(init_weights=False, **shared),
        "lokr": LoKrConfig(**lokr, **shared),
    }.items():
        found = type(wanted).from_pretrained(out / name)
        ours, theirs = (json.dumps(c.to_dict(), sort_keys=True, default=sorted) for c in (found, wanted))
        assert ours == theirs, f"{name}:\n{ours}\n{theirs}"


if __name__ == "__main__":
    {"steps": steps, "load": load, "configs": configs, "check": check}[sys.argv[1]](Path(sys.argv[2]))
