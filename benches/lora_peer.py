"""PEFT's side of lora.rs: reads `case steps` lines, answers the seconds for one step."""

import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

LAYERS, WIDTH, ROWS = 64, 256, 64


class Net(nn.Module):
    def __init__(self, layers: int, width: int):
        super().__init__()
        self.h = nn.ModuleList([nn.Linear(width, width) for _ in range(layers)])

    def forward(self, x):
        for layer in self.h:
            x = layer(x)
        return x


def model(case: str):
    net = Net(LAYERS, WIDTH)
    if case == "base":
        return net.requires_grad_(False)
    dropout = 0.1 if case == "dropout" else 0.0
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=r"h\.\d+", use_dora=case == "dora")
    return get_peft_model(net, config).train()


def wrap() -> float:
    net = Net(2000, 32)
    config = LoraConfig(r=8, target_modules="all-linear")
    start = time.perf_counter()
    get_peft_model(net, config)
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(2)
    models = {}
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    for line in sys.stdin:
        case, steps = line.split()
        if case == "wrap":
            print(wrap(), flush=True)
            continue
        net = models.setdefault(case, None) or model(case)
        models[case] = net
        start = time.perf_counter()
        for _ in range(int(steps)):
            net(x).sum().backward()
        print((time.perf_counter() - start) / int(steps), flush=True)


if __name__ == "__main__":
    main()
