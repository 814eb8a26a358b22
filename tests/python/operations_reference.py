"""PEFT's side of operations.rs.

make DIR    adapters written by PEFT, and what it answers after each operation
check DIR   loads what Rust wrote into PEFT, and compares outputs
"""

import copy
import json
import sys
import warnings
from pathlib import Path

import torch
from mirror import Net, net, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import model as lora_model
from safetensors.torch import load_file, save_file

TOLERANCE = 1e-5

ADAPTERS = {
    "default": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "b": dict(r=4, lora_alpha=12, target_modules=["q_proj", "fc"]),
    "c": dict(r=2, lora_alpha=4, target_modules=["fc", "v_proj"], rank_pattern={"h.0.fc": 3}, alpha_pattern={"fc": 9}),
}

# Of `default` and `b`.
COMBINATIONS = {
    "cat": {},
    "linear": {},
    "svd": {},
    "svd_rank": dict(combination_type="svd", svd_rank=3),
    "svd_clamp": dict(combination_type="svd", svd_clamp=0.9),
    "ties": dict(density=0.5),
    "ties_frequency": dict(combination_type="ties", density=0.7, majority_sign_method="frequency"),
    "ties_svd": dict(density=0.5),
    "magnitude_prune": dict(density=0.4),
    "magnitude_prune_svd": dict(density=0.4),
}
# Of two adapters of one layer each: their draws have no other order.
DARE = ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"]

SAVED = {
    "modules": dict(modules_to_save=["head"]),
    "norms": dict(modules_to_save=["norm", "embed"]),
    "bias_all": dict(bias="all"),
    "bias_lora_only": dict(bias="lora_only"),
    "tokens": dict(trainable_token_indices={"embed": [1, 5, 7]}),
    "modules_and_bias": dict(modules_to_save=["fc"], bias="lora_only"),
}


def quietly(f, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f(*args, **kwargs)


def model_with(base: Net, adapters: dict):
    first, *others = adapters.items()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**first[1]), adapter_name=first[0])
    for name, settings in others:
        model.add_adapter(name, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model.eval()


def make(out: Path) -> None:
    base = Net(seed=0)
    save_file(base.state_dict(), out / "net.safetensors")
    ids = torch.randint(0, 23, (4, 6), generator=torch.Generator().manual_seed(11))
    t = {"ids": ids, "base": base(ids).detach()}

    model = model_with(base, ADAPTERS)
    quietly(model.save_pretrained, out / "from_peft", save_embedding_layers=False)
    with torch.no_grad():
        for name in ADAPTERS:
            model.set_adapter(name)
            t[name] = model(ids)
        model.base_model.set_adapter(["default", "b"])
        t["default+b"] = model(ids)
        model.merge_adapter()
        t["merged default+b"] = model(ids)
        model.unmerge_adapter()
        model.set_adapter("default")
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", 0.25)
        t["scaled"] = model(ids)
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", 1)
        t["mixed"] = model(ids, adapter_names=["b", "__base__", "default", "b"])
        for name, settings in COMBINATIONS.items():
            settings = dict(combination_type=name) | settings
            model.add_weighted_adapter(["default", "b"], [0.7, -0.4], name, **settings)
            model.set_adapter(name)
            t[f"weighted {name}"] = model(ids)
        clean = copy.deepcopy(model)
        clean.set_adapter("b")
        t["unloaded b"] = quietly(clean.merge_and_unload)(ids)

    one = {name: dict(r=4, lora_alpha=alpha, target_modules=["head"]) for name, alpha in (("default", 8), ("b", 3))}
    model = model_with(base, one)
    quietly(model.save_pretrained, out / "one_layer", save_embedding_layers=False)
    freeze = lora_model._freeze_adapter

    def freeze_and_seed(*args):
        # The new adapter has drawn its initial values by now.
        freeze(*args)
        torch.manual_seed(5)

    lora_model._freeze_adapter = freeze_and_seed
    with torch.no_grad():
        for name in DARE:
            model.add_weighted_adapter(["default", "b"], [0.7, -0.4], name, combination_type=name, density=0.6)
            model.set_adapter(name)
            t[f"weighted {name}"] = model(ids)

    for name, settings in SAVED.items():
        train(base, settings, out, name)
    convert(base, out)
    save_file({key: value.detach().contiguous() for key, value in t.items()}, out / "outputs.safetensors")


def train(base: Net, settings: dict, out: Path, name: str) -> None:
    """Three steps of SGD from PEFT's own initial adapter, and the adapter after them."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], **settings)
    model = quietly(get_peft_model, copy.deepcopy(base), config).train()
    randomise_factors(model)
    quietly(model.save_pretrained, out / "saved" / name / "before", save_embedding_layers=False)
    ids = torch.randint(0, 23, (3, 6))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    record = {"ids": ids}
    for step in range(3):
        loss = model(ids).logsumexp(-1).mean()
        loss.backward()
        record[f"{step}.loss"] = loss.detach()
        optimizer.step()
        optimizer.zero_grad()
    record["output"] = model.eval()(ids).detach()
    quietly(model.save_pretrained, out / "saved" / name / "after", save_embedding_layers=False)
    save_file(record, out / "saved" / name / "record.safetensors")


def randomise_factors(model) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


def convert(base: Net, out: Path) -> None:
    """PEFT's conversion of an adapter whose initialisation is taken off again."""
    for name, extra in {"plain": {}, "rslora": dict(use_rslora=True), "patterns": dict(rank_pattern={"fc": 2})}.items():
        folder = out / "convert" / name
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "fc"], **extra)
        model = get_peft_model(copy.deepcopy(base), config)
        randomise(model, 21)
        quietly(model.save_pretrained, folder / "initial", save_embedding_layers=False)
        randomise(model, 22)
        quietly(model.save_pretrained, folder / "trained", save_embedding_layers=False)
        quietly(
            model.save_pretrained, folder / "lora", save_embedding_layers=False,
            path_initial_model_for_weight_conversion=str(folder / "initial"),
        )


def check(out: Path) -> None:
    base = net(out / "net.safetensors")
    ids = load_file(out / "outputs.safetensors")["ids"]
    folders = sorted(path.parent for path in (out / "from_rust").rglob("adapter_config.json"))
    assert len(folders) > 5, folders
    for folder in folders:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PEFT warns of missing and unknown keys
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            model = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        if model.peft_config["default"].bias == "none":  # else PEFT holds one adapter only
            result = model.load_adapter(folder, adapter_name="again")
            assert not result.unexpected_keys, f"{folder}: unexpected {result.unexpected_keys}"
        expected = load_file(folder / "output.safetensors")["output"]
        with torch.no_grad():
            found = model(ids)
        error = ((found - expected).norm() / expected.norm()).item()
        assert error <= TOLERANCE, f"{folder}: output differs by {error:.1e}"
        text = (folder / "adapter_config.json").read_text()
        assert text == json.dumps(json.loads(text), indent=2, sort_keys=True), folder
        print(f"{folder.relative_to(out)}: differs by {error:.1e}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
