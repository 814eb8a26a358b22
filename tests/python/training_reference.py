"""What torch and diffusers answer, as a JSON file, for tests/training_state.rs.

Tensors are lists of f32 bit patterns, and f64 values are bit patterns too, so
that nothing is lost on the way.

    training_reference.py OUT "FUNCTION ARGUMENT..."...
"""

import json
import statistics
import struct
import sys

import torch


def bits(tensor):
    return tensor.detach().float().flatten().view(torch.int32).tolist()


def f64_bits(value):
    return struct.unpack("<q", struct.pack("<d", value))[0]


def ema(decay, min_decay, update_after_step, warmup):
    """Twelve updates of diffusers' average of one parameter."""
    from diffusers.training_utils import EMAModel

    generator = torch.Generator().manual_seed(5)
    p = torch.nn.Parameter(torch.randn([3, 7], generator=generator))
    options = {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75} if warmup == "warmup" else {}
    average = EMAModel(
        [p], decay=float(decay), min_decay=float(min_decay), update_after_step=int(update_after_step), **options
    )
    steps, start = [], bits(p)
    for _ in range(12):
        with torch.no_grad():
            p.add_(torch.randn([3, 7], generator=generator))
        average.step([p])
        steps.append(
            {"param": bits(p), "average": bits(average.shadow_params[0]), "decay": f64_bits(average.cur_decay_value)}
        )
    return {"start": start, "steps": steps}


def scaler():
    """Scale, tracker and gradient over steps of which some overflow."""
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([p], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3, growth_factor=1.7, backoff_factor=0.3)
    steps = []
    for step in range(24):
        grad = torch.tensor([0.37 * step, -1.0])
        if step in (4, 5, 13):
            grad[step % 2] = float("inf") if step % 2 else float("nan")
        optimizer.zero_grad()
        scaler.scale((p * grad).sum()).backward()
        scaled = bits(p.grad)
        scaler.unscale_(optimizer)
        unscaled = bits(p.grad)
        scaler.step(optimizer)
        scaler.update()
        state = scaler.state_dict()
        steps.append(
            {
                "grad": bits(grad),
                "scaled": scaled,
                "unscaled": unscaled,
                "param": bits(p),
                "scale": f64_bits(state["scale"]),
                "growth_tracker": state["_growth_tracker"],
            }
        )
    return steps


def normal():
    """The first values of our generator's stream for seed 42, by Python's means."""
    mask = (1 << 64) - 1

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    gamma = 0x9E3779B97F4A7C15
    start = 42 ^ mix(gamma)
    numbers = [mix((start + (i + 1) * gamma) & mask) for i in range(3000)]
    inverse = statistics.NormalDist().inv_cdf
    return {
        "uniform": [f64_bits((n >> 40) / 2**24) for n in numbers[:1000]],
        "normal": [f64_bits(inverse(((n >> 12) + 0.5) / 2**52)) for n in numbers[1000:2000]],
        "integers": [-7 + (n * 1000 >> 64) for n in numbers[2000:]],
    }


class Block(torch.nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn([32, 8], generator=generator))
        self.down = torch.nn.Parameter(torch.randn([8, 32], generator=generator))

    def forward(self, x):
        return torch.nn.functional.linear(torch.nn.functional.gelu(torch.nn.functional.linear(x, self.up)), self.down)


def checkpoint(dtype):
    """Output and gradients of a checkpointed block, under autocast for bfloat16."""
    from torch.utils.checkpoint import checkpoint

    generator = torch.Generator().manual_seed(5)
    block = Block(generator)
    x = torch.randn([4, 8], generator=generator).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        y = checkpoint(block, x, use_reentrant=True)
        loss = y.float().square().sum()
    loss.backward()
    return {
        "x": bits(x),
        "up": bits(block.up),
        "down": bits(block.down),
        "y": bits(y),
        "grads": {"x": bits(x.grad), "up": bits(block.up.grad), "down": bits(block.down.grad)},
    }


if __name__ == "__main__":
    answers = {}
    for case in sys.argv[2:]:
        function, *arguments = case.split()
        answers[case] = globals()[function](*arguments)
    with open(sys.argv[1], "w") as out:
        json.dump(answers, out)
