"""diffusers' and PEFT's side of formats.rs.

make DIR    tiny diffusion models as TorchScript, adapters in every layout, and what diffusers computes with them
check DIR   loads the files that Rust wrote into diffusers and PEFT, and compares outputs
"""

import json
import sys
import warnings
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import lora_conversion_utils
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from mirror import randomise
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

diffusers.utils.logging.set_verbosity_error()
transformers.logging.set_verbosity_error()

TOLERANCE = 1e-5
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
WEIGHTS = "pytorch_lora_weights.safetensors"


class UNet(UNet2DConditionModel):
    """The class itself with one tensor for an answer, so that parameters keep their names."""

    def forward(self, sample, timestep, encoder_hidden_states, **kwargs):
        return super().forward(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class Dit(SD3Transformer2DModel):
    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, **kwargs):
        inputs = (hidden_states, encoder_hidden_states, pooled_projections, timestep)
        return super().forward(*inputs, return_dict=False)[0]


class Clip(transformers.CLIPTextModel):
    def forward(self, input_ids, **kwargs):
        return super().forward(input_ids=input_ids).last_hidden_state


def unet() -> UNet:
    torch.manual_seed(1)
    return UNet(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def dit() -> Dit:
    torch.manual_seed(2)
    return Dit(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=16, pooled_projection_dim=24,
    ).eval()  # fmt: skip


def clip() -> Clip:
    torch.manual_seed(3)
    config = transformers.CLIPTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, attn_implementation="eager", initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return Clip(config).eval()


class SdxlUNet(UNet2DConditionModel):
    def forward(self, sample, timestep, encoder_hidden_states, text_embeds, time_ids, **kwargs):
        conditions = {"text_embeds": text_embeds, "time_ids": time_ids}
        inputs = (sample, timestep, encoder_hidden_states)
        return super().forward(*inputs, added_cond_kwargs=conditions, return_dict=False)[0]


def sdxl() -> SdxlUNet:
    """With the blocks of SDXL, so that its modules have the same names."""
    torch.manual_seed(6)
    return SdxlUNet(
        sample_size=8, block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=16, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32,
    ).eval()  # fmt: skip


class FluxDit(FluxTransformer2DModel):
    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, **kwargs):
        inputs = (hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids)
        return super().forward(*inputs, return_dict=False)[0]


def flux() -> FluxDit:
    torch.manual_seed(7)
    return FluxDit(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4), guidance_embeds=False,
    ).eval()  # fmt: skip


class Wrapped(nn.Module):
    """The same transformer under other names."""

    def __init__(self):
        super().__init__()
        self.net = dit()

    def forward(self, *inputs):
        return self.net(*inputs)


MODELS = {"unet": unet, "dit": dit, "clip": clip, "sdxl": sdxl, "flux": flux}


def inputs() -> dict[str, tuple]:
    generator = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return {
        "unet": (draw(2, 4, 8, 8), torch.tensor([10, 600]), draw(2, 5, 16)),
        "dit": (draw(2, 4, 8, 8), draw(2, 5, 16), draw(2, 24), torch.tensor([10, 600])),
        "clip": (torch.randint(2, 40, (2, 7), generator=generator),),
        "flux": (
            draw(2, 6, 4), draw(2, 5, 12), draw(2, 10), torch.tensor([0.1, 0.6]), draw(6, 3).round(), torch.zeros(5, 3),
        ),
        "sdxl": (draw(2, 4, 8, 8), torch.tensor([10, 600]), draw(2, 5, 16), draw(2, 8), draw(2, 6)),
    }


