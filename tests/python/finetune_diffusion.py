"""diffusers' and PEFT's side of finetune_diffusion.rs.

make DIR    tiny transformers and a VAE as exports, images with captions, a pipeline that encodes them, adapters
follow DIR  trains each DIR/runs/* in diffusers and PEFT on the same noise, and compares losses and what was saved
"""

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers.optimization import get_cosine_schedule_with_warmup
from mirror import export, randomise
from optimum import quanto
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

diffusers.utils.logging.set_verbosity_error()
transformers.logging.set_verbosity_error()

FAMILIES = ["sd3", "flux", "sana", "aura-flow"]
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
WEIGHTS = "pytorch_lora_weights.safetensors"
WORDS = "a red blue green square on grey ground".split()
SIZE = 16
# What the program leaves dense.
DENSE = ["*norm*", "*embed*", "*proj_out*", "*time_*", "*caption_*"]


def transformer(family: str) -> nn.Module:
    """The class as diffusers has it, with the weights of the export."""
    module = export.build(f"{family}-tiny").module
    module.__class__ = export.library_class(export.TINY[f"{family}-tiny"][0])
    return module


# --- Images, captions, adapters ---------------------------------------------------------------------------------------


def picture(n: int, height: int, width: int) -> Image.Image:
    """A square on a ground that is not even."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([90 + 5 * x, 90 + 5 * y, 60 + 12 * n + 0 * x], -1)
    pixels[height // 4 : height // 2, width // 3 : 2 * width // 3, n % 3] = 250
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_images(out: Path) -> None:
    (out / "images").mkdir()
    (out / "mixed").mkdir()
    sizes = {1: (24, 20), 4: (13, 29)}
    for n in range(6):
        image = picture(n, *sizes.get(n, (SIZE, SIZE)))
        image.save(out / "images" / f"{'fbdace'[n]}.png")
        (out / "images" / f"{'fbdace'[n]}.txt").write_text(f"a {WORDS[1 + n % 3]} square on grey ground\n")
    picture(7, 40, 56).save(out / "mixed" / "photo.JPG", quality=95)
    picture(8, SIZE, SIZE).convert("RGBA").save(out / "mixed" / "layer.png")
    (out / "mixed" / "notes.txt").write_text("no image")


def decoded(path: Path) -> torch.Tensor:
    """An image as (3, SIZE, SIZE), scaled to cover and cut in the middle."""
    image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255
    scale = max(SIZE / image.shape[1], SIZE / image.shape[2])
    sizes = [max(SIZE, round(size * scale)) for size in image.shape[1:]]
    image = F.interpolate(image[None], sizes, mode="bicubic", antialias=True)[0].clamp(0, 1)
    top, left = [(size - SIZE) // 2 for size in sizes]
    return image[:, top : top + SIZE, left : left + SIZE] * 2 - 1


def make_latents(out: Path) -> None:
    """What diffusers' own classes make of each image."""
    for name in ("vae", "dc-vae"):
        export.export(f"{name}-tiny", out / name)
        kind, settings, _ = export.TINY[f"{name}-tiny"]
        plain = export.library_class(kind)(**settings).eval()
        plain.load_state_dict(export.build(f"{name}-tiny").module.state_dict(), strict=False)
        for folder in ("images", "mixed"):
            paths = [path for path in sorted((out / folder).iterdir()) if path.suffix != ".txt"]
            with torch.no_grad():
                latents = {path.stem: encoded(plain, decoded(path)[None])[0].contiguous() for path in paths}
            save_file(latents, out / f"{folder}.{name}.safetensors")


