"""LyCORIS' side of formats_lycoris.rs.

make DIR    a small model as TorchScript, files with LyCORIS' keys, and what the model computes with them
check DIR   loads the files that Rust wrote into PEFT, diffusers and LyCORIS, and compares outputs

Weights are adapted here by each method's own formula. Where LyCORIS is installed, it reads the same files and makes
some of its own.
"""

import importlib.util
import json
import sys
import warnings
from math import prod
from pathlib import Path

import diffusers
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

diffusers.utils.logging.set_verbosity_error()

TOLERANCE = 2e-5
LYCORIS = importlib.util.find_spec("lycoris") is not None


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(24, 36)
        self.ff = nn.Linear(36, 60)

    def forward(self, x):
        return self.ff(torch.tanh(self.to_q(x)))


class Net(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A model of diffusers, with every kind of layer that these adapters are for."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 16, 3, padding=1)
        self.point = nn.Conv2d(16, 24, 1)
        self.blocks = nn.ModuleList([Block()])
        self.time = nn.Conv1d(60, 12, 3)

    def forward(self, x):
        x = self.point(torch.tanh(self.conv_in(x))).flatten(2).transpose(1, 2)
        return self.time(torch.tanh(self.blocks[0](x)).transpose(1, 2))


def net() -> Net:
    torch.manual_seed(1)
    return Net().eval()


LAYERS = ["conv_in", "point", "blocks.0.to_q", "blocks.0.ff", "time"]
INPUT = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(2))


def size(path: str) -> list[int]:
    return list(net().get_submodule(path).weight.shape)


# What LyCORIS' files hold for one weight, with random values.


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator) * 0.4


def lora(path: str, g: torch.Generator, r: int, core: bool = False) -> dict[str, Tensor]:
    out, inn, *kernel = size(path)
    ones = [1] * len(kernel)
    if core and prod(kernel) > 1:
        down, mid = draw(g, r, inn, *ones), draw(g, r, r, *kernel)
        return {"lora_up.weight": draw(g, out, r, *ones), "lora_down.weight": down, "lora_mid.weight": mid}
    return {"lora_up.weight": draw(g, out, r, *ones), "lora_down.weight": draw(g, r, inn, *kernel)}


def loha(path: str, g: torch.Generator, r: int, core: bool = False) -> dict[str, Tensor]:
    out, inn, *kernel = size(path)
    tensors = {}
    for half in "12":
        if core and prod(kernel) > 1:
            tensors |= {f"hada_w{half}_a": draw(g, r, out), f"hada_w{half}_b": draw(g, r, inn)}
            tensors[f"hada_t{half}"] = draw(g, r, r, *kernel)
        else:
            tensors |= {f"hada_w{half}_a": draw(g, out, r), f"hada_w{half}_b": draw(g, r, inn * prod(kernel))}
    return tensors


def lokr(path, g, left, r=0, left_whole=True, right_whole=False, core=False) -> dict[str, Tensor]:
    out, inn, *kernel = size(path)
    (a, c), b, d = left, out // left[0], inn // left[1]
    tensors = {"lokr_w1": draw(g, a, c)} if left_whole else {"lokr_w1_a": draw(g, a, r), "lokr_w1_b": draw(g, r, c)}
    if right_whole:
        tensors["lokr_w2"] = draw(g, b, d, *kernel)
    elif core and prod(kernel) > 1:
        tensors |= {"lokr_w2_a": draw(g, r, b), "lokr_w2_b": draw(g, r, d), "lokr_t2": draw(g, r, r, *kernel)}
    else:
        tensors |= {"lokr_w2_a": draw(g, b, r), "lokr_w2_b": draw(g, r, d * prod(kernel))}
    return tensors