def sd(unet: UNet, text_encoder=None) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        unet=unet, text_encoder=text_encoder, vae=None, tokenizer=None, scheduler=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sd3(transformer: Dit) -> StableDiffusion3Pipeline:
    parts = ["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]
    return StableDiffusion3Pipeline(transformer=transformer, scheduler=None, **dict.fromkeys(parts))


def adapted(model: nn.Module, seed: int, **settings) -> dict[str, torch.Tensor]:
    """Puts a LoRA with random factors on the model, and answers its tensors by PEFT's keys without prefix."""
    inject_adapter_in_model(LoraConfig(**settings), model)
    randomise(model, seed, std=0.2)
    return get_peft_model_state_dict(model, adapter_name="default")


def record(model: nn.Module) -> dict:
    """Its `LoraConfig` as trainers hand it to diffusers."""
    return model.peft_config["default"].to_dict()


def make(out: Path) -> None:
    given = inputs()
    answers = {}
    trace(Wrapped().eval(), given["dit"], out / "wrapped")
    for name, build in MODELS.items():
        model = build()
        trace(model, given[name], out / name)
        answers |= {f"{name}.input.{i}": x for i, x in enumerate(given[name])}
        answers[name] = model(*given[name])

    def answer(case: str, **models) -> None:
        for name, model in models.items():
            answers[f"{case}.{name}"] = model(*given[name])

    make_diffusers(out, answer)
    make_old(out, answer)
    make_kohya(out, answer)
    make_sdxl(out, answer)
    make_flux(out, answer)
    make_comfyui(out, answer)
    make_quantised(out, answer)
    save_file({name: x.detach().contiguous() for name, x in answers.items()}, out / "answers.safetensors")


def trace(model: nn.Module, inputs: tuple, folder: Path) -> None:
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, inputs, check_trace=False).save(folder / "model.pt")


def make_diffusers(out: Path, answer) -> None:
    mixed = dict(
        r=4, lora_alpha=10, target_modules=ATTENTION,
        rank_pattern={"transformer_blocks.0.attn.to_q": 2, "to_out.0": 3},
        alpha_pattern={"transformer_blocks.1.attn.to_v": 3},
    )  # fmt: skip
    for case, settings in {
        "metadata": mixed,
        "rslora": dict(r=4, lora_alpha=10, target_modules=ATTENTION, use_rslora=True),
        "dora": dict(r=4, lora_alpha=10, target_modules=ATTENTION, use_dora=True),
        "lora_bias": dict(r=2, lora_alpha=3, target_modules=["ff.net.0.proj", "proj_out"], lora_bias=True),
    }.items():
        model = dit()
        layers = adapted(model, 11, **settings)
        StableDiffusion3Pipeline.save_lora_weights(
            out / case, transformer_lora_layers=layers, transformer_lora_adapter_metadata=record(model)
        )
        answer(case, dit=model)
        fresh = dit()
        sd3(fresh).load_lora_weights(out / case)
        assert torch.allclose(fresh(*inputs()["dit"]), model(*inputs()["dit"]), atol=1e-5), case

    # The same in PEFT's folder.
    model = get_peft_model(dit(), LoraConfig(**mixed))
    randomise(model, 11, std=0.2)
    model.save_pretrained(out / "peft")
    answer("peft", dit=model.base_model.model)

    # SimpleTuner reads what diffusers wrote and writes it again with more metadata.
    (out / "simpletuner").mkdir()
    with safe_open(out / "metadata" / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    metadata |= {"modelspec.architecture": "stable-diffusion-3", "global_step": "500", "trained_words": '["x"]'}
    save_file(load_file(out / "metadata" / WEIGHTS), out / "simpletuner" / WEIGHTS, metadata=metadata)
    (out / "simpletuner" / "training_state.json").write_text('{"global_step": 500}')

    # Broken ones: a module lost, and a configuration of another rank.
    tensors = load_file(out / "metadata" / WEIGHTS)
    lost = {key: x for key, x in tensors.items() if "transformer_blocks.1.attn.to_k" not in key}
    save_file(lost, out / "lost.safetensors", metadata=metadata)
    other = metadata["lora_adapter_metadata"].replace('"transformer.r": 4', '"transformer.r": 8')
    save_file(tensors, out / "other_rank.safetensors", metadata={"lora_adapter_metadata": other})

    # Without metadata every alpha is the rank.
    model = dit()
    StableDiffusion3Pipeline.save_lora_weights(out / "plain", transformer_lora_layers=adapted(model, 11, **mixed))
    fresh = dit()
    sd3(fresh).load_lora_weights(out / "plain")
    answer("plain", dit=fresh)

    # A model by itself: no component in the keys.
    model = dit()
    adapted(model, 12, r=3, lora_alpha=2, target_modules=[*ATTENTION, "proj_out"])
    model._hf_peft_config_loaded = True
    model.save_lora_adapter(out / "bare")
    answer("bare", dit=model)

    # Two components in a file.
    model, text = unet(), clip()
    layers = adapted(model, 13, r=4, lora_alpha=6, target_modules=[*ATTENTION, "conv1", "proj_in", "ff.net.2"])
    texts = adapted(text, 14, r=2, lora_alpha=5, target_modules=["q_proj", "out_proj", "fc1"])
    StableDiffusionPipeline.save_lora_weights(
        out / "two", unet_lora_layers=layers, text_encoder_lora_layers=texts,
        unet_lora_adapter_metadata=record(model), text_encoder_lora_adapter_metadata=record(text),
    )  # fmt: skip
    answer("two", unet=model, clip=text)


def loaded(case: str, path: Path, answer) -> None:
    """What diffusers makes of a file with the UNet and the text encoder."""
    model, text = unet(), clip()
    sd(model, text).load_lora_weights(path)
    for module in (model, text):
        assert adapters_of(module), f"{case}: diffusers loaded nothing"
    answer(case, unet=model, clip=text)


def adapters_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if "lora_" in name]


