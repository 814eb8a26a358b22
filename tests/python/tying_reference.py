"""PEFT's side of tying.rs: a tiny Llama whose output layer shares the table of its embedding.

tying_reference.py make DIR     writes, for each case,
    DIR/model.pt                      the base as a TorchScript module
    DIR/<case>/adapter/               the adapter to start from, its tensors random
    DIR/<case>/trained/               after a few steps of gradient descent
    DIR/<case>/record.safetensors     ids, labels, outputs before and after, and of the merged model
tying_reference.py check DIR    loads DIR/<case>/ours, written by the test, and compares outputs.
"""

import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from mirror import adapters, export
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

STEPS, LR = 3, 0.05
BOTH = dict(ensure_weight_tying=True)
CASES = {
    "embedding": dict(target_modules=["embed_tokens", "q_proj"]) | BOTH,
    "head": dict(target_modules=["lm_head"]) | BOTH,
    "each": dict(target_modules=["embed_tokens", "lm_head", "q_proj"], lora_dropout=0.3) | BOTH,
    "expression": dict(target_modules=".*embed_tokens") | BOTH,
    "saved_embedding": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]) | BOTH,
    "saved_head": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]) | BOTH,
    "tokens": dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 5], "lm_head": [1, 5]}),
    "untied_embedding": dict(target_modules=["embed_tokens"]),
    "untied_head": dict(target_modules=["lm_head"]),
    "untied_each": dict(target_modules=["embed_tokens", "lm_head"]),
    "untied_saved_embedding": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "untied_saved_head": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head

    def forward(self, ids):
        return self.lm_head(self.model(ids).last_hidden_state)


def factors(model) -> dict[str, torch.Tensor]:
    """Of what is tied, PEFT has a parameter for each use, in one memory."""
    return adapters(model)


def make(case: str, out: Path) -> None:
    folder = out / case
    folder.mkdir()
    model = get_peft_model(llama(), LoraConfig(r=3, lora_alpha=6, **CASES[case]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(factors(model).items()):
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    ids = torch.randint(0, 23, (2, 6), generator=generator)
    labels = torch.randint(0, 23, (2, 6), generator=generator)
    with torch.no_grad():
        record = {"ids": ids, "labels": labels, "before": model.eval()(ids).logits}
    for step in range(STEPS):
        # In evaluation, which has no dropout.
        loss = F.cross_entropy(model.eval()(ids).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        with torch.no_grad():
            for p in factors(model).values():
                p -= LR * p.grad
                p.grad = None
    model.save_pretrained(folder / "trained", save_embedding_layers=False)
    with torch.no_grad():
        record["after"] = model(ids).logits
    save_file({name: t.detach().clone().contiguous() for name, t in record.items()}, folder / "record.safetensors")


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out = Path(sys.argv[2])
    if sys.argv[1] == "check":
        for case in CASES:
            record = load_file(out / case / "record.safetensors")
            model = PeftModel.from_pretrained(llama(), out / case / "ours")
            with torch.no_grad():
                output = model.eval()(record["ids"]).logits
            error = float((output - record["after"]).norm() / record["after"].norm())
            assert error < 1e-5, f"{case}: {error}"
        return
    made = export.Export(Logits(llama()), "trace", [export.Input("ids", "<23", ("batch", "length"))], {})
    exported, _, portable = export.to_torchscript(made, batch=2, length=6)
    assert portable
    exported.save(str(out / "model.pt"))
    for case in CASES:
        make(case, out)


if __name__ == "__main__":
    main()
