"""What torch, transformers, bitsandbytes and PEFT answer, as a JSON file, for
tests/optim.rs and tests/train.rs.

Tensors are lists of f32 bit patterns, and f64 values are bit patterns too, so
that nothing is lost on the way.

    optim_reference.py OUT "FUNCTION ARGUMENT..."...
"""

import json
import struct
import sys

import torch


def bits(tensor):
    return tensor.detach().float().flatten().view(torch.int32).tolist()


def f64_bits(value):
    return struct.unpack("<q", struct.pack("<d", value))[0]


SHAPES = {"a": [3, 17], "b": [129], "c": [5, 5]}
# Above and below the size from which bitsandbytes keeps 8 bits; 4200 isn't a
# multiple of the block.
SHAPES_8BIT = {"a": [64, 100], "b": [4200], "c": [5, 5]}


def follow(make, dtype, names, scheduled=True):
    """Fifteen steps over two groups; `c` has no gradient in every third.

    `names` are those of the optimizer's state, with the names that we save.
    """
    generator = torch.Generator().manual_seed(7)
    random = lambda shape: torch.randn(shape, generator=generator).to(dtype)
    params = {name: torch.nn.Parameter(random(shape)) for name, shape in SHAPES.items()}
    start = {name: bits(p) for name, p in params.items()}
    optimizer = make(params)
    schedule = None
    if scheduled:
        from transformers import get_cosine_schedule_with_warmup

        schedule = get_cosine_schedule_with_warmup(optimizer, 3, 15)
    steps = []
    for step in range(15):
        # Sizes from 1e-6 to 10.
        grads = {name: random(shape) * 10.0 ** (step % 8 - 6) for name, shape in SHAPES.items()}
        if step % 3 == 1:
            del grads["c"]
        for name, p in params.items():
            p.grad = grads[name].to(dtype) if name in grads else None
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        if schedule:
            schedule.step()
        steps.append(
            {
                "grads": {name: bits(g.to(dtype)) for name, g in grads.items()},
                "lr": f64_bits(1.0 if lr is None else lr),
                "params": {name: bits(p) for name, p in params.items()},
            }
        )
    state, sizes = {}, {}
    for name, p in params.items():
        for theirs, ours in names.items():
            if theirs in optimizer.state[p]:
                value = torch.as_tensor(optimizer.state[p][theirs])
                state[f"{name}.{ours}"] = bits(value)
                sizes[f"{name}.{ours}"] = list(value.shape)
    return {"shapes": SHAPES, "start": start, "steps": steps, "state": state, "sizes": sizes}


def groups(params, decay):
    own = {"params": [params["b"]], "lr": 3e-3, "weight_decay": 0.0}
    return [{"params": [params["a"], params["c"]], "weight_decay": decay}, own]


def adamw(dtype, variant):
    make = lambda params: torch.optim.AdamW(
        groups(params, 0.1), lr=1e-2, betas=(0.9, 0.95), eps=1e-7, fused=variant == "fused"
    )
    return follow(make, getattr(torch, dtype), {n: n for n in ("exp_avg", "exp_avg_sq", "step")})


def sgd(dtype, variant, momentum, dampening, nesterov):
    make = lambda params: torch.optim.SGD(
        groups(params, 0.1),
        lr=1e-2,
        momentum=float(momentum),
        dampening=float(dampening),
        nesterov=nesterov == "nesterov",
        fused=variant == "fused",
    )
    return follow(make, getattr(torch, dtype), {"momentum_buffer": "momentum_buffer"})


def lion(dtype):
    import bitsandbytes

    make = lambda params: bitsandbytes.optim.Lion(groups(params, 0.1), lr=1e-2, betas=(0.9, 0.95))
    return follow(make, getattr(torch, dtype), {"state1": "exp_avg"})