def make_old(out: Path, answer) -> None:
    layers = adapted(unet(), 15, r=4, lora_alpha=4, target_modules=ATTENTION)
    texts = adapted(clip(), 16, r=2, lora_alpha=2, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])

    # As diffusers' own training scripts convert them.
    StableDiffusionPipeline.save_lora_weights(
        out / "old",
        unet_lora_layers=convert_state_dict_to_diffusers(layers),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(texts),
    )
    keys = load_file(out / "old" / WEIGHTS)
    assert any(".to_q.lora.down.weight" in key for key in keys), keys.keys()
    assert any(".q_proj.lora_linear_layer.up.weight" in key for key in keys), keys.keys()
    loaded("old", out / "old", answer)

    # Attention processors, in the UNet and, patched in, in the text encoder.
    names = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
    names |= {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

    def processor(key: str, prefix: str, level: str) -> str:
        path, half = key.removesuffix(".weight").rsplit(".lora_", 1)
        end = next(name for name in sorted(names, key=len, reverse=True) if path.endswith(f".{name}"))
        head = path.removesuffix(end)
        return f"{prefix}.{head}{level}{names[end]}_lora.{'down' if half == 'A' else 'up'}.weight"

    tensors = {processor(key, "unet", "processor."): x for key, x in layers.items()}
    tensors |= {processor(key, "text_encoder.text_model", ""): x for key, x in texts.items()}
    save_file(tensors, out / "processors.safetensors")
    loaded("processors", out / "processors.safetensors", answer)


def make_kohya(out: Path, answer) -> None:
    targets = [*ATTENTION, "proj_in", "proj_out", "conv1", "conv2", "time_emb_proj", "conv_shortcut", "ff.net.0.proj"]
    alphas = {"to_q": 1.0, "conv1": 3.0, "to_out.0": 0.3}
    given = dict(r=4, lora_alpha=6, target_modules=targets, rank_pattern={"conv1": 2, "to_v": 3}, alpha_pattern=alphas)
    model, text = unet(), clip()
    layers = adapted(model, 17, **given)
    texts = adapted(text, 18, r=2, lora_alpha=0.5, target_modules=["q_proj", "out_proj", "fc1", "fc2"])
    tensors = {f"unet.{key}": x for key, x in layers.items()}
    tensors |= {f"text_encoder.text_model.{key}": x for key, x in texts.items()}
    tensors = convert_state_dict_to_kohya(tensors)
    for key in [key for key in tensors if key.endswith(".alpha")]:
        tensors[key] = torch.tensor(0.5 if key.startswith("lora_te") else 6.0)
    save_file(tensors, out / "kohya.safetensors")
    loaded("kohya", out / "kohya.safetensors", answer)

    # diffusers gives attention layers the most common alpha: PEFT is the reference for other ones.
    for end, alpha in alphas.items():
        for key in [key for key in tensors if key.endswith(f"_{end.replace('.', '_')}.alpha")]:
            tensors[key] = torch.tensor(alpha)
    save_file(tensors, out / "kohya_mixed.safetensors")
    answer("kohya_mixed", unet=model, clip=text)
    merged = unet()
    merge(merged, out / "kohya_mixed.safetensors", "lora_unet_", "lora_down.weight", "lora_up.weight")
    assert torch.allclose(merged(*inputs()["unet"]), model(*inputs()["unet"]), atol=1e-5)


# Names as kohya's trainer writes them for SDXL, and the modules that they are in diffusers.
SDXL_NAMES = {
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_emb_layers_1": "down_blocks.0.resnets.1.time_emb_proj",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks_8_1_transformer_blocks_0_ff_net_2": "down_blocks.2.attentions.1.transformer_blocks.0.ff.net.2",
    "middle_block_0_out_layers_3": "mid_block.resnets.0.conv2",
    "middle_block_1_transformer_blocks_0_attn2_to_k": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
    "output_blocks_0_1_transformer_blocks_0_attn2_to_out_0": "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_1_transformer_blocks_0_attn1_to_v": "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_v",
    "output_blocks_8_0_in_layers_2": "up_blocks.2.resnets.2.conv1",
}  # fmt: skip


def make_sdxl(out: Path, answer) -> None:
    """Names counted through, which diffusers maps by the UNet's configuration."""
    layers = adapted(sdxl(), 20, r=2, lora_alpha=2, target_modules=list(SDXL_NAMES.values()))
    tensors = {}
    for name, path in SDXL_NAMES.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = layers[f"{path}.lora_A.weight"]
        tensors[f"lora_unet_{name}.lora_up.weight"] = layers[f"{path}.lora_B.weight"]
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(3.0)
    save_file(tensors, out / "sdxl.safetensors")
    model = sdxl()
    parts = dict.fromkeys(["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"])
    StableDiffusionXLPipeline(unet=model, **parts).load_lora_weights(out / "sdxl.safetensors")
    assert len(adapters_of(model)) == 2 * len(SDXL_NAMES)
    answer("sdxl", sdxl=model)


FUSED = {
    "img_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn_proj": ["attn.to_out.0"],
    "txt_mlp_2": ["ff_context.net.2"],
    "img_mod_lin": ["norm1.linear"],
}


OTHERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}


