"""The Python side of benches/cuda.rs: layers of the peers in bf16, timed on request.

Reads one JSON object a line from stdin and answers one a line on stdout:
  {"device": "cuda"}                                                  -> {"versions": …}
  {"make": PEER, "out": O, "in": I, "rows": N, "rank": 16}            -> {"ok": true} or {"ok": false, "why": …}
  {"time": PEER, "what": "forward" | "step", "repeat": R}             -> {"seconds": one call's}
  {"drop": true}                                                      -> {"ok": true}
  {"memory": PEER, "layers": L, "width": W, "rows": N, "rank": 16}    -> {"ok": true, "bytes": the peak of a step}
"""

import os
import time
import warnings

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

import bitsandbytes as bnb  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
from answering import serve  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

DTYPE = torch.bfloat16


def linear(kind, out, inn, device):
    if kind == "nf4":
        weight = torch.randn(out, inn).mul_(0.02).to(DTYPE)
        layer = bnb.nn.Linear4bit(inn, out, bias=False, quant_type="nf4", compute_dtype=DTYPE)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
    elif kind == "int8":
        weight = torch.randn(out, inn).mul_(0.02)
        layer = bnb.nn.Linear8bitLt(inn, out, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, has_fp16_weights=False, requires_grad=False)
    else:
        layer = torch.nn.Linear(inn, out, bias=False, dtype=DTYPE)
    return layer.to(device)


def adapted(layers, rank):
    model = torch.nn.Sequential()
    for i, layer in enumerate(layers):
        model.add_module(f"layer{i}", layer)
    names = [f"layer{i}" for i in range(len(layers))]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))


KINDS = {"PEFT bnb nf4": "nf4", "PEFT bnb int8": "int8", "PEFT dense": "dense"}


class Bench:
    def __init__(self):
        self.layers = {}
        self.device = "cuda"

    def wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def answer(self, request):
        if "device" in request:
            self.device = request["device"]
            name = torch.cuda.get_device_name() if self.device == "cuda" else "the CPU"
            parts = f"torch {torch.__version__}, PEFT {peft.__version__}, bitsandbytes {bnb.__version__}"
            return {"versions": f"{name}, {parts}"}
        if "make" in request:
            return self.make(request)
        if "memory" in request:
            return self.memory(request)
        if "drop" in request:
            self.layers.clear()
            return {"ok": True}
        return {"seconds": self.seconds(self.layers[request["time"]], request["what"] == "step", request["repeat"])}

    def make(self, request):
        peer, out, inn, rows = request["make"], request["out"], request["in"], request["rows"]
        if peer == "bnb nf4 packed":
            layer = linear("nf4", out, inn, self.device).eval()
        else:
            layer = adapted([linear(KINDS[peer], out, inn, self.device)], request["rank"])
        self.x = torch.randn(rows, inn, device=self.device).to(DTYPE).requires_grad_()
        self.g = torch.randn(rows, out, device=self.device).to(DTYPE)
        self.layers[peer] = layer
        return {"ok": True}

    def seconds(self, layer, step, repeat):
        self.wait()
        start = time.perf_counter()
        for _ in range(repeat):
            if step:
                (layer(self.x) * self.g).sum().backward()
            else:
                # bitsandbytes takes its packed kernel for one token that wants no gradient.
                with torch.no_grad():
                    layer(self.x.detach())
        self.wait()
        seconds = (time.perf_counter() - start) / repeat
        self.x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        return seconds

    def memory(self, request):
        width, kind = request["width"], KINDS[request["memory"]]
        layers = [linear(kind, width, width, self.device) for _ in range(request["layers"])]
        model = adapted(layers, request["rank"])
        x = torch.randn(request["rows"], width, device=self.device).to(DTYPE).requires_grad_()
        for _ in range(2):
            self.wait()
            torch.cuda.reset_peak_memory_stats()
            model(x).sum().backward()
            self.wait()
        return {"ok": True, "bytes": torch.cuda.max_memory_allocated()}


if __name__ == "__main__":
    serve(Bench().answer)
