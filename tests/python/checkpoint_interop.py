"""PEFT's and transformers' side of checkpoint/interop.rs.

load DIR     loads the checkpoint that Rust wrote into PEFT, and compares outputs
trainer DIR  trains with transformers' Trainer, and leaves its checkpoint
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 40)
        self.down = nn.Linear(40, 8)

    def forward(self, x, labels=None):
        logits = self.down(torch.tanh(self.up(x)))
        if labels is None:
            return logits
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def load(out: Path) -> None:
    net = Net()
    net.load_state_dict(load_file(out / "base.safetensors"))
    model = PeftModel.from_pretrained(net, out / "checkpoint").eval()
    expected = load_file(out / "output.safetensors")
    with torch.no_grad():
        found = model(expected["x"])
    error = (found - expected["y"]).norm() / expected["y"].norm()
    without = (net.down.base_layer(torch.tanh(net.up.base_layer(expected["x"]))) - expected["y"]).norm()
    assert error < 1e-5, f"relative error {error}"
    assert without > 1e-2, "the adapter does nothing"


def trainer(out: Path) -> None:
    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(0)
    net = Net()
    save_file(net.state_dict(), out / "base.safetensors")
    model = get_peft_model(net, LoraConfig(r=2, lora_alpha=4, target_modules=["up", "down"]))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 32, generator=generator)
    data = [{"x": row, "labels": i % 8} for i, row in enumerate(x)]
    arguments = TrainingArguments(
        output_dir=out / "trainer",
        max_steps=3,
        save_steps=3,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=data).train()
    checkpoint = out / "trainer/checkpoint-3"
    assert (checkpoint / "optimizer.pt").exists()
    with torch.no_grad():
        y = model.eval()(x)
    save_file({"x": x, "y": y}, out / "output.safetensors")
    print(json.dumps(sorted(path.name for path in checkpoint.iterdir())))


if __name__ == "__main__":
    {"load": load, "trainer": trainer}[sys.argv[1]](Path(sys.argv[2]))
