#!/usr/bin/env python3
"""Exports a model of `transformers` or `diffusers`, or any other PyTorch model, to TorchScript, for training.

    python python/export.py --from path/to/folder --out exported/mine
    python python/export.py --from path/to/sd3/transformer --out exported/sd3 --dtype bfloat16 \\
        --input "hidden_states=normal:batch,16,128,128" --input "encoder_hidden_states=normal:batch,length,4096" \\
        --input "pooled_projections=normal:batch,2048" --input "timestep=<1000:batch"
    python python/export.py --from path/to/sd3/vae --out exported/vae --input "sample=normal:batch,3,1024,1024"
    python python/export.py --model gpt2-tiny --seed 7 --set n_layer=4 --out exported/gpt2

`--from` takes a folder with `config.json` and weights, as `save_pretrained` writes it. `--model` takes one of the
tiny models below, with random weights. The folder that is written holds

    model.pt              the TorchScript module: `Base::torchscript("model.pt")`
    example.safetensors   the inputs that were traced, and `output`, what the model answers to them in evaluation
    export.json           model, class, method, settings, seed, versions, inputs in their order, which sizes are free,
                          and the name of every parameter

An input is `NAME=VALUES:SIZES`. VALUES is `normal`, `uniform` (in [0, 1)), `ones`, or `<N` for integers from 0
to N - 1; floats are of the model's dtype. A size is a number, `batch` or `length`. The inputs' order is that in
which the module takes them. For most models of `transformers`, `--from` knows them by itself.

Of a VAE of diffusers, the encoder is exported: images (batch, 3, height, width) from -1 to 1 to latents as the
transformer takes them, the distribution's mean, shifted and scaled as its configuration says.

What makes an export fit for training:

* The parameters keep their names (`model.layers.0.self_attn.q_proj.weight`): adapters are stored under them. So the
  module itself is traced, not a wrapper around it.
* Dropout is live: the module's training mode turns it on and off, as in PyTorch. A plain trace would keep the mode
  that it was traced in.
* `torch.jit.freeze` and `torch.jit.optimize_for_inference` turn parameters into constants: they are left out.
* The module answers one tensor (`logits`, `sample`, …); caches and other outputs are switched off.
* Batch size and length stay free where the model's code allows; `export.json` tells which do, `--free` demands it.
* It runs on any device and in any dtype: `Base::torchscript_to`, or `to(device, dtype)` in Python. A plain trace would
  keep those it was made with (see portable.py); if a model's code doesn't allow for more, a warning says so, and
  `portable` in `export.json` is false. `--dtype` is that of the tensors that are written, `--device` where the model
  runs while it is traced.
"""

import argparse
import contextlib
import copy
import dataclasses
import inspect
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from portable import MARK, portable
from tiny import TINY
from torch import nn


@dataclasses.dataclass
class Input:
    """One input of the module."""

    name: str
    values: str
    sizes: tuple[int | str, ...]

    @classmethod
    def parse(cls, text: str) -> "Input":
        """`NAME=VALUES:SIZES`, see above."""
        name, _, rest = text.partition("=")
        values, _, sizes = rest.partition(":")
        known = values in ("normal", "uniform", "ones") or (values[:1] == "<" and values[1:].isdigit())
        if not (name.isidentifier() and known):
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUES:SIZES")
        parts = [part.strip() for part in sizes.split(",") if part.strip()]
        wrong = [part for part in parts if part not in ("batch", "length") and not part.isdigit()]
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is neither a number nor batch or length")
        return cls(name, values, tuple(int(part) if part.isdigit() else part for part in parts))

    def draw(self, free: dict[str, int], like: torch.Tensor) -> torch.Tensor:
        sizes = [free[size] if isinstance(size, str) else size for size in self.sizes]
        if self.values.startswith("<"):
            return torch.randint(0, int(self.values[1:]), sizes, device=like.device)
        make = {"normal": torch.randn, "uniform": torch.rand, "ones": torch.ones}[self.values]
        return make(sizes).to(like)


@dataclasses.dataclass
class Export:
    """A model on its way out."""

    module: nn.Module
    # "trace" records one run; "script" compiles the source, so control flow survives.
    method: str
    takes: list[Input]
    settings: dict
    # `transformers`, `diffusers`, or none of them.
    library: str = ""

    def inputs(self, batch: int, length: int) -> dict[str, torch.Tensor]:
        """Inputs of a given batch size and length, drawn from the default generator."""
        like = next(p for p in self.module.parameters() if p.is_floating_point())
        return {one.name: one.draw({"batch": batch, "length": length}, like.detach()) for one in self.takes}