def adapted(weight: Tensor, given: dict[str, Tensor]) -> Tensor:
    """The weight with what the tensors of its module add, in f64."""
    t = {end: x.double() for end, x in given.items()}
    alpha = t.get("alpha")
    kernel = weight.shape[2:]

    def rebuilt(a: str, b: str, core: str) -> Tensor:
        if core in t:
            return torch.einsum("ij...,ip,jq->pq...", t[core], t[a], t[b])
        return t[a] @ t[b]

    if "lora_up.weight" in t:
        up, down = t["lora_up.weight"].flatten(1), t["lora_down.weight"]
        rank = down.shape[0]
        if "lora_mid.weight" in t:
            delta = torch.einsum("op,pq...,qi->oi...", up, t["lora_mid.weight"], down.flatten(1))
        else:
            delta = (up @ down.flatten(1)).reshape(weight.shape)
    elif "hada_w1_a" in t:
        rank = t["hada_w1_b"].shape[0]
        delta = rebuilt("hada_w1_a", "hada_w1_b", "hada_t1") * rebuilt("hada_w2_a", "hada_w2_b", "hada_t2")
    else:
        left = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        right = t["lokr_w2"] if "lokr_w2" in t else rebuilt("lokr_w2_a", "lokr_w2_b", "lokr_t2")
        right = right.reshape(right.shape[0], -1, *kernel)
        delta = torch.einsum("ac,bd...->abcd...", left, right)
        factors = [t[end].shape[0] for end in ("lokr_w2_b", "lokr_w1_b") if end in t]
        # Two whole factors have no rank, and alpha doesn't count.
        rank, alpha = (factors[0], alpha) if factors else (1, None)
    scale = 1.0 if alpha is None else alpha.item() / rank
    whole = weight.double() + scale * delta.reshape(weight.shape)
    if "dora_scale" in t:
        norm = whole.flatten(1).norm(dim=1).reshape(-1, *[1] * (whole.dim() - 1))
        whole = t["dora_scale"] * whole / norm
    return whole


