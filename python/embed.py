#!/usr/bin/env python3
"""Encodes the captions of images by the text encoders of a diffusers pipeline, for `finetune_diffusion`.

    python python/embed.py --from path/to/sd3 --images photos --out photos/embeds.safetensors

`--from` takes a folder as `save_pretrained` writes it, of a pipeline of SD3, Flux, Sana or AuraFlow; its transformer
and VAE aren't loaded. Beside each image lies its caption, a `.txt` of the same name; `--prompt` is for images without
one. The file that is written holds for each image and each input of the transformer that depends on the prompt a
tensor `NAME.INPUT`, without batch dimension: `cat.encoder_hidden_states`, `cat.pooled_projections`. They are what the
pipeline itself makes of the prompt.
"""

import argparse
import inspect
from pathlib import Path

import torch
from safetensors.torch import save_file

# What `encode_prompt` answers, in its order, by the transformer's inputs; the rest has other uses.
ANSWERS = {
    "StableDiffusion3Pipeline": ["encoder_hidden_states", None, "pooled_projections"],
    "FluxPipeline": ["encoder_hidden_states", "pooled_projections"],
    "SanaPipeline": ["encoder_hidden_states", "encoder_attention_mask"],
    "AuraFlowPipeline": ["encoder_hidden_states"],
}


def load(folder: Path, dtype: torch.dtype, device: str):
    """The pipeline's text encoders and tokenizers."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, transformer=None, vae=None, dtype=dtype)
    if type(pipeline).__name__ not in ANSWERS:
        raise SystemExit(f"{folder}: a {type(pipeline).__name__}; expected one of {', '.join(ANSWERS)}")
    return pipeline.to(device)


def encode(pipeline, prompt: str, length: int | None) -> dict[str, torch.Tensor]:
    """The inputs that depend on the prompt, with what the pipeline's call has by default."""
    calls = inspect.signature(pipeline.__call__).parameters
    accepted = inspect.signature(pipeline.encode_prompt).parameters
    given = {name: calls[name].default for name in accepted if name in calls}
    given |= {"prompt": prompt, "do_classifier_free_guidance": False}
    if length is not None:
        given["max_sequence_length"] = length
    with torch.no_grad():
        answers = pipeline.encode_prompt(**{name: value for name, value in given.items() if name in accepted})
    names = ANSWERS[type(pipeline).__name__]
    return {name: answer[0].cpu().contiguous() for name, answer in zip(names, answers) if name}


def captions(images: Path, prompt: str | None) -> dict[str, str]:
    """The prompt of each image."""
    found = {}
    for image in sorted(images.iterdir()):
        if image.suffix.lower() in (".png", ".jpg", ".jpeg"):
            text = image.with_suffix(".txt")
            if not text.exists() and prompt is None:
                raise SystemExit(f"{image}: no {text.name} beside it, and no --prompt")
            found[image.stem] = text.read_text().strip() if text.exists() else prompt
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="folder", type=Path, required=True, help="folder of a pipeline")
    parser.add_argument("--images", type=Path, required=True, help="folder of images and captions")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--prompt", help="for images without a caption")
    parser.add_argument("--length", type=int, help="tokens of a prompt (default: the pipeline's max_sequence_length)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    prompts = captions(given.images, given.prompt)
    pipeline = load(given.folder, getattr(torch, given.dtype), given.device)
    tensors = {}
    for image, prompt in prompts.items():
        for name, tensor in encode(pipeline, prompt, given.length).items():
            tensors[f"{image}.{name}"] = tensor
    save_file(tensors, given.out)
    print(f"{given.out}: {len(prompts)} prompts, {len(tensors)} tensors")


if __name__ == "__main__":
    main()
