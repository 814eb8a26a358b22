"""PEFT's side of matrix.rs.

matrix_reference.py make DIR     for each configuration of DIR/cases.json, whose LoraConfig is in DIR/<case>/config,
    DIR/<case>/model.pt              the base as a TorchScript module
    DIR/<case>/start/                the adapter to start from
    DIR/<case>/trained/              the adapter after the steps
    DIR/<case>/record.safetensors    inputs, labels and outputs of every stage
    and DIR/peers.json               what each case's merge came to, and which defects of PEFT were stepped around
matrix_reference.py check DIR    loads every DIR/<case>/ours into PEFT, and writes the errors to DIR/check.json

Where PEFT is known to be wrong, or can't do what the configuration says, its model is made to follow the
formula instead, and the case names the defect.
"""

import copy
import json
import sys
import warnings
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from layers_reference import repair
from matrix_models import CONVS, Net, inputs, on_bitsandbytes, spread, values
from mirror import adapters, snapshot
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

STEPS = 3
# Initialisations of which A and B start at something, and that are taken out of the weight.
RESIDUAL = ("pissa", "olora", "loftq")


class Case:
    """A configuration with the base that goes with it."""

    def __init__(self, out: Path, fields: dict):
        self.__dict__ |= fields
        self.folder = out / self.name
        self.config = json.loads((self.folder / "config/adapter_config.json").read_text())
        self.init = self.config["init_lora_weights"]
        self.residual = isinstance(self.init, str) and self.init.startswith(RESIDUAL)
        self.dora = self.config["use_dora"]
        self.autocast = self.dtype_name != "bf16_adapters"
        self.dtype = torch.float32 if self.dtype_name == "f32" else torch.bfloat16
        # PEFT's loftq wants a GPU and ignores the scale, its olora fails on a Conv1D, and none packs what is left.
        self.by_formula = self.residual and (
            self.init == "loftq" or self.base != "dense" or (self.init == "olora" and self.layer == "hf_conv1d")
        )
        self.defects = []
        # PEFT's DoRA of a convolution computes with inputs of f32 and weights of bf16, which fails.
        self.wide = self.dora and self.layer in CONVS and self.dtype != torch.float32
        if self.wide:
            self.defects.append("DoRA of a bf16 convolution fails: computed in f32 from the bf16 weights")
        if self.by_formula:
            self.defects.append(f"{self.init} of {self.layer} on {self.base}: started by its formula")
        if self.layer in ("conv2d_dilation", "conv2d_reflect", "conv2d_circular"):
            self.defects.append("a convolution's A lacks dilation and padding mode: given them")
        self.on_bnb = self.base == "nf4_bnb"

    def built(self):
        """The base, dense and packed, and PEFT's model over it.

        What an initialisation leaves of a weight is packed again: a value that lies on the border of two codes
        would make a test of f32 one of luck. Then the next base is taken.
        """
        for _ in range(20):
            self.stable = True
            dense = self.dense()
            packed = self.packed(dense)
            peft_model = self.adapted(copy.deepcopy(packed))
            if self.stable:
                return dense, packed, peft_model
            self.seed += 1000
        raise RuntimeError("no base of which all that is left lies off the borders of codes")

    def dense(self) -> Net:
        torch.manual_seed(self.seed)
        model = Net(self.layer).to(self.dtype)
        if isinstance(self.init, str) and "niter" in self.init:
            for layer in [block.layer for block in model.h] + [model.head]:
                spread(layer.weight)
        return model

    def packed(self, model: Net) -> Net:
        """The model with the values that packing leaves of its blocks' weights."""
        model = copy.deepcopy(model)
        for block in model.h:
            if self.on_bnb:
                block.layer = on_bitsandbytes(block.layer)
            else:
                block.layer.weight.data = values(block.layer.weight.data, self.base)
        model.is_loaded_in_4bit = self.on_bnb
        return model.float() if self.wide else model

    def adapted(self, model: Net):
        """PEFT's model over that of `packed`, before anything is trained."""
        # PEFT can't even read a configuration of loftq without scipy.
        known = {key for key in LoraConfig.__dataclass_fields__ if key not in ("peft_type", "init_lora_weights")}
        config = LoraConfig(**{key: value for key, value in self.config.items() if key in known})
        config.init_lora_weights = True if self.by_formula else self.init
        peft_model = self.repaired(get_peft_model(model, config, autocast_adapter_dtype=self.autocast))
        if self.by_formula:
            for name, module in lora_layers(peft_model):
                self.start_by_formula(module, "dense" if name.endswith("head") else self.base)
        elif not self.residual and self.init not in (False, "orthogonal"):
            randomise(peft_model)
        return peft_model

    def loaded(self, folder: Path):
        """PEFT's model with an adapter from a folder."""
        if self.by_formula:
            _, _, peft_model = self.built()
            found = set_peft_model_state_dict(peft_model, load_file(folder / "adapter_model.safetensors"))
            assert not found.unexpected_keys, found.unexpected_keys
            return peft_model
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            model = self.packed(self.dense())
            return self.repaired(PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=self.autocast))

    def repaired(self, peft_model):
        repair(peft_model)
        repair_dora(peft_model)
        return peft_model

    def start_by_formula(self, module, base: str) -> None:
        layer, r, s = module.get_base_layer(), module.r["default"], module.scaling["default"]
        turn = (lambda w: w.T) if self.layer == "hf_conv1d" else (lambda w: w)
        w = turn(layer.weight.data).float()
        if self.init == "loftq":
            kept = turn(values(layer.weight.data, "nf4")).float()
            a, b = principal(w - kept, r, s)
        else:
            if self.init == "olora":
                q, rest = torch.linalg.qr(w)
                a, b = rest[:r], q[:, :r]
            else:
                a, b = principal(w, r, s)
            a, b = (factor.to(module.lora_A["default"].weight.dtype).float() for factor in (a, b))
            rest = turn(w - s * b @ a).to(layer.weight.dtype).contiguous()
            kept = values(rest, base)
            for _ in range(8):
                noise = (torch.rand_like(rest) - 0.5) * 4e-6 * rest.abs().max()
                self.stable &= self.dtype_name != "f32" or relative(values(rest + noise, base), kept) < 1e-5
            kept = turn(kept).float()
        layer.weight.data = turn(kept).to(layer.weight.dtype).contiguous()
        own = module.lora_A["default"].weight.dtype
        module.lora_A["default"].weight.data = a.contiguous().to(own)
        module.lora_B["default"].weight.data = b.contiguous().to(own)
        if self.dora:
            magnitude = module.lora_magnitude_vector["default"]
            whole = turn(layer.weight.data).float() + s * b @ a
            magnitude.weight.data = whole.norm(dim=1).to(magnitude.weight.dtype)

    def save(self, peft_model, folder: Path) -> None:
        peft_model.save_pretrained(folder, save_embedding_layers=False)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": self.init}, indent=2))

    def optimizer(self, parameters):
        if self.training == "sgd":
            return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9)
        return torch.optim.AdamW(parameters, lr=self.lr, eps=self.eps, fused=True)