# --- Models of a library ---------------------------------------------------------------------------------------------


def positional(module: nn.Module, names: list[str], output: str | None = None) -> nn.Module:
    """The module itself, with a forward pass from these tensors to one tensor."""
    kind = type(module)
    accepted = inspect.signature(kind.forward).parameters
    # A cache would be a second output.
    fixed = {"use_cache": False} if "use_cache" in accepted else {}
    if not hasattr(module.config, "model_type") and "return_dict" in accepted:
        fixed["return_dict"] = False

    def forward(self, *tensors):
        answer = super(traced, self).forward(**dict(zip(names, tensors, strict=True)), **fixed)
        if output is not None:
            return answer[output]
        if isinstance(answer, torch.Tensor):
            return answer
        answers = answer.values() if hasattr(answer, "values") else answer
        return next(value for value in answers if isinstance(value, torch.Tensor))

    traced = type(kind.__name__, (kind,), {"forward": forward})
    module.__class__ = traced
    return module


def encoder(module: nn.Module) -> nn.Module:
    """A VAE of diffusers, with a forward pass from images to the latents that its transformer takes."""
    kind, config = type(module), module.config
    shift, scale = getattr(config, "shift_factor", None) or 0.0, config.scaling_factor

    def forward(self, sample):
        (latents,) = self.encode(sample, return_dict=False)
        # Of a variational one it is a distribution.
        latents = latents if isinstance(latents, torch.Tensor) else latents.mode()
        return (latents - shift) * scale

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    del module.decoder
    return module


def ready(module: nn.Module, takes: list[Input], output: str | None = None) -> nn.Module:
    """A model of a library, for tracing."""
    if type(module).__name__.startswith("Autoencoder"):
        return encoder(module)
    return positional(module, [one.name for one in takes], output)


def library_class(name: str) -> type:
    """`transformers.LlamaForCausalLM` and the like."""
    library, _, kind = name.rpartition(".")
    if library not in ("transformers", "diffusers"):
        raise SystemExit(f"{name}: expected transformers.CLASS or diffusers.CLASS")
    imported = __import__(library)
    # While tracing, transformers warns of a loss that isn't used.
    imported.utils.logging.set_verbosity_error()
    return getattr(imported, kind)


def random_model(name: str, settings: dict) -> nn.Module:
    """A model with random weights."""
    kind = library_class(name)
    if name.startswith("diffusers."):
        return kind(**settings)
    # The attention that shows its dropout; the others may not trace.
    return kind._from_config(kind.config_class(**settings), attn_implementation="eager")


def from_folder(folder: Path, takes: list[Input], output: str | None, dtype: torch.dtype) -> Export:
    """The model in a folder that `save_pretrained` wrote."""
    config = json.loads((folder / "config.json").read_text())
    if "_class_name" in config:
        name = f"diffusers.{config['_class_name']}"
        module = library_class(name).from_pretrained(folder, torch_dtype=dtype)
    else:
        name = f"transformers.{config['architectures'][0]}"
        module = library_class(name).from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    takes = takes or usual_inputs(module, name)
    return Export(ready(module, takes, output), "trace", takes, {}, name.partition(".")[0])


def usual_inputs(module: nn.Module, name: str) -> list[Input]:
    """What a model of `transformers` takes by its configuration."""
    main, config = getattr(module, "main_input_name", None), module.config
    if main == "input_ids":
        names = ["input_ids"] + (["decoder_input_ids"] if config.is_encoder_decoder else [])
        return [Input(one, f"<{config.vocab_size}", ("batch", "length")) for one in names]
    if main == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        size = config.image_size
        return [Input(main, "normal", ("batch", getattr(config, "num_channels", 3), size, size))]
    raise SystemExit(f"{name}: give its inputs, as in --input 'sample=normal:batch,4,64,64'")


# --- Tiny models with random weights, for tests and examples ----------------------------------------------------------


def tiny(name: str, settings: dict) -> Export:
    """One of `TINY`."""
    kind, defaults, specs = TINY[name]
    given, takes = defaults | settings, [Input.parse(spec) for spec in specs]
    module = ready(random_model(kind, given), takes)
    if vocabulary := getattr(module.config, "vocab_size", None):
        takes = [dataclasses.replace(one, values=f"<{vocabulary}") if "_ids" in one.name else one for one in takes]
    return Export(module, "trace", takes, given, kind.partition(".")[0])