def make_flux(out: Path, answer) -> None:
    """Fused layers, which diffusers splits."""
    generator = torch.Generator().manual_seed(21)
    draw = lambda *shape: torch.randn(shape, generator=generator) * 0.2  # noqa: E731
    tensors = {}
    for block in range(2):
        for name, ends in FUSED.items():
            layers = [flux().get_submodule(f"transformer_blocks.{block}.{end}") for end in ends]
            key = f"lora_unet_double_blocks_{block}_{name}"
            tensors[f"{key}.lora_down.weight"] = draw(3, layers[0].in_features)
            tensors[f"{key}.lora_up.weight"] = draw(sum(layer.out_features for layer in layers), 3)
            tensors[f"{key}.alpha"] = torch.tensor(1.5 + block)
        single = flux().single_transformer_blocks[block]
        key = f"lora_unet_single_blocks_{block}_linear2"
        tensors[f"{key}.lora_down.weight"] = draw(4, single.proj_out.in_features)
        tensors[f"{key}.lora_up.weight"] = draw(single.proj_out.out_features, 4)
    save_file(tensors, out / "flux.safetensors")
    model = flux()
    parts = ["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"]
    FluxPipeline(transformer=model, **dict.fromkeys(parts)).load_lora_weights(out / "flux.safetensors")
    assert len(adapters_of(model)) == 2 * (2 * sum(map(len, FUSED.values())) + 2)
    answer("flux", flux=model)

    # By the sum itself: single blocks, whose sizes diffusers has fixed, and the layers around the blocks, whose
    # keys it converts without their component, and then leaves out.
    a, b = draw(2, 16), draw(3 * 16 + 64, 2)
    key = "diffusion_model.single_blocks.1.linear1"
    file = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b, f"{key}.alpha": torch.tensor(5.0)}
    model = flux()
    for name, path in OTHERS.items():
        layer = model.get_submodule(path)
        down, up = draw(2, layer.in_features), draw(layer.out_features, 2)
        file |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
        layer.weight += up @ down
    save_file(file, out / "flux_single.safetensors")
    block = model.single_transformer_blocks[1]
    layers = [block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp]
    for layer, delta in zip(layers, (5.0 / 2 * b @ a).split([16, 16, 16, 64]), strict=True):
        layer.weight += delta
    answer("flux_single", flux=model)


def merge(model: nn.Module, path: Path, prefix: str, down: str, up: str) -> None:
    """Adds alpha / rank * up * down to each weight, as loaders without PEFT do."""
    tensors = load_file(path)
    used = 0
    for name, module in model.named_modules():
        stem = prefix + name.replace(".", "_")
        if f"{stem}.{down}" not in tensors:
            continue
        a, b, alpha = (tensors[f"{stem}.{end}"] for end in (down, up, "alpha"))
        delta = (b.flatten(1) @ a.flatten(1)).reshape(module.weight.shape)
        module.weight += alpha.item() / a.shape[0] * delta
        used += 3
    assert used == sum(key.startswith(prefix) for key in tensors), f"{used} of {len(tensors)}"


