"""What torch and transformers answer, as a JSON file, for tests/train.rs.

Tensors are lists of f32 bit patterns, and f64 values are bit patterns too, so
that nothing is lost on the way.

    optim_reference.py OUT adamw {float32|bfloat16} {fused|default}
    optim_reference.py OUT clip
    optim_reference.py OUT schedules
"""

import json
import struct
import sys

import torch


def bits(tensor):
    return tensor.detach().float().flatten().view(torch.int32).tolist()


def f64_bits(value):
    return struct.unpack("<q", struct.pack("<d", value))[0]


def adamw(dtype, variant):
    """Fifteen steps over two groups; `c` has no gradient in every third."""
    dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(7)
    shapes = {"a": [3, 17], "b": [129], "c": [5, 5]}
    random = lambda shape: torch.randn(shape, generator=generator).to(dtype)
    params = {name: torch.nn.Parameter(random(shape)) for name, shape in shapes.items()}
    start = {name: bits(p) for name, p in params.items()}
    groups = [
        {"params": [params["a"], params["c"]]},
        {"params": [params["b"]], "lr": 3e-3, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.1, fused=variant == "fused"
    )
    from transformers import get_cosine_schedule_with_warmup

    schedule = get_cosine_schedule_with_warmup(optimizer, 3, 15)
    steps = []
    for step in range(15):
        # Sizes from 1e-6 to 10.
        grads = {name: random(shape) * 10.0 ** (step % 8 - 6) for name, shape in shapes.items()}
        if step % 3 == 1:
            del grads["c"]
        for name, p in params.items():
            p.grad = grads[name].to(dtype) if name in grads else None
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
        steps.append(
            {
                "grads": {name: bits(g.to(dtype)) for name, g in grads.items()},
                "lr": f64_bits(lr),
                "params": {name: bits(p) for name, p in params.items()},
            }
        )
    state = {
        f"{name}.{what}": bits(optimizer.state[p][what])
        for name, p in params.items()
        for what in ("exp_avg", "exp_avg_sq", "step")
    }
    return {"shapes": shapes, "start": start, "steps": steps, "state": state}


def clip():
    """Norms and clipped gradients, with the bound above and below the norm."""
    generator = torch.Generator().manual_seed(3)
    cases = []
    for max_norm in (0.5, 1.0, 100.0):
        grads = [torch.randn(shape, generator=generator) for shape in ([7, 9], [33])]
        params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
        for p, g in zip(params, grads):
            p.grad = g.clone()
        norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
        cases.append(
            {
                "max_norm": max_norm,
                "grads": [bits(g) for g in grads],
                "norm": bits(norm)[0],
                "clipped": [bits(p.grad) for p in params],
            }
        )
    return cases


def schedules():
    """Factors of each schedule at steps 0 to 40."""
    import transformers

    def factors(schedule, *args):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = getattr(transformers, f"get_{schedule}")(optimizer, *args)
        return [f64_bits(float(schedule.lr_lambdas[0](step))) for step in range(41)]

    return {
        "constant": factors("constant_schedule"),
        "constant 7": factors("constant_schedule_with_warmup", 7),
        "linear 0 30": factors("linear_schedule_with_warmup", 0, 30),
        "linear 7 33": factors("linear_schedule_with_warmup", 7, 33),
        "linear 9 5": factors("linear_schedule_with_warmup", 9, 5),
        "cosine 0 30": factors("cosine_schedule_with_warmup", 0, 30),
        "cosine 7 33": factors("cosine_schedule_with_warmup", 7, 33),
    }


if __name__ == "__main__":
    functions = {"adamw": adamw, "clip": clip, "schedules": schedules}
    with open(sys.argv[1], "w") as out:
        json.dump(functions[sys.argv[2]](*sys.argv[3:]), out)
