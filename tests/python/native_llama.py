"""transformers' and PEFT's side of native_llama.rs.

make DIR    tiny random models, sharded, with their logits, and an adapter made by PEFT
check DIR   loads the adapter that Rust wrote into PEFT, and compares the logits
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

TOLERANCE = 1e-5
TOKENS = (3, 24)

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
SLIDING = ["full_attention", "sliding_attention", "sliding_attention"]
MODELS = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama_long": LlamaConfig(**SIZES, rope_parameters=LLAMA3, head_dim=12),
    "llama_linear": LlamaConfig(**SIZES, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
    "mistral": MistralConfig(**SIZES, sliding_window=7),
    "mistral_full": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2_sliding": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, use_sliding_window=True, sliding_window=6, layer_types=SLIDING),
}
# The model whose adapters are exchanged, and the layers adapted.
EXCHANGED = "llama"
TIED = "qwen2"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def randomise(model: torch.nn.Module) -> None:
    """Norms and biases too, which begin as ones and zeros."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * 0.2
            parameter.copy_(1.0 + noise if "norm" in name else noise)


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens).logits.contiguous()


def make(out: Path) -> None:
    torch.manual_seed(3)
    for name, config in MODELS.items():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomise(model)
        folder = out / name
        model.save_pretrained(folder, max_shard_size="30KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2, "not sharded"
        tokens = torch.randint(0, config.vocab_size, TOKENS)
        record = {"tokens": tokens, "logits": logits(model, tokens)}
        if name == EXCHANGED:
            peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
            with torch.no_grad():
                for key, parameter in peft_model.named_parameters():
                    if "lora_" in key:
                        parameter.normal_(std=0.1)
            record["adapted"] = logits(peft_model, tokens)
            peft_model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        save_file(record, folder / "record.safetensors")
        if name == TIED:
            # One file, which holds the tied values twice.
            twice = out / f"{name}_twice"
            model.config.save_pretrained(twice)
            save_file({key: value.clone() for key, value in model.state_dict().items()}, twice / "model.safetensors")
            save_file(record, twice / "record.safetensors")


def check(out: Path) -> None:
    folder = out / EXCHANGED
    record, ours = load_file(folder / "record.safetensors"), load_file(folder / "ours.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, folder / "ours")
    found, expected = ours["logits"], logits(adapted, record["tokens"])
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < TOLERANCE, f"logits differ by {error}"
    assert (expected - record["logits"]).norm() > 0.05 * record["logits"].norm(), "the adapter does nothing"


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