def make_comfyui(out: Path, answer) -> None:
    layers = adapted(dit(), 19, r=4, lora_alpha=4, target_modules=[*ATTENTION, "proj_out"])
    tensors = {f"diffusion_model.{key}": x.contiguous() for key, x in layers.items()}
    for index, key in enumerate(sorted(key for key in layers if key.endswith("lora_A.weight"))):
        # An absent alpha is the rank.
        if index % 3:
            tensors[f"diffusion_model.{key.removesuffix('lora_A.weight')}alpha"] = torch.tensor([8.0, 0.7][index % 2])
    save_file(tensors, out / "comfyui.safetensors")
    answer("comfyui", dit=from_comfyui(out / "comfyui.safetensors"))


def from_comfyui(path: Path) -> Dit:
    """By the converter of diffusers that reads these keys with alphas."""
    layers = lora_conversion_utils._convert_non_diffusers_qwen_lora_to_diffusers(load_file(path))
    model = dit()
    model.load_lora_adapter(layers, prefix="transformer")
    assert adapters_of(model)
    return model


def make_quantised(out: Path, answer) -> None:
    """SimpleTuner's order: quantise with quanto, then load the adapter."""
    from optimum import quanto

    model = dit()
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    answer("quantised_base", dit=model)
    sd3(model).load_lora_weights(out / "simpletuner")
    answer("quantised", dit=model)


def check(out: Path) -> None:
    given = inputs()
    for folder in sorted((out / "from_rust").iterdir()):
        layout, name = folder.name.split(".")[:2]
        expected = load_file(folder / "output.safetensors")["output"]
        plain = MODELS[name]()(*given[name])
        (file,) = [path for path in folder.iterdir() if path.name != "output.safetensors"]
        model = read(layout, name, file)
        compare(folder.name, model(*given[name]), expected, plain)
        if layout == "diffusers" and name == "dit":
            recorded(folder.name, file, model)


def read(layout: str, name: str, file: Path) -> nn.Module:
    if layout == "comfyui":
        return from_comfyui(file)
    model = MODELS[name]()
    if layout == "kohya_mixed":
        merge(model, file, {"unet": "lora_unet_", "clip": "lora_te1_text_model_"}[name], "lora_down.weight", "lora_up.weight")
        return model
    if layout == "peft":
        return PeftModel.from_pretrained(model, file).eval().base_model.model
    if layout == "bare":
        # By default it takes the file for a pickle and loses the metadata.
        model.load_lora_adapter(file, prefix=None, use_safetensors=True)
    elif layout == "joined":
        parts = {"unet": unet(), "clip": clip()} | {name: model}
        sd(parts["unet"], parts["clip"]).load_lora_weights(file)
    elif name == "dit":
        sd3(model).load_lora_weights(file)
    elif name == "clip":
        sd(unet(), model).load_lora_weights(file)
    else:
        sd(model).load_lora_weights(file)
    assert adapters_of(model), f"{layout}.{name}: diffusers loaded nothing"
    return model


def recorded(name: str, file: Path, model: nn.Module) -> None:
    """diffusers read the configuration that Rust wrote, not one guessed from shapes."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt", metadata
    found = json.loads(metadata["lora_adapter_metadata"])
    assert metadata["lora_adapter_metadata"] == json.dumps(found, indent=2, sort_keys=True), name
    (config,) = model.peft_config.values()
    assert found["transformer.lora_alpha"] == config.lora_alpha and found["transformer.r"] == config.r, name


def compare(name: str, found, expected, plain) -> None:
    error = ((found - expected).norm() / expected.norm()).item()
    effect = ((expected - plain).norm() / expected.norm()).item()
    assert error <= TOLERANCE, f"{name}: output differs by {error:.1e} (effect {effect:.2f})"
    assert effect > 1e-2, f"{name}: the adapter changes the output by {effect:.1e} only"
    print(f"{name}: outputs differ by {error:.1e} (effect {effect:.2f})")


if __name__ == "__main__":
    torch.set_num_threads(2)
    with torch.no_grad():
        {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
