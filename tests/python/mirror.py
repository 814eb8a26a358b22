"""The models of the tests in PyTorch, and how the peers train them."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))
import export  # noqa: E402
import portable  # noqa: E402

VOCABULARY, WIDTH, HIDDEN, LAYERS = 23, 16, 24, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q_proj = nn.Linear(WIDTH, HIDDEN)
        self.v_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.fc = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        h = self.norm(x)
        return x + self.fc(F.gelu(self.q_proj(h)) * self.v_proj(h))


class Net(nn.Module):
    """The twin of `Net` in tests/twin: ids (batch, length) to logits (batch, length, vocabulary)."""

    def __init__(self, seed=None):
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.manual_seed(seed)
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, WIDTH)
            self.h = nn.ModuleList([Block() for _ in range(LAYERS)])
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.h:
            x = block(x)
        return self.head(x)


def net(weights: Path) -> Net:
    model = Net()
    model.load_state_dict(load_file(weights))
    return model


def llama():
    """transformers' own class, with the weights of `export.py --model llama-tiny --seed 0`."""
    from transformers import LlamaForCausalLM

    made = export.build("llama-tiny", 0).module
    plain = LlamaForCausalLM(made.config)
    plain.load_state_dict(made.state_dict())
    return plain


def adapters(model) -> dict[str, torch.Tensor]:
    """The trainable parameters by the names that PEFT saves them under."""
    return {
        name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad
    }


def randomise(model, seed: int, std: float = 0.1) -> None:
    """Draws both factors of every adapter: B is 0 at first, and then an adapter does nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(adapters(model).items()):
            p.copy_(torch.randn(p.shape, generator=generator) * std)


def next_token_loss(logits, ids):
    """Cross entropy of each next token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def logits_of(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def snapshot(prefix: str, tensors) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": t.detach().clone().contiguous() for name, t in tensors.items()}


def compare(name: str, found, expected, plain) -> None:
    """Outputs are those expected, and not those without the adapter."""
    error = ((found - expected).norm() / expected.norm()).item()
    effect = ((expected - plain).norm() / expected.norm()).item()
    assert error <= 1e-5, f"{name}: output differs by {error:.1e} (effect {effect:.2f})"
    assert effect > 1e-2, f"{name}: the adapter changes the output by {effect:.1e} only"
    print(f"{name}: outputs differ by {error:.1e} (effect {effect:.2f})")
