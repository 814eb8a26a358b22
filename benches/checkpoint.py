"""The peer of checkpoint.rs: torch.save and torch.load of AdamW's state and the
adapter, and PEFT's save_pretrained. Reads what to do, answers seconds.

torch.save is followed by an fsync, as the other side does it; save_pretrained
writes the adapter alone, a third of the bytes, and has none.
"""

import os
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Net(nn.Module):
    def __init__(self, sites: int, width: int):
        super().__init__()
        # One weight for all: only the adapters count here.
        weight = nn.Parameter(torch.zeros(width, width))
        self.layers = nn.ModuleList()
        for _ in range(sites):
            proj = nn.Linear(1, 1, bias=False)
            proj.in_features = proj.out_features = width
            proj.weight = weight
            self.layers.append(nn.ModuleDict({"proj": proj}))


def main(out: Path, sites: int, width: int) -> None:
    model = get_peft_model(Net(sites, width), LoraConfig(r=16, target_modules=["proj"]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    path = out / "torch.pt"

    def save() -> None:
        adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with open(path, "wb") as file:
            torch.save({"adapter": adapter, "optimizer": optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())

    tasks = {
        "torch.save": save,
        "torch.load": lambda: torch.load(path, weights_only=True),
        "save_pretrained": lambda: model.save_pretrained(out / "peft"),
    }
    for line in sys.stdin:
        start = time.perf_counter()
        tasks[line.strip()]()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
