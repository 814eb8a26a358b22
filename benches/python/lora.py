"""PEFT's side of lora.rs: the seconds for one step of a case."""

import time

import torch
from answering import serve
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


MODELS = {}


def answer(request: dict) -> dict:
    if "threads" in request:
        torch.set_num_threads(request["threads"])
        return {"torch": torch.__version__}
    case, steps = request["case"], request["steps"]
    if case == "wrap":
        return {"seconds": wrap()}
    if case not in MODELS:
        MODELS[case] = model(case)
    net, x = MODELS[case], torch.randn(ROWS, WIDTH, requires_grad=True)
    start = time.perf_counter()
    for _ in range(steps):
        net(x).sum().backward()
    return {"seconds": (time.perf_counter() - start) / steps}


if __name__ == "__main__":
    serve(answer)