def mlp_tiny(settings: dict) -> Export:
    """Linear layers and ReLUs with a residual loop: x (batch, length, width) to (batch, length, classes)."""
    given = {"width": 12, "hidden": 20, "layers": 3, "classes": 5} | settings

    class Block(nn.Module):
        def __init__(self, width: int, hidden: int):
            super().__init__()
            self.up = nn.Linear(width, hidden)
            self.gate = nn.Linear(width, hidden, bias=False)
            self.down = nn.Linear(hidden, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.relu(self.up(x)) * torch.sigmoid(self.gate(x))
            return torch.relu(self.down(h) + x)

    class Mlp(nn.Module):
        def __init__(self, width: int, hidden: int, layers: int, classes: int):
            super().__init__()
            self.blocks = nn.ModuleList([Block(width, hidden) for _ in range(layers)])
            self.head = nn.Linear(width, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    return Export(Mlp(**given), "script", [Input("x", "normal", ("batch", "length", given["width"]))], given)


MODELS: dict[str, Callable[[dict], Export]] = {"mlp-tiny": mlp_tiny} | {
    name: lambda settings, name=name: tiny(name, settings) for name in TINY
}


def build(model: str, seed: int = 0, settings: dict | None = None) -> Export:
    """The model of that name, the same for the same seed; the default generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[model](settings or {})


# --- Tracing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded_dropout(layers: dict[float, nn.Module]):
    """Has calls of `torch.nn.functional.dropout` go to layers, by their rate; asks for one with a `LookupError`."""
    plain, attention = F.dropout, F.scaled_dot_product_attention

    def dropout(x, p=0.5, training=True, inplace=False):
        del training, inplace
        if p == 0:
            return x
        if p not in layers:
            raise LookupError(p)
        return layers[p](x)

    def attend(*args, dropout_p=0.0, **kwargs):
        if dropout_p > 0:
            raise SystemExit("this attention hides its dropout: give the model the `eager` one")
        return attention(*args, dropout_p=dropout_p, **kwargs)

    try:
        F.dropout, F.scaled_dot_product_attention = dropout, attend
        yield
    finally:
        F.dropout, F.scaled_dot_product_attention = plain, attention


def trace(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.jit.ScriptModule:
    """A trace of the module, which asks for the training mode wherever the module drops.

    A scripted layer in a trace does so. Dropout layers become scripted ones, and functions get layers of their own.
    """
    module, layers = module.train(), {}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout:
                setattr(parent, name, torch.jit.script(nn.Dropout(child.p)))
    with warnings.catch_warnings():
        # It warns of every Python value in the model; `check` shows what they do.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        # The tracer reads deprecated properties of the libraries' classes.
        warnings.simplefilter("ignore", FutureWarning)
        while True:
            # A trace can't add layers: it is begun again until all are there.
            try:
                with recorded_dropout(layers):
                    return torch.jit.trace(module, inputs, check_trace=False)
            except LookupError as missing:
                (rate,) = missing.args
                layers[rate] = torch.jit.script(nn.Dropout(rate))
                module.add_module(f"live_dropout_{len(layers)}", layers[rate])


def to_torchscript(export: Export, batch: int, length: int) -> tuple[torch.jit.ScriptModule, list[str], bool]:
    """The module as TorchScript, with its parameters' names; the sizes that are free; whether device and dtype are."""
    if export.method == "script":
        scripted = torch.jit.script(export.module.train())
        return scripted, check(export, scripted, batch, length), True
    try:
        marked = dataclasses.replace(export, module=copy.deepcopy(export.module).to(MARK))
        traced = trace(marked.module, tuple(marked.inputs(batch, length).values()))
        traced = portable(traced, export.module)
        return traced, check(export, traced, batch, length), True
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        print(f"warning: the export keeps its device and dtype ({reason})", file=sys.stderr)
    traced = trace(copy.deepcopy(export.module), tuple(export.inputs(batch, length).values()))
    try:
        return traced, check(export, traced, batch, length), False
    except ValueError as error:
        raise SystemExit(str(error)) from None


def check(export: Export, scripted: torch.jit.ScriptModule, batch: int, length: int) -> list[str]:
    """Same names and dtypes, the same answers in evaluation and in training; answers the sizes that are free.

    Raises `ValueError` otherwise.
    """
    tensors = lambda module: {  # noqa: E731
        name: t.dtype
        for name, t in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    }
    expected, kept = tensors(export.module), tensors(scripted)
    # Buffers that are not saved may stay constants of the trace.
    saved = {name: dtype for name, dtype in expected.items() if name in export.module.state_dict(keep_vars=True)}
    if not saved.items() <= kept.items() or not kept.items() <= expected.items():
        raise ValueError(f"names or dtypes changed: {sorted(set(saved.items()) ^ set(kept.items()), key=str)}")
    for train in (False, True):
        if not same(export, scripted, batch, length, train):
            mode = "training" if train else "evaluation"
            raise ValueError(f"the export answers differently from the model in {mode}")
    used = {size for one in export.takes for size in one.sizes if isinstance(size, str)}
    others = {"batch": [(batch + 1, length), (1, length)], "length": [(batch, length + 3), (batch, 1)]}
    return [name for name in others if name in used and all(same(export, scripted, *at, False) for at in others[name])]


def same(export: Export, scripted: torch.jit.ScriptModule, batch: int, length: int, train: bool) -> bool:
    inputs = tuple(export.inputs(batch, length).values())
    answers = []
    for module in (export.module.train(train), scripted.train(train)):
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                answers.append(module(*inputs).float())
            except RuntimeError:
                # A size that is baked into the trace.
                return False
    expected, found = answers
    error = (found - expected).norm() if expected.shape == found.shape else torch.inf
    return bool(error <= 1e-5 * expected.norm())


def export(
    model: str | Export,
    out: Path,
    seed: int = 0,
    settings: dict | None = None,
    batch: int = 2,
    length: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Export:
    """Writes the three files, and answers the model in PyTorch, in training mode.

    A model that is given has its dtype, which libraries don't give to all tensors.
    """
    made = model
    if isinstance(model, str):
        made = build(model, seed, settings)
        made.module.to(dtype)
    made.module.to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        scripted, free, anywhere = to_torchscript(made, batch, length)
        inputs = made.inputs(batch, length)
    with torch.no_grad():
        output = made.module.eval()(*inputs.values())
    made.module.train()

    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    scripted.train().save(str(out / "model.pt"))
    save_file({**inputs, "output": output.contiguous()}, out / "example.safetensors")
    record = {
        "model": model if isinstance(model, str) else None,
        "class": type(made.module).__name__,
        "method": made.method,
        "settings": made.settings,
        "seed": seed,
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "portable": anywhere,
        "free": free,
        "inputs": [{"name": name, "shape": list(t.shape), "dtype": str(t.dtype)} for name, t in inputs.items()],
        "parameters": [name for name, _ in made.module.named_parameters()],
    }
    (out / "export.json").write_text(json.dumps(record, indent=2) + "\n")
    return made


def setting(text: str) -> tuple[str, object]:
    """`name=value`, the value as JSON."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not name=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{value!r} is no JSON value: {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--from", dest="folder", type=Path, help="folder with config.json and weights")
    model.add_argument("--model", choices=MODELS, help="a tiny model with random weights")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; made if need be")
    parser.add_argument("--input", type=Input.parse, action="append", default=[], metavar="NAME=VALUES:SIZES")
    parser.add_argument("--output", metavar="NAME", help="which output of a model of transformers (default: the first)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and of the example (default 0)")
    parser.add_argument(
        "--set", type=setting, action="append", default=[], metavar="NAME=VALUE", help="a setting of a tiny model"
    )
    parser.add_argument("--batch", type=int, default=2, help="of the example (default 2)")
    parser.add_argument("--length", type=int, default=8, help="of the example (default 8)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu", help="where the model runs while it is traced (default cpu)")
    parser.add_argument("--free", action="append", default=[], choices=["batch", "length"], help="must be free")
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    chosen = from_folder(given.folder, given.input, given.output, dtype) if given.folder else given.model
    sizes = dict(batch=given.batch, length=given.length)
    made = export(chosen, given.out, given.seed, dict(given.set), **sizes, dtype=dtype, device=given.device)
    free = json.loads((given.out / "export.json").read_text())["free"]
    if missing := set(given.free) - set(free):
        raise SystemExit(f"not free in this model: {', '.join(sorted(missing))}")
    count = sum(p.numel() for p in made.module.parameters())
    kind = type(made.module).__name__
    print(f"{given.out / 'model.pt'}: {kind}, {count} parameters, by {made.method}; free: {', '.join(free) or 'none'}")


if __name__ == "__main__":
    main()