def principal(w: torch.Tensor, r: int, s: float):
    u, singular, vh = torch.linalg.svd(w, full_matrices=False)
    root = (singular[:r] / s).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


def lora_layers(model) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def repair_dora(model) -> None:
    """With live dropout, DoRA's own convolution of the dropped x pads with zeros whatever the mode is."""
    for _, module in lora_layers(model):
        base = module.get_base_layer()
        if isinstance(base, nn.modules.conv._ConvNd) and module.lora_magnitude_vector:
            conv = lambda x, w, base=base, **_: base._conv_forward(x, w, None)  # noqa: E731
            module.lora_magnitude_vector["default"].conv_fn = conv


def randomise(model) -> None:
    """Both factors random, since a new adapter does nothing; copies of the base a little off it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(adapters(model).items()):
            noise = torch.randn(p.shape, generator=generator) * 0.2
            p.copy_(noise if "lora_" in name and "magnitude" not in name else p * (1 + noise))


def call(model, case: Case, x: torch.Tensor) -> torch.Tensor:
    # An evaluation would have bitsandbytes repack the weights for bf16.
    model.train(case.on_bnb)
    with torch.no_grad():
        return answer(model, case, x)


def answer(model, case: Case, x: torch.Tensor) -> torch.Tensor:
    return model(x.float() if case.wide and x.is_floating_point() else x).to(case.dtype)


def make(case: Case) -> dict:
    dense, packed, peft_model = case.built()
    torch.manual_seed(case.seed + 1)
    xs = [inputs(case.layer) for _ in range(STEPS)]
    xs = [x.to(case.dtype) if x.is_floating_point() else x for x in xs]
    traced = torch.jit.trace(dense.train(), (xs[0],), check_trace=False)
    traced.save(str(case.folder / "model.pt"))
    record = {"base": call(packed, case, xs[0])}
    case.save(peft_model, case.folder / "start")

    record["loaded"] = call(peft_model, case, xs[0])
    parameters = list(adapters(peft_model).values())
    optimizer = case.optimizer(parameters)
    peft_model.train()
    for step, x in enumerate(xs):
        torch.manual_seed(100 + step)
        output = answer(peft_model, case, x)
        label = torch.randn(output.shape, generator=torch.Generator().manual_seed(step))
        F.mse_loss(output.float(), label).backward()
        record |= {f"{step}.x": x, f"{step}.label": label, f"{step}.output": output}
        optimizer.step()
        optimizer.zero_grad()
    record["trained"] = call(peft_model, case, xs[0])
    case.save(peft_model, case.folder / "trained")
    merge = merged(peft_model, case, xs[0], record)
    save_file(snapshot("", record), case.folder / "record.safetensors")
    return {"merge": merge, "defects": case.defects, "bitsandbytes": case.on_bnb}


def merged(model, case: Case, x: torch.Tensor, record: dict) -> str:
    """`same`, `refused`, or `wrong` where only the formula can be compared with."""
    if case.on_bnb and case.config["lora_bias"] and case.layer == "linear_no_bias":
        return "refused"
    if case.on_bnb:
        case.defects.append("a merge into 4 bits packs again, which loses most of a small change")
        return "wrong"
    once = copy.deepcopy(model).float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        model.merge_adapter()
        once.merge_adapter()
        once.to(case.dtype)
    except (NotImplementedError, RuntimeError) as error:
        if case.layer == "conv3d_pointwise":
            case.defects.append("a Conv3d of kernel 1 can't be merged")
            return "wrong"
        assert "groups" in str(error) or "has no bias" in str(error), error
        return "refused"
    record["merged"] = call(model, case, x)
    if case.dtype_name == "bf16_adapters" and not case.wide:
        case.defects.append("a merge of bf16 factors rounds their product to bf16, and the sum again: rounded once")
        record["merged"] = call(once, case, x)
    model.unmerge_adapter()
    if case.dtype != torch.float32 and any(not torch.equal(before[k], v) for k, v in model.state_dict().items()):
        case.defects.append("unmerging from bf16 leaves what the sums rounded away: given the weights of before")
        model.load_state_dict(before)
    record["unmerged"] = call(model, case, x)
    return "same"


def check(case: Case) -> dict:
    """Our files in PEFT's model."""
    folder = case.folder / "ours"
    model = case.loaded(folder)
    written = load_file(folder / "adapter_model.safetensors")
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert set(written) == set(wanted), f"keys {set(written) ^ set(wanted)}"
    theirs, ours = (json.loads((case.folder / name / "adapter_config.json").read_text()) for name in ("start", "ours"))
    for key in theirs.keys() - {"inference_mode", "target_modules", "auto_mapping"}:
        assert ours[key] == theirs[key], f"{key} is {ours[key]} instead of {theirs[key]}"
    record = load_file(case.folder / "record.safetensors")
    return {"error": relative(call(model, case, record["0.x"]), record["trained"])}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


def main() -> None:
    # bitsandbytes and the sums of floats both depend on it.
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out = Path(sys.argv[2])
    work, name = {"make": (make, "peers.json"), "check": (check, "check.json")}[sys.argv[1]]
    results = {}
    for fields in json.loads((out / "cases.json").read_text()):
        try:
            results[fields["name"]] = work(Case(out, fields))
        except Exception as error:  # noqa: BLE001
            results[fields["name"]] = {"failed": f"{type(error).__name__}: {error}"}
    (out / name).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
