"""The files that the commands of the guides name: `docs_files.py DIR`.

Tiny models with random weights under the names of the large ones, in the shapes that the commands give.
"""

import json
import sys
from pathlib import Path

import diffusers
import finetune_diffusion
import finetune_llm
import quant_files
import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn


def make_llm(out: Path) -> None:
    """A folder of Hugging Face's, and texts."""
    torch.manual_seed(0)
    words = finetune_llm.tokenizer()
    config = transformers.Qwen3Config(
        vocab_size=words.get_vocab_size(), hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    model.save_pretrained(out / "Qwen3-0.6B")
    words.save(str(out / "Qwen3-0.6B" / "tokenizer.json"))
    (out / "path" / "to").mkdir(parents=True)
    model.save_pretrained(out / "path" / "to" / "model")
    lines = [{"prompt": f"the {kind} cat", "completion": "sees a river ."} for kind in ["red", "blue", "old", "new"] * 5]
    (out / "notes.jsonl").write_text("\n".join(map(json.dumps, lines)))


def make_diffusion(out: Path) -> None:
    """A pipeline of SD3 as wide as the large one where it shows, images with captions, an adapter of SimpleTuner's."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=2, pos_embed_max_size=96,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=4096, caption_projection_dim=32,
        pooled_projection_dim=2048,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        sample_size=512, block_out_channels=(4,) * 4, latent_channels=16, layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=1.5305, shift_factor=0.0609, mid_block_add_attention=False,
    )  # fmt: skip
    vocabulary = len(finetune_diffusion.WORDS) + 3
    t5 = transformers.T5Config(vocab_size=vocabulary, d_model=4096, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    tokens = finetune_diffusion.words()
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=finetune_diffusion.clip(768), tokenizer=tokens,
        text_encoder_2=finetune_diffusion.clip(1280), tokenizer_2=tokens,
        text_encoder_3=transformers.T5EncoderModel(t5), tokenizer_3=tokens,
    )  # fmt: skip
    pipeline.save_pretrained(out / "sd3")
    (out / "photos").mkdir()
    for n in range(4):
        finetune_diffusion.picture(n, 24 + n, 20).save(out / "photos" / f"{n}.png")
        (out / "photos" / f"{n}.txt").write_text("a red square")

    transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    diffusers.StableDiffusion3Pipeline.save_lora_weights(
        out / "simpletuner" / "checkpoint-500",
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )


class Net(nn.Module):
    """The module whose weight quant_files.py packs as GPTQ does."""

    def __init__(self):
        super().__init__()
        self.a = nn.ModuleDict({"fc": nn.Linear(128, 48)})

    def forward(self, x):
        return self.a["fc"](x)


def make_small(out: Path) -> None:
    """A module, adapters of it in two layouts, and a quantised file."""
    torch.jit.trace(Net(), torch.zeros(1, 128)).save(out / "model.pt")
    get_peft_model(Net(), LoraConfig(r=4, target_modules=["fc"])).save_pretrained(out / "adapter")
    plain = load_file(out / "adapter" / "adapter_model.safetensors")
    a, b = (plain[f"base_model.model.a.fc.lora_{side}.weight"] for side in "AB")
    stem = "lora_unet_a_fc"
    kohya = {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(8.0)}
    save_file(kohya, out / "kohya.safetensors")
    quant_files.write_gptq(out)
    (out / "gptq").rename(out / "gptq-folder")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    make_llm(folder)
    make_diffusion(folder)
    make_small(folder)
