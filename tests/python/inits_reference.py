"""PEFT's side of inits.rs.

inits_reference.py make DIR     writes, for each initialisation from data, DIR/<case>/adapter/ and
                                DIR/<case>/record.safetensors, and DIR/model.pt and DIR/data.safetensors
inits_reference.py check DIR    loads what Rust wrote there, and compares outputs
"""

import copy
import dataclasses
import sys
import types
import warnings
from pathlib import Path

# PEFT takes `dataclass` from a package that it doesn't require.
sys.modules.setdefault("attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))

import torch
import torch.nn.functional as F
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file, save_file
from torch import nn

BATCHES = 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 48)
        self.mid = nn.Linear(48, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.mid(torch.tanh(self.up(x)))))


LORA = dict(r=4, lora_alpha=8, target_modules=["up", "mid"])
EVA = LORA | dict(init_lora_weights="eva")
CORDA = LORA | dict(init_lora_weights="corda")
GA = LORA | dict(init_lora_weights="lora_ga")
CASES = {
    "eva": EVA | dict(eva_config=EvaConfig(), rank_pattern={"up": 6}),
    "eva_whiten": EVA | dict(eva_config=EvaConfig(rho=1.5, whiten=True, adjust_scaling_factors=False)),
    "corda_ipm": CORDA | dict(corda_config=CordaConfig()),
    "corda_kpm": CORDA | dict(corda_config=CordaConfig(corda_method="kpm")),
    "lora_ga_stable": GA | dict(lora_ga_config=LoraGAConfig()),
    "lora_ga_unit": GA | dict(lora_ga_config=LoraGAConfig(direction="ArBr", scale="unit")),
    "lora_ga_gd_scale": GA | dict(lora_ga_config=LoraGAConfig(direction="A2rBr", scale="gd_scale")),
    "lora_ga_weight_svd": GA | dict(lora_ga_config=LoraGAConfig(scale="weight_svd")),
}


def data() -> dict[str, torch.Tensor]:
    """Inputs with directions that differ in weight, so that they can be told apart."""
    torch.manual_seed(1)
    turn = torch.linalg.qr(torch.randn(64, 64))[0]
    tensors = {}
    for i in range(BATCHES):
        tensors[f"x{i}"] = (torch.randn(192, 64) * 0.8 ** torch.arange(64.0) * 3) @ turn
        tensors[f"label{i}"] = torch.randn(192, 5)
    return tensors


def adapted(name: str, model: nn.Module, batches: dict[str, torch.Tensor]):
    config = LoraConfig(**copy.deepcopy(CASES[name]))
    xs = [batches[f"x{i}"] for i in range(BATCHES)]
    if name.startswith("eva"):
        peft_model = get_peft_model(model, config)
        initialize_lora_eva_weights(
            peft_model, dataloader=xs, forward_fn=lambda module, x: module(x), prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None, show_progress_bar=False,
        )  # fmt: skip
        return peft_model
    if name.startswith("corda"):
        preprocess_corda(model, config, run_model=lambda: [model(x) for x in xs])
    else:
        def train_step():
            for i, x in enumerate(xs):
                F.mse_loss(model(x), batches[f"label{i}"]).backward()

        preprocess_loraga(model, config, train_step)
    return get_peft_model(model, config)


def make(out: Path) -> None:
    torch.manual_seed(0)
    model, batches = Net(), data()
    torch.jit.trace(model, (batches["x0"],)).save(str(out / "model.pt"))
    save_file(batches, out / "data.safetensors")
    save_file(model.state_dict(), out / "base.safetensors")
    for name in CASES:
        peft_model = adapted(name, copy.deepcopy(model), batches)
        peft_model.save_pretrained(out / name / "adapter")
        weights = {
            path: module.get_base_layer().weight.detach().contiguous()
            for path, module in peft_model.base_model.model.named_modules() if hasattr(module, "lora_A")
        }
        with torch.no_grad():
            weights["output"] = peft_model.eval()(batches["x0"])
        save_file(weights, out / name / "record.safetensors")


def check(out: Path) -> None:
    base, batches = load_file(out / "base.safetensors"), load_file(out / "data.safetensors")
    found = 0
    for folder in sorted(out.glob("*/ours")):
        model = Net()
        model.load_state_dict(base)
        peft_model = PeftModel.from_pretrained(model, folder).eval()
        expected = load_file(folder.parent / "trained.safetensors")["output"]
        with torch.no_grad():
            error = (peft_model(batches["x0"]) - expected).norm() / expected.norm()
        assert error < 1e-5, f"{folder}: {error}"
        found += 1
    assert found >= 6, found
    check_qalora(load_file(out / "qalora.safetensors"))


def check_qalora(rust: dict[str, torch.Tensor]) -> None:
    """PEFT has this variant on GPTQ layers only, but its forward pass needs nothing of them."""
    module = nn.Sequential(nn.Linear(128, 24))
    module[0].weight.data, module[0].bias.data = rust["weight"], rust["bias"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], qalora_group_size=16)
    model = get_peft_model(module, config)
    layer = model.base_model.model[0]
    layer.lora_variant["default"] = QALoraLinearVariant()
    layer.lora_variant["default"].init(layer, "default", config=config)
    factors = {"A": layer.lora_A.default.weight, "B": layer.lora_B.default.weight}
    for name, p in factors.items():
        p.data = rust[name]
    x = rust["x"].clone().requires_grad_()
    y = model(x)
    (y * y).mean().backward()
    found = {"y": y, "grad.x": x.grad, **{f"grad.{name}": p.grad for name, p in factors.items()}}
    for name, theirs in found.items():
        error = (rust[name] - theirs).norm() / theirs.norm()
        assert error < 1e-5, f"{name}: {error}"


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