def modules(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each module, whatever stands before its name."""
    found = {}
    names = {path.replace(".", "_"): path for path in LAYERS} | {path: path for path in LAYERS}
    for key, x in tensors.items():
        for prefix in ("lycoris_", "lora_unet_", "diffusion_model.", "transformer."):
            key = key.removeprefix(prefix)
        name = next(name for name in sorted(names, key=len, reverse=True) if key.startswith(f"{name}."))
        end = key.removeprefix(f"{name}.")
        end = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}.get(end, end)
        found.setdefault(names[name], {})[end] = x
    return found


def with_file(path: Path) -> Net:
    model = net()
    for name, tensors in modules(load_file(path)).items():
        layer = model.get_submodule(name)
        layer.weight.copy_(adapted(layer.weight, tensors))
    return model


def in_lycoris(path: Path) -> Tensor:
    """What LyCORIS computes with the file."""
    from lycoris import create_lycoris_from_weights

    tensors = {f"lycoris_{name.replace('.', '_')}.{end}": x
               for name, parts in modules(load_file(path)).items() for end, x in parts.items()}  # fmt: skip
    model = net()
    network, _ = create_lycoris_from_weights(1.0, None, model, weights_sd=tensors)
    assert len(network.loras) == len(modules(tensors)), path
    network.apply_to()
    return model(INPUT)


def reads_in_lycoris(path: Path) -> bool:
    """Its loader guesses sizes that the file doesn't tell: not those of a kernel in factors, nor other factors' than
    its own."""
    if not LYCORIS or any(name in str(path) for name in ("several", "sizes")):
        return False
    kernels = [part for name, part in modules(load_file(path)).items() if name in ("conv_in", "time")]
    parts = modules(load_file(path)).values()
    return all("alpha" in part for part in parts) and not any("lokr_w2_b" in part for part in kernels)


def make(out: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net(), INPUT, check_trace=False).save(out / "model.pt")
    answers = {"input": INPUT, "plain": net()(INPUT)}
    cases = []

    def case(name: str, style: str, parts: dict[str, dict[str, Tensor]], alpha=None, dtype=torch.float32) -> None:
        prefix, format = {
            "lycoris": ("lycoris_", "LyCORIS"),
            "kohya": ("lora_unet_", "kohya"),
            "comfyui": ("diffusion_model.", "ComfyUI"),
            "diffusers": ("transformer.", "diffusers"),
        }[style]
        tensors = {}
        for path, part in parts.items():
            stem = prefix + (path if prefix.endswith(".") else path.replace(".", "_"))
            if alpha is not None:
                part = part | {"alpha": torch.tensor(alpha)}
            tensors |= {f"{stem}.{end}": x.to(dtype) for end, x in part.items()}
        file = out / f"{name}.safetensors"
        save_file({key: x.contiguous() for key, x in tensors.items()}, file)
        answers[name] = with_file(file)(INPUT)
        if reads_in_lycoris(file) and dtype == torch.float32:
            compare(f"{name}, in LyCORIS", in_lycoris(file), answers[name], answers["plain"])
        cases.append({"name": name, "format": format})

    g = torch.Generator().manual_seed(3)
    linear = LAYERS[2:4]
    case("loha", "kohya", {path: loha(path, g, 3) for path in LAYERS}, alpha=1.5)
    case("loha_core", "kohya", {path: loha(path, g, 2, core=True) for path in LAYERS}, alpha=2.0)
    case("loha_comfyui", "comfyui", {path: loha(path, g, 2 + i) for i, path in enumerate(LAYERS)})
    # Low-rank factors by one factor, which PEFT has too.
    fours = {"point": (4, 4), "blocks.0.to_q": (4, 4), "blocks.0.ff": (4, 4)}
    case("lokr", "lycoris", {path: lokr(path, g, left, r=2) for path, left in fours.items()}, alpha=3.0)
    case("lokr_bf16", "lycoris", {path: lokr(path, g, left, r=2) for path, left in fours.items()}, 3.0, torch.bfloat16)
    square = {"conv_in": (4, 2), "point": (4, 4), "blocks.0.to_q": (6, 4), "blocks.0.ff": (6, 6)}
    squares = {path: lokr(path, g, left, r=1) for path, left in (square | {"time": (3, 6)}).items()}
    case("lokr_square", "kohya", squares, alpha=0.3)
    both = {path: lokr(path, g, square[path], r=1, left_whole=False) for path in linear}
    case("lokr_both", "comfyui", both, alpha=0.5)
    core = {"conv_in": lokr("conv_in", g, (4, 2), r=1, core=True), "time": lokr("time", g, (3, 6), r=2, core=True)}
    case("lokr_core", "kohya", core, alpha=4.0)
    # As ai-toolkit and SimpleTuner have them: whole factors, whose alpha doesn't count, by several factors.
    whole = {path: lokr(path, g, left, right_whole=True) for path, left in square.items()}
    case("lokr_whole", "comfyui", whole, alpha=9999999999.0)
    fourth = {"blocks.0.to_q": (4, 4), "blocks.0.ff": (12, 12), "conv_in": (16, 1)}
    several = {path: lokr(path, g, left, right_whole=True) for path, left in fourth.items()}
    several["point"] = lokr("point", g, (4, 2), r=1)
    case("lokr_several", "lycoris", several, alpha=5.0)
    case("lokr_diffusers", "diffusers", {path: lokr(path, g, fours[path], right_whole=True) for path in linear})
    # LoRA with what LyCORIS adds to it.
    case("locon", "lycoris", {path: lora(path, g, 2, core=True) for path in LAYERS}, alpha=3.0)
    dora = {path: lora(path, g, 2, core=True) for path in LAYERS}
    for path, part in dora.items():
        part["dora_scale"] = torch.rand(size(path)[0], *[1] * (len(size(path)) - 1), generator=g) + 0.5
    case("dora", "kohya", dora, alpha=1.0)
    if LYCORIS:
        made_by_lycoris(out, answers, cases)
    else:
        print("LyCORIS is not installed: its files are made by its formulas alone")
    save_file({name: x.detach().contiguous() for name, x in answers.items()}, out / "answers.safetensors")
    (out / "cases.json").write_text(json.dumps(cases))


def made_by_lycoris(out: Path, answers: dict[str, Tensor], cases: list) -> None:
    from lycoris import LycorisNetwork, create_lycoris

    for name, algo, settings in [
        ("own_loha", "loha", dict(use_tucker=True)),
        ("own_lokr", "lokr", dict(factor=4)),
        ("own_lokr_both", "lokr", dict(decompose_both=True)),
        ("own_lokr_whole", "lokr", dict(factor=2, full_matrix=True)),
        ("own_lokr_unbalanced", "lokr", dict(factor=3, unbalanced_factorization=True)),
        ("own_locon", "locon", dict(use_tucker=True)),
        ("own_rs", "locon", dict(rs_lora=True)),
        ("own_dora", "locon", dict(dora_wd=True)),
    ]:
        # Of a whole kernel over one dimension, PEFT's LoKr is another.
        names = [path for path in LAYERS if path != "time" or algo != "lokr"]
        LycorisNetwork.apply_preset({"target_name": names, "target_module": []})
        model = net()
        network = create_lycoris(model, 1.0, linear_dim=2, linear_alpha=3, algo=algo, **settings)
        network.apply_to()
        torch.manual_seed(4)
        for key, parameter in network.named_parameters():
            parameter.uniform_(0.5, 1.5) if "dora" in key else parameter.normal_(0, 0.4)
        file = out / f"{name}.safetensors"
        network.save_weights(file, None, {})
        answers[name] = model(INPUT)
        compare(f"{name}, by formula", with_file(file)(INPUT), answers[name], answers["plain"])
        cases.append({"name": name, "format": "LyCORIS"})


def check(out: Path) -> None:
    plain = net()(INPUT)
    folders = sorted((out / "from_rust").iterdir())
    for folder in folders:
        expected = load_file(folder / "output.safetensors")["output"]
        (file,) = [path for path in folder.iterdir() if path.name != "output.safetensors"]
        if file.is_dir():
            config = json.loads((file / "adapter_config.json").read_text())
            if "w1_pattern" in config:
                refused(folder.name, file)
                continue
            model = PeftModel.from_pretrained(net(), file).eval()
            compare(f"{folder.name}, in PEFT", model(INPUT), expected, plain)
        elif folder.name.endswith("diffusers"):
            model = net()
            model.load_lora_adapter(file, prefix="transformer", use_safetensors=True)
            compare(f"{folder.name}, in diffusers", model(INPUT), expected, plain)
        else:
            compare(f"{folder.name}, by formula", with_file(file)(INPUT), expected, plain)
            if reads_in_lycoris(file):
                compare(f"{folder.name}, in LyCORIS", in_lycoris(file), expected, plain)
    assert len(folders) > 20, folders


def refused(name: str, folder: Path) -> None:
    """PEFT can't have such sizes of W1, and says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            PeftModel.from_pretrained(net(), folder)
        except RuntimeError as error:
            assert "size mismatch" in str(error), f"{name}: {error}"
        else:
            raise AssertionError(f"{name}: PEFT loaded sizes that it doesn't know")


def compare(name: str, found: Tensor, expected: Tensor, plain: Tensor) -> None:
    error = ((found - expected).norm() / expected.norm()).item()
    effect = ((expected - plain).norm() / expected.norm()).item()
    assert error <= TOLERANCE, f"{name}: output differs by {error:.1e} (effect {effect:.2f})"
    assert effect > 1e-2, f"{name}: the adapter changes the output by {effect:.1e} only"
    print(f"{name}: outputs differ by {error:.1e} (effect {effect:.2f})")


if __name__ == "__main__":
    torch.set_num_threads(2)
    with torch.no_grad():
        {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
