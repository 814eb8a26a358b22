#!/usr/bin/env python3
"""Exports a tiny PyTorch model with random weights to TorchScript, for training.

    python python/export.py --model llama-tiny --out exported/llama
    python python/export.py --model llama-tiny --seed 7 --set hidden_size=64 --set num_hidden_layers=4 --out ...

The folder then holds

    model.pt              the TorchScript module: `Base::torchscript("model.pt")`
    example.safetensors   inputs that it takes, and `output`, what it answers to them
    export.json           model, method, settings, seed, versions, and the name of every parameter

What makes an export fit for training, for a model of your own as well:

* The parameters keep their names (`model.layers.0.self_attn.q_proj.weight`): adapters are
  stored under them. So the module itself is traced or scripted, not a wrapper around it.
* `torch.jit.freeze` and `torch.jit.optimize_for_inference` turn parameters into constants:
  leave them out.
* The module answers one tensor; caches and other outputs are switched off.
* Batch size and length stay free. `export` checks that on inputs of other sizes.

To add a model, write a function that answers an `Export` and list it in `MODELS`.
"""

import argparse
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


@dataclasses.dataclass
class Export:
    """A model on its way out."""

    module: nn.Module
    # "trace" records one run; "script" compiles the source, so control flow survives.
    method: str
    # Inputs of a given batch size and length, drawn from the default generator.
    inputs: Callable[[int, int], dict[str, torch.Tensor]]
    settings: dict


def llama_tiny(settings: dict) -> Export:
    """A Llama of `transformers`: input_ids (batch, length) to logits (batch, length, vocabulary)."""
    import transformers

    given = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        # The default of 0.02 leaves the attention of so small a model almost uniform.
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
    } | settings

    # While tracing it warns of a loss that isn't used.
    transformers.logging.set_verbosity_error()

    class Llama(transformers.LlamaForCausalLM):
        def forward(self, input_ids):
            return super().forward(input_ids=input_ids, use_cache=False).logits

    # A cache would be a second output, and the other attentions may not trace.
    config = transformers.LlamaConfig(**given, use_cache=False, attn_implementation="eager")

    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.randint(0, config.vocab_size, (batch, length))}

    return Export(Llama(config), "trace", inputs, given)


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

    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(batch, length, given["width"])}

    return Export(Mlp(**given), "script", inputs, given)


MODELS: dict[str, Callable[[dict], Export]] = {
    "llama-tiny": llama_tiny,
    "mlp-tiny": mlp_tiny,
}


def build(model: str, seed: int = 0, settings: dict | None = None) -> Export:
    """The model of that name, the same for the same seed; the default generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[model](settings or {})


def to_torchscript(export: Export, batch: int, length: int) -> torch.jit.ScriptModule:
    """The module as TorchScript, with its parameters' names."""
    module = export.module.train()
    if export.method == "script":
        return torch.jit.script(module)
    with warnings.catch_warnings():
        # It warns of every Python value in the model; `check` shows that none of them is an input's size.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        # The tracer reads deprecated properties of transformers' classes.
        warnings.simplefilter("ignore", FutureWarning)
        return torch.jit.trace(module, tuple(export.inputs(batch, length).values()), check_trace=False)


def check(export: Export, scripted: torch.jit.ScriptModule, batch: int, length: int) -> None:
    """Same names, and the same answers on inputs of other sizes."""
    names = [name for name, _ in export.module.named_parameters(remove_duplicate=False)]
    kept = [name for name, _ in scripted.named_parameters(remove_duplicate=False)]
    if kept != names:
        raise SystemExit(f"names changed: {sorted(set(names) ^ set(kept))}")
    for sizes in [(batch, length), (batch + 1, length), (1, length + 3), (batch + 2, 1)]:
        inputs = tuple(export.inputs(*sizes).values())
        with torch.no_grad():
            expected, found = export.module(*inputs), scripted(*inputs)
        if expected.shape != found.shape or not torch.allclose(expected, found, rtol=1e-5, atol=1e-6):
            raise SystemExit(f"batch size and length {sizes}: the export answers differently from the model")


def export(
    model: str, out: Path, seed: int = 0, settings: dict | None = None, batch: int = 2, length: int = 8
) -> Export:
    """Writes the three files, and answers the model in PyTorch."""
    made = build(model, seed, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        scripted = to_torchscript(made, batch, length)
        check(made, scripted, batch, length)
        inputs = made.inputs(batch, length)
    with torch.no_grad():
        output = made.module(*inputs.values())

    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    scripted.save(str(out / "model.pt"))
    save_file({**inputs, "output": output.contiguous()}, out / "example.safetensors")
    record = {
        "model": model,
        "method": made.method,
        "settings": made.settings,
        "seed": seed,
        "torch": torch.__version__,
        "inputs": {name: {"shape": list(t.shape), "dtype": str(t.dtype)} for name, t in inputs.items()},
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
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; made if need be")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    parser.add_argument(
        "--set", type=setting, action="append", default=[], metavar="NAME=VALUE", help="a setting of the model"
    )
    parser.add_argument("--batch", type=int, default=2, help="of the example (default 2)")
    parser.add_argument("--length", type=int, default=8, help="of the example (default 8)")
    given = parser.parse_args()
    made = export(given.model, given.out, given.seed, dict(given.set), given.batch, given.length)
    count = sum(p.numel() for p in made.module.parameters())
    print(f"{given.out / 'model.pt'}: {given.model}, {count} parameters, by torch.jit.{made.method}")


if __name__ == "__main__":
    main()