def encoded(vae: nn.Module, image: torch.Tensor) -> torch.Tensor:
    if isinstance(vae, diffusers.AutoencoderDC):
        return vae.encode(image).latent * vae.config.scaling_factor
    return (vae.encode(image).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor


def words() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: n for n, word in enumerate(["<pad>", "<unk>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8, **special)


def clip(width: int) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS) + 3, hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=width, bos_token_id=2, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    return transformers.CLIPTextModelWithProjection(config)


def make_embeds(out: Path) -> None:
    """A pipeline of SD3 with all its parts, what it makes of the captions, and what python/embed.py does."""
    torch.manual_seed(4)
    config = transformers.T5Config(vocab_size=len(WORDS) + 3, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer("sd3"), vae=diffusers.AutoencoderKL(**dict(export.TINY["vae-tiny"][1])),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip(8), tokenizer=words(), text_encoder_2=clip(12), tokenizer_2=words(),
        text_encoder_3=transformers.T5EncoderModel(config), tokenizer_3=words(),
    )  # fmt: skip
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        encoder.eval()
    pipeline.save_pretrained(out / "pipeline")
    script = Path(export.__file__).with_name("embed.py")
    embeds = out / "embeds.safetensors"
    given = [f"--from={out / 'pipeline'}", f"--images={out / 'images'}", f"--out={embeds}", "--length=4"]
    subprocess.run([sys.executable, script, *given], check=True, stdout=subprocess.DEVNULL)
    found = load_file(embeds)
    assert len(found) == 12, sorted(found)
    for path in (out / "images").glob("*.txt"):
        with torch.no_grad():
            states, _, pooled, _ = pipeline.encode_prompt(path.read_text().strip(), None, None, max_sequence_length=4)
        # Some processors' sums depend on where in memory the weights lie.
        torch.testing.assert_close(found[f"{path.stem}.encoder_hidden_states"], states[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[f"{path.stem}.pooled_projections"], pooled[0], rtol=1e-5, atol=1e-5)
    assert not torch.equal(found["a.pooled_projections"], found["b.pooled_projections"])
    missing = subprocess.run([sys.executable, script, *given[:1], f"--images={out / 'mixed'}", given[2]], stderr=-1)
    assert missing.returncode and b"no layer.txt" in missing.stderr, missing.stderr


def make(out: Path) -> None:
    for family in FAMILIES:
        export.export(f"{family}-tiny", out / family, length=12)
        model = transformer(family)
        model.add_adapter(LoraConfig(r=4, lora_alpha=10, target_modules=TARGETS))
        randomise(model, seed=3, std=0.2)
        # As diffusers' training scripts and SimpleTuner save it.
        diffusers.StableDiffusion3Pipeline.save_lora_weights(
            out / f"{family}-start",
            transformer_lora_layers=get_peft_model_state_dict(model),
            transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        )
    make_images(out)
    make_latents(out)
    make_embeds(out)


# --- Training ---------------------------------------------------------------------------------------------------------


def velocity(model: nn.Module, noisy: torch.Tensor, sigmas: torch.Tensor, states, pooled) -> torch.Tensor:
    """As the pipelines of each family call their transformers, at the timesteps of the scheduler."""
    kind, timestep = type(model).__name__, sigmas * 1000
    noisy, states, pooled = (tensor.to(model.dtype) for tensor in (noisy, states, pooled))
    given = dict(encoder_hidden_states=states, return_dict=False)
    if kind.startswith("SD3"):
        return model(noisy, pooled_projections=pooled, timestep=timestep, **given)[0]
    if kind.startswith("Sana"):
        return model(noisy, timestep=timestep, **given)[0]
    if kind.startswith("AuraFlow"):
        return model(noisy, timestep=timestep / 1000, **given)[0]
    batch, channels, height, width = noisy.shape
    pipeline = diffusers.FluxPipeline
    answer = model(
        pipeline._pack_latents(noisy, batch, channels, height, width),
        pooled_projections=pooled,
        timestep=timestep / 1000,
        img_ids=pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", noisy.dtype),
        txt_ids=torch.zeros(states.shape[1], 3),
        guidance=torch.full([batch], 3.5),
        **given,
    )[0]
    return pipeline._unpack_latents(answer, height * 8, width * 8, 8)


def base(run: dict) -> nn.Module:
    model = transformer(run["family"]).to(getattr(torch, run["dtype"]))
    if run["scheme"] == "int8":
        quanto.quantize(model, weights=quanto.qint8, exclude=DENSE)
        quanto.freeze(model)
    return model.requires_grad_(False)


def adapted(run: dict, file: Path) -> nn.Module:
    model = base(run)
    model.load_lora_adapter(file, prefix="transformer", use_safetensors=True)
    for _, p in factors(model):
        p.data = p.data.float()
    return model


def factors(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if "lora_" in name]


def tolerance(run: dict) -> float:
    return 1e-5 if run["dtype"] == "float32" else 2e-2


def follow(out: Path) -> None:
    latents, embeds = load_file(out / "images.vae.safetensors"), load_file(out / "embeds.safetensors")
    names = sorted(latents)
    for folder in sorted((out / "runs").iterdir()):
        run, draws = json.loads((folder / "run.json").read_text()), load_file(folder / "draws.safetensors")
        model = adapted(run, out / f"{run['family']}-start" / WEIGHTS).train()
        parameters = [p.requires_grad_(True) for _, p in factors(model)]
        optimizer = torch.optim.AdamW(parameters, lr=run["lr"])
        schedule = get_cosine_schedule_with_warmup(optimizer, run["steps"] // 20, run["steps"])
        rows = (folder / "metrics.csv").read_text().splitlines()[1:]
        assert len(rows) == run["steps"]
        worst, losses = 0.0, []
        for step, row in enumerate(rows):
            batch = [names[n] for n in draws[f"{step}.rows"].tolist()]
            sigmas = draws[f"{step}.level"]
            if run["sigmas"] == "logit-normal":
                sigmas = torch.sigmoid(sigmas)
            sigmas = run["shift"] * sigmas / (1 + (run["shift"] - 1) * sigmas)
            clean, noise = torch.stack([latents[name] for name in batch]), draws[f"{step}.noise"]
            at = sigmas.view(-1, 1, 1, 1)
            states = torch.stack([embeds[f"{name}.encoder_hidden_states"] for name in batch])
            pooled = torch.stack([embeds[f"{name}.pooled_projections"] for name in batch])
            found = velocity(model, (1 - at) * clean + at * noise, sigmas, states, pooled)
            loss = F.mse_loss(found.float(), noise - clean)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            worst = max(worst, abs(float(row.split(",")[1]) - losses[-1]) / losses[-1])
        assert worst <= tolerance(run), f"{folder.name}: losses differ by {worst:.1e}"
        check(folder, run, model)
        print(f"{folder.name}: {len(losses)} losses within {worst:.1e}, {losses[0]:.4f} to {losses[-1]:.4f}")


def check(folder: Path, run: dict, trained: nn.Module) -> None:
    """What the program saved, loaded by diffusers."""
    answer = load_file(folder / "answer.safetensors")
    given = [answer[name] for name in ("noisy", "sigmas", "encoder_hidden_states", "pooled_projections")]

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            found = velocity(model.eval(), *given).float()
        return ((found - answer["velocity"]).norm() / answer["velocity"].norm()).item()

    saved, steps = error(adapted(run, folder / WEIGHTS)), error(trained)
    assert saved <= tolerance(run), f"{folder.name}: what was saved differs by {saved:.1e}"
    # Steps of Adam pass roundings on.
    assert steps <= 10 * tolerance(run), f"{folder.name}: what was trained differs by {steps:.1e}"
    start = error(adapted(run, folder.parents[1] / f"{run['family']}-start" / WEIGHTS))
    assert start > 3e-4, f"{folder.name}: nothing was learnt"


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"make": make, "follow": follow}[sys.argv[1]](Path(sys.argv[2]))