def lion_paper():
    """Algorithm 2 of the paper (arXiv:2302.06675) in f64."""

    class Lion(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    update = 0.9 * m + 0.1 * p.grad
                    p.copy_(p - group["lr"] * (update.sign() + group["weight_decay"] * p))
                    m.copy_(0.95 * m + 0.05 * p.grad)

    return follow(lambda params: Lion(groups(params, 0.1), {"lr": 1e-2}), torch.float64, {"m": "exp_avg"})


def adafactor(dtype, variant):
    from transformers.optimization import Adafactor

    own = {"lr": 1e-2, "relative_step": False}
    options = {
        "relative": {},
        "warmup": {"warmup_init": True},
        "own": own | {"scale_parameter": False},
        "scaled": own | {"beta1": 0.9, "clip_threshold": 0.5, "decay_rate": -0.7, "eps": (1e-28, 1e-2)},
    }[variant]

    def make(params):
        if "lr" in options:
            return Adafactor(groups(params, 0.1), **options)
        return Adafactor(params.values(), weight_decay=0.1, **options)

    names = {n: n for n in ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", "exp_avg")}
    return follow(make, getattr(torch, dtype), names, scheduled="lr" in options)


def adamw8bit(dtype):
    """Each of six steps of bitsandbytes with all that goes in and comes out."""
    import bitsandbytes
    import bitsandbytes.functional as F

    dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(7)
    random = lambda shape: torch.randn(shape, generator=generator).to(dtype)
    params = {name: torch.nn.Parameter(random(shape)) for name, shape in SHAPES_8BIT.items()}
    beta1, beta2 = 0.9, 0.95
    optimizer = bitsandbytes.optim.AdamW8bit(
        params.values(), lr=1e-2, betas=(beta1, beta2), eps=1e-7, weight_decay=0.1
    )
    names = {"state1": "exp_avg", "absmax1": "exp_avg_absmax", "state2": "exp_avg_sq", "absmax2": "exp_avg_sq_absmax"}

    def snapshot():
        return {
            f"{name}.{ours}": bits(optimizer.state[p][theirs])
            for name, p in params.items()
            for theirs, ours in names.items()
            if theirs in optimizer.state[p]
        }

    steps = []
    for step in range(6):
        grads = {name: (random(shape) * 10.0 ** (step % 3 - 2)).to(dtype) for name, shape in SHAPES_8BIT.items()}
        before, start = snapshot(), {name: bits(p) for name, p in params.items()}
        exact = {}
        for name, p in params.items():
            p.grad = grads[name]
            if p.numel() >= 4096:
                g, state = p.grad.float(), optimizer.state[p]
                m, v = torch.zeros_like(g), torch.zeros_like(g)
                if state:
                    unpack = torch.ops.bitsandbytes.dequantize_blockwise
                    m = unpack(state["state1"], state["absmax1"], state["qmap1"], 256, torch.float32)
                    v = unpack(state["state2"], state["absmax2"], state["qmap2"], 256, torch.float32)
                m.mul_(beta1).add_(g, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                exact |= {f"{name}.exp_avg": bits(m), f"{name}.exp_avg_sq": bits(v)}
        optimizer.step()
        steps.append(
            {
                "start": start,
                "before": before,
                "grads": {name: bits(g) for name, g in grads.items()},
                "params": {name: bits(p) for name, p in params.items()},
                "after": snapshot(),
                "exact": exact,
            }
        )
    maps = {"exp_avg": F.create_dynamic_map(True), "exp_avg_sq": F.create_dynamic_map(False)}
    return {"shapes": SHAPES_8BIT, "steps": steps, "maps": {name: bits(m) for name, m in maps.items()}}


def lora_plus():
    """The learning rate of each parameter in PEFT's LoRA+ optimizer."""
    import peft
    from peft.optimizers import create_loraplus_optimizer

    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4))
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "1"], bias="all"))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {
        name.replace(".default", ""): {"lr": f64_bits(rates[id(p)]), "shape": list(p.shape)} for name, p in trainable
    }


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
        by_value = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
        for p, g in zip(by_value, grads):
            p.grad = g.clone()
        torch.nn.utils.clip_grad_value_(by_value, max_norm)
        cases.append(
            {
                "max_norm": max_norm,
                "grads": [bits(g) for g in grads],
                "norm": bits(norm)[0],
                "clipped": [bits(p.grad) for p in params],
                "clipped by value": [bits(p.grad) for p in by_value],
            }
        )
    return cases


def schedules():
    """Factors of each schedule at steps 0 to 40."""
    import transformers

    def factors(schedule, *args, **options):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = getattr(transformers, f"get_{schedule}")(optimizer, *args, **options)
        return [f64_bits(float(schedule.lr_lambdas[0](step))) for step in range(41)]

    def one_cycle(**options):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        options = {"max_lr": 1.0, "total_steps": 41, "cycle_momentum": False} | options
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, **options)
        rates = [float(optimizer.param_groups[0]["lr"])]
        for _ in range(40):
            optimizer.step()
            schedule.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
        return [f64_bits(rate) for rate in rates]

    restarts = "cosine_with_hard_restarts_schedule_with_warmup"
    polynomial = "polynomial_decay_schedule_with_warmup"
    return {
        "restarts 0 30 3": factors(restarts, 0, 30, num_cycles=3),
        "restarts 7 33 4": factors(restarts, 7, 33, num_cycles=4),
        "polynomial 0 30": factors(polynomial, 0, 30),
        "polynomial 7 33 0.125 2.5": factors(polynomial, 7, 33, lr_end=0.125, power=2.5),
        "inverse_sqrt 0": factors("inverse_sqrt_schedule", 0),
        "inverse_sqrt 7": factors("inverse_sqrt_schedule", 7),
        "inverse_sqrt 7 20": factors("inverse_sqrt_schedule", 7, timescale=20),
        "one_cycle": one_cycle(),
        "one_cycle linear": one_cycle(
            pct_start=0.25, div_factor=10.0, final_div_factor=100.0, anneal_strategy="linear"
        ),
        "one_cycle three": one_cycle(pct_start=0.4, three_phase=True),
        "one_cycle all up": one_cycle(pct_start=1.0),
        "constant": factors("constant_schedule"),
        "constant 7": factors("constant_schedule_with_warmup", 7),
        "linear 0 30": factors("linear_schedule_with_warmup", 0, 30),
        "linear 7 33": factors("linear_schedule_with_warmup", 7, 33),
        "linear 9 5": factors("linear_schedule_with_warmup", 9, 5),
        "cosine 0 30": factors("cosine_schedule_with_warmup", 0, 30),
        "cosine 7 33": factors("cosine_schedule_with_warmup", 7, 33),
    }


if __name__ == "__main__":
    answers = {}
    for case in sys.argv[2:]:
        function, *arguments = case.split()
        answers[case] = globals()[function](*arguments)
    with open(sys.argv[1], "w") as out:
        json.dump(answers, out)
