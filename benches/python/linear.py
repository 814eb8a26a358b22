"""The Python side of benches/linear.rs: layers of the peers, timed on request.

Reads one JSON object a line from stdin and answers one a line on stdout:
  {"threads": 2}
  {"make": PEER, "out": O, "in": I, "rows": N, "dtype": "float32", "rank": 16}   -> {"ok": true} or {"ok": false, "why": …}
  {"time": PEER, "what": "forward" | "step", "repeat": R}                        -> {"seconds": one call's}
  {"drop": true}                                                                -> {"ok": true}
"""

import os
import sys
import time
import warnings

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# optimum-quanto builds its kernel for int4 with the ninja of its environment.
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
warnings.filterwarnings("ignore")

import bitsandbytes as bnb  # noqa: E402
import torch  # noqa: E402
from answering import serve  # noqa: E402
from optimum.quanto import freeze, qint4, qint8, quantize  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402


class Dense(torch.nn.Module):
    """The frozen dense weight alone, by one of libtorch's two libraries."""

    def __init__(self, weight, onednn):
        super().__init__()
        self.weight = weight
        self.product = OneDnn.apply if onednn else torch.nn.functional.linear

    def forward(self, x):
        return self.product(x, self.weight)


class OneDnn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return torch.ops.mkldnn._linear_pointwise(grad.contiguous(), weight.t(), None, "none", [], ""), None


def adapted(layer, rank):
    model = torch.nn.Sequential()
    model.add_module("layer", layer)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"]))


def bnb_layer(kind, weight, dtype):
    out, inn = weight.shape
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(inn, out, bias=False, quant_type="nf4", compute_dtype=dtype)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
    else:
        layer = bnb.nn.Linear8bitLt(inn, out, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, has_fp16_weights=False, requires_grad=False)
    return layer.to("cpu")


def quanto_layer(kind, weight):
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    model = torch.nn.Sequential()
    model.add_module("layer", layer)
    quantize(model, weights=kind)
    freeze(model)
    return model.layer


def make(peer, weight, dtype, rank):
    match peer:
        case "dense (mm)":
            return Dense(weight, onednn=False)
        case "dense (oneDNN)":
            # Raises where oneDNN has no products of this dtype.
            OneDnn.apply(torch.zeros(1, weight.shape[1], dtype=dtype), weight)
            return Dense(weight, onednn=True)
        case "PEFT dense":
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            return adapted(layer, rank)
        case "PEFT bnb nf4":
            return adapted(bnb_layer("nf4", weight, dtype), rank)
        case "PEFT bnb int8":
            return adapted(bnb_layer("int8", weight, dtype), rank)
        case "PEFT quanto int8":
            return adapted(quanto_layer(qint8, weight), rank)
        case "PEFT quanto int4":
            return adapted(quanto_layer(qint4, weight), rank)
        # Evaluated, these take packed kernels, and (nf4) never train again: layers of their own.
        case "bnb nf4 packed":
            return bnb_layer("nf4", weight, dtype).eval()
        case "bnb int8 packed":
            return bnb_layer("int8", weight, dtype).eval()
    raise ValueError(peer)


class Bench:
    def __init__(self):
        self.layers = {}

    def answer(self, request):
        if "threads" in request:
            torch.set_num_threads(request["threads"])
            return {"torch": torch.__version__}
        if "make" in request:
            torch.manual_seed(0)
            dtype = getattr(torch, request["dtype"])
            weight = torch.randn(request["out"], request["in"]).mul_(0.02).to(dtype)
            self.x = torch.randn(request["rows"], request["in"]).to(dtype).requires_grad_()
            self.g = torch.randn(request["rows"], request["out"]).to(dtype)
            self.layers[request["make"]] = make(request["make"], weight, dtype, request["rank"])
            return {"ok": True}
        if "drop" in request:
            self.layers.clear()
            return {"ok": True}
        layer = self.layers[request["time"]]
        start = time.perf_counter()
        for _ in range(request["repeat"]):
            if request["what"] == "forward":
                # bitsandbytes takes its packed kernel for inputs that want no gradient.
                with torch.no_grad():
                    layer(self.x if layer.training else self.x.detach())
            else:
                (layer(self.x) * self.g).sum().backward()
        seconds = (time.perf_counter() - start) / request["repeat"]
        self.x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        return {"seconds": seconds}


if __name__ == "__main__":
    serve(Bench().answer)
