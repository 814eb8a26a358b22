"""PEFT's side of benches/memory.rs: `memory.py nf4|int8|dense ROWS` prints the peak of a step in MB."""

import os
import sys

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import bitsandbytes as bnb  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

LAYERS, WIDTH = 16, 2048


def status(field: str) -> float:
    with open("/proc/self/status") as text:
        line = next(line for line in text if line.startswith(field))
    return float(line.split()[1]) * 1024 / 1e6


def layer(kind: str) -> torch.nn.Module:
    dense = torch.nn.Linear(WIDTH, WIDTH)
    if kind == "dense":
        return dense
    if kind == "nf4":
        new = bnb.nn.Linear4bit(WIDTH, WIDTH, compute_dtype=torch.float32, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4")
    else:
        new = bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(dense.weight.data, requires_grad=False)
    new.bias = dense.bias
    return new.to("cpu")


def main(kind: str, rows: int) -> None:
    net = torch.nn.Sequential(*[layer(kind) for _ in range(LAYERS)])
    model = get_peft_model(net, LoraConfig(r=16, target_modules=[str(i) for i in range(LAYERS)]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    x = torch.randn(rows, WIDTH)
    before = status("VmRSS")
    for step in range(3):
        if step == 1:
            with open("/proc/self/clear_refs", "w") as peak:
                peak.write("5")
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    print(status("VmHWM") - before)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
