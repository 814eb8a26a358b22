"""The Python side of benches/quantize.rs: a weight packed by the peers, timed on request.

Reads one JSON object a line from stdin and answers one a line on stdout:
  {"threads": 2}
  {"weight": FILE}                 a safetensors file with the tensor "weight"      -> {"ok": true}
  {"time": SCHEME}                                                                  -> {"seconds": S}
  {"error": SCHEME}     the relative error (Frobenius norm) of the last packing, values in the weight's dtype
                                                                                    -> {"error": E}
An answer of {"ok": false, "why": …} is that of a scheme without a peer.
"""

import os
import sys
import time
import warnings

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# optimum-quanto builds its kernel that unpacks 4 bits with the ninja of its environment.
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
warnings.filterwarnings("ignore")

import bitsandbytes.functional as bnb  # noqa: E402
import torch  # noqa: E402
from answering import serve  # noqa: E402
from optimum.quanto import (  # noqa: E402
    AbsmaxOptimizer,
    HqqOptimizer,
    MaxOptimizer,
    qfloat8_e4m3fn,
    qint2,
    qint4,
    qint8,
    quantize_weight,
)
from safetensors.torch import load_file  # noqa: E402


class FourBit:
    def __init__(self, quant_type, double):
        self.options = {"blocksize": 64, "quant_type": quant_type, "compress_statistics": double}

    def pack(self, weight):
        return bnb.quantize_4bit(weight, **self.options)

    def values(self, packed):
        return bnb.dequantize_4bit(*packed)


class LlmInt8:
    def pack(self, weight):
        return bnb.int8_vectorwise_quant(weight.half())[:2]

    def values(self, packed):
        return bnb.int8_vectorwise_dequant(*packed)


class Quanto:
    def __init__(self, qtype, optimizer, group_size=None):
        self.qtype, self.optimizer, self.group_size = qtype, optimizer, group_size

    def pack(self, weight):
        if self.group_size is None:
            scale, shift = self.optimizer(weight, self.qtype, axis=0), None
        else:
            scale, shift = self.optimizer(weight, self.qtype, axis=0, group_size=self.group_size)
        return quantize_weight(weight, self.qtype, 0, scale, shift, self.group_size, optimized=False)

    def values(self, packed):
        return packed.dequantize()


PEERS = {
    "int8": Quanto(qint8, AbsmaxOptimizer()),
    "llm_int8": LlmInt8(),
    "int4": Quanto(qint4, MaxOptimizer(), 128),
    "int4+hqq": Quanto(qint4, HqqOptimizer(), 128),
    "int2": Quanto(qint2, MaxOptimizer(), 128),
    "fp8-e4m3": Quanto(qfloat8_e4m3fn, AbsmaxOptimizer()),
    "nf4": FourBit("nf4", False),
    "nf4+dq": FourBit("nf4", True),
    "fp4": FourBit("fp4", False),
}


class Bench:
    def answer(self, request):
        if "threads" in request:
            torch.set_num_threads(request["threads"])
            return {"torch": torch.__version__}
        if "weight" in request:
            self.weight = load_file(request["weight"])["weight"]
            return {"ok": True}
        if "time" in request:
            peer = PEERS[request["time"]]
            start = time.perf_counter()
            self.packed = peer.pack(self.weight)
            return {"seconds": time.perf_counter() - start}
        values = PEERS[request["error"]].values(self.packed).to(self.weight.dtype)
        wide = self.weight.double()
        return {"error": float((values.double() - wide).norm() / wide.norm())}


if __name__ == "__main__":
    serve(Bench().answer)
