"""PEFT's side of torchscript_models.rs: tiny models of `transformers` and `diffusers`.

models_reference.py make DIR     for each model and run,
    DIR/<model>/                         the export (python/export.py)
    DIR/<run>/start/, DIR/<run>/trained/ the adapter before and after training
    DIR/<run>/record.safetensors         inputs, outputs and gradients of the first six iterations
    and DIR/runs.json
models_reference.py check DIR    loads every DIR/<run>/ours into PEFT, and into diffusers where it is of a diffusers
                                 model, and compares outputs
models_reference.py dtypes DIR   exports every tiny model into DIR/<model>; DIR/<model>/answers.safetensors has what the
                                 model answers in each dtype, DIR/bound a model that can't leave its dtype
models_reference.py folders DIR  saves models with their libraries, and exports each by the command line of
                                 python/export.py into DIR/<model>
"""

import copy
import dataclasses
import json
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from layers_reference import quantised
from mirror import adapters, export, portable, randomise, snapshot
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

SIZES = [(2, 8), (2, 8), (3, 5), (1, 8), (2, 8), (2, 8)]

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
JOINT = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
# Each with linear layers, and embeddings, convolutions or full copies where the model has them.
MODELS = {
    "llama-tiny": dict(target_modules=LLAMA, modules_to_save=["lm_head"]),
    "gpt2-tiny": dict(target_modules=["c_attn", "c_proj", "c_fc", "wte"], fan_in_fan_out=True),
    "vit-tiny": dict(target_modules=["q_proj", "v_proj", "projection"], modules_to_save=["classifier"]),
    "t5-tiny": dict(target_modules=["q", "k", "v", "o", "wi_0", "wi_1", "wo"]),
    "unet-tiny": dict(target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv_in", "conv1", "conv2", "proj_in"]),
    "sd3-tiny": dict(target_modules=[*JOINT, "pos_embed.proj"]),
}
# Output layers, which stay dense: tied to an embedding, or copied.
DENSE = ("lm_head", "classifier")
# In bf16 the steps would pass roundings on from one to the next: each iteration starts anew.
LR = {"dense": 0.05, "nf4": 0.05, "bf16": 0.0}


def base(model: nn.Module, kind: str) -> tuple[nn.Module, list[str]]:
    """A copy with the values that packing leaves of linear weights, and the names of those."""
    model, packed = copy.deepcopy(model), []
    for name, module in model.named_modules():
        if kind == "nf4" and isinstance(module, (nn.Linear, Conv1D)) and not name.endswith(DENSE):
            module.weight.data = quantised(module.weight.data, kind)
            packed.append(f"{name}.weight")
    return model, sorted(packed)


def key(name: str) -> str:
    return name.replace(".modules_to_save.", ".").removesuffix(".default")


def record(made: export.Export, name: str, kind: str, out: Path) -> dict:
    folder, lr = out / f"{name}-{kind}-run", LR[kind]
    model, packed = base(made.module, kind)
    config = LoraConfig(r=4, lora_alpha=8, **MODELS[name])
    peft_model = get_peft_model(model, config)
    randomise(peft_model, seed=1)
    peft_model.save_pretrained(folder / "start", save_embedding_layers=False)
    torch.manual_seed(5)
    inputs = [made.inputs(*size) for size in SIZES]
    kept = {}
    with torch.no_grad():
        with peft_model.disable_adapter():
            kept["base"] = peft_model.eval()(*inputs[0].values())
        kept["loaded"] = peft_model.eval()(*inputs[0].values())
    exact = copy.deepcopy(peft_model).float().train() if kind == "bf16" else None
    peft_model.train()
    for step, given in enumerate(inputs):
        output, label = iterate(peft_model, given, step)
        parameters = {key(n): p for n, p in adapters(peft_model).items()}
        kept |= snapshot(f"{step}.in.", given) | {f"{step}.output": output.detach(), f"{step}.label": label}
        kept |= snapshot(f"{step}.grad.", {n: p.grad for n, p in parameters.items()})
        if exact is not None:
            # The same without rounding to bf16.
            iterate(exact, {n: t.float() if t.is_floating_point() else t for n, t in given.items()}, step)
            for n, p in adapters(exact).items():
                kept[f"{step}.exact.{key(n)}"], p.grad = p.grad, None
        with torch.no_grad():
            for p in parameters.values():
                p -= lr * p.grad
                p.grad = None
    with torch.no_grad():
        kept["trained"] = peft_model.eval()(*inputs[0].values())
    peft_model.save_pretrained(folder / "trained", save_embedding_layers=False)
    save_file(snapshot("", kept), folder / "record.safetensors")
    facts = dict(model=name, kind=kind, packed=packed, inputs=list(inputs[0]), diffusers="diffusers" in made.library)
    return {"name": folder.name, "lr": lr} | facts


def iterate(model: nn.Module, given: dict, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and label; dropout of the model is live."""
    torch.manual_seed(70 + step)
    output = model(*given.values())
    label = torch.randn(output.shape, generator=torch.Generator().manual_seed(step))
    F.mse_loss(output.float(), label).backward()
    return output, label


def make(out: Path) -> None:
    runs = []
    for name in MODELS:
        made = export.export(name, out / name)
        for kind in ("dense", "nf4", "bf16"):
            if kind == "bf16":
                made.module.bfloat16()
            runs.append(record(made, name, kind, out))
    (out / "runs.json").write_text(json.dumps(runs))


class Bound(nn.Module):
    """Another function in bf16 than otherwise: no trace is both."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * (2 if x.dtype == torch.bfloat16 else 3)


def dtypes(out: Path) -> None:
    for name in export.MODELS:
        made, kept = export.export(name, out / name), {}
        assert json.loads((out / name / "export.json").read_text())["portable"], name
        on_another_device(made, torch.jit.load(out / name / "model.pt"), name)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            # Anew: what was lost in one dtype is missing in the next.
            given = dataclasses.replace(made, module=export.build(name).module.to(dtype).eval())
            inputs = given.inputs(3, 5)
            with torch.no_grad():
                output = given.module(*inputs.values())
            kept |= snapshot(f"{dtype}.in.", inputs) | {f"{dtype}.output": output}
        save_file(snapshot("", kept), out / name / "answers.safetensors")
    bound = export.Export(Bound(), "trace", [export.Input("x", "normal", ("batch", 4))], {})
    export.export(bound, out / "bound")
    assert not json.loads((out / "bound" / "export.json").read_text())["portable"]


def on_another_device(made: export.Export, scripted: torch.jit.ScriptModule, name: str) -> None:
    """The module on torch's device without data, which refuses tensors of the CPU; it has no convolutions."""
    graph = scripted.inlined_graph
    nodes = list(portable.every_node(graph))
    devices = [node for node in nodes if "Device" in str(node) and node.kind() == "prim::Constant"]
    assert not devices, f"{name}: {devices}"
    if any(node.kind() == "aten::_convolution" for node in nodes):
        return
    for module in scripted.modules():
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            module._c.setattr(key, tensor.detach().to("meta"))
    output = scripted(*[tensor.to("meta") for tensor in made.inputs(3, 5).values()])
    assert output.device.type == "meta", name


def check(out: Path) -> None:
    for run in json.loads((out / "runs.json").read_text()):
        made = export.build(run["model"])
        kept, folder = load_file(out / run["name"] / "record.safetensors"), out / run["name"] / "ours"
        dtype, tolerance = (torch.bfloat16, 2e-2) if run["kind"] == "bf16" else (torch.float32, 1e-5)
        model, _ = base(made.module.to(dtype), run["kind"])
        inputs = [kept[f"0.in.{name}"] for name in run["inputs"]]
        loaded = {"PEFT": PeftModel.from_pretrained(copy.deepcopy(model), folder)}
        if run["diffusers"]:
            loaded["diffusers"] = in_diffusers(model, folder)
        for where, adapted in loaded.items():
            with torch.no_grad():
                found, expected = adapted.eval()(*inputs).double(), kept["trained"].double()
            error = ((found - expected).norm() / expected.norm()).item()
            assert error <= tolerance, f"{run['name']}: in {where} it differs by {error:.1e}"
            print(f"{run['name']}: our file in {where} differs by {error:.1e}")


def folders(out: Path) -> None:
    """Exports of folders that `save_pretrained` wrote."""
    for name in MODELS:
        made = export.build(name, seed=3)
        library = made.library == "diffusers"
        folder = out / "saved" / name
        kind = export.library_class(export.TINY[name][0])
        # The class as the library has it.
        made.module.__class__ = kind
        made.module.save_pretrained(folder)
        # Models of diffusers don't tell their inputs.
        given = [f"--input={spec}" for spec in export.TINY[name][2]] if library else []
        sys.argv = ["export.py", f"--from={folder}", f"--out={out / name}", *given, "--free=batch"]
        export.main()
        written = torch.jit.load(out / name / "model.pt").state_dict()
        saved = made.module.state_dict()
        assert all(torch.equal(written[key], value) for key, value in saved.items()), f"{name}: other weights"
    sys.argv = ["export.py", "--model=vit-tiny", f"--out={out / 'refused'}", "--free=length"]
    try:
        export.main()
    except SystemExit as refused:
        assert "length" in str(refused), refused
    else:
        raise AssertionError("a length that isn't free was not refused")


def in_diffusers(model: nn.Module, folder: Path) -> nn.Module:
    """Loaded by diffusers itself."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    metadata = {key: config[key] for key in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")}
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    model.load_lora_adapter(state, prefix=None, metadata=metadata)
    assert getattr(model, "peft_config", None), "diffusers loaded nothing"
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    {"make": make, "check": check, "dtypes": dtypes, "folders": folders}[sys.argv[1]](Path(sys.argv[2]))
