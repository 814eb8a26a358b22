"""PEFT's side of torchscript.rs: losses and gradients of the first six iterations.

torchscript_reference.py DIR    writes, for each model,
    DIR/<model>/model.pt              the TorchScript module (python/export.py)
    DIR/<model>/<run>/adapter/        the adapter to start from, both factors random
    DIR/<model>/<run>/record.safetensors
"""

import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from mirror import adapters, export, randomise, snapshot
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

ITERATIONS = 6

TARGETS = {
    "llama-tiny": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
    "mlp-tiny": ["up", "gate", "down", "head"],
}
SIZES = [(2, 8), (2, 8), (2, 8), (3, 5), (1, 8), (3, 5)]
RUNS = {
    "fixed": dict(sizes=[(2, 8)] * ITERATIONS, lr=0.0, dropout=0.0),
    "descent": dict(sizes=SIZES, lr=0.1, dropout=0.0),
    "dropout": dict(sizes=[(2, 8)] * ITERATIONS, lr=0.1, dropout=0.1),
}


def record(made: export.Export, model: str, out: Path, sizes, lr: float, dropout: float) -> None:
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=TARGETS[model])
    peft_model = get_peft_model(copy.deepcopy(made.module), config).train()
    randomise(peft_model, seed=1)
    peft_model.save_pretrained(out / "adapter", save_embedding_layers=False)
    torch.manual_seed(21)
    classes = peft_model(*made.inputs(1, 1).values()).shape[-1]
    inputs = [next(iter(made.inputs(*size).values())) for size in sizes]
    labels = [torch.randint(0, classes, size) for size in sizes]
    if lr == 0.0:
        inputs, labels = [inputs[0].clone() for _ in sizes], [labels[0].clone() for _ in sizes]

    kept = {}
    torch.manual_seed(77)
    for step, (x, y) in enumerate(zip(inputs, labels)):
        output = peft_model(x)
        loss = F.cross_entropy(output.flatten(0, 1), y.flatten())
        loss.backward()
        parameters = adapters(peft_model)
        kept |= {f"{step}.input": x, f"{step}.labels": y, f"{step}.loss": loss.detach()}
        kept |= snapshot(f"{step}.", {"output": output})
        kept |= snapshot(f"{step}.grad.", {name: p.grad for name, p in parameters.items()})
        with torch.no_grad():
            for p in parameters.values():
                p -= lr * p.grad
                p.grad = None
    save_file(kept, out / "record.safetensors")


def main() -> None:
    torch.set_num_threads(2)
    out = Path(sys.argv[1])
    for model in TARGETS:
        made = export.export(model, out / model)
        for run, settings in RUNS.items():
            record(made, model, out / model / run, **settings)
    made = export.build("mlp-tiny")
    frozen = torch.jit.freeze(torch.jit.script(made.module.eval()))
    frozen.save(str(out / "frozen.pt"))


if __name__ == "__main__":
    main()
