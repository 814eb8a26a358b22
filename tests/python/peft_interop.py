"""PEFT's side of peft_interop.rs.

make DIR    adapters written by PEFT with their outputs, and records of its training
check DIR   loads the adapters that Rust wrote into PEFT, and compares outputs and bytes
"""

import copy
import json
import sys
import warnings
from pathlib import Path

import peft
import safetensors.torch
import torch
from mirror import Net, adapters, export, llama, logits_of, net, next_token_loss, randomise, snapshot
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

TOLERANCE = 1e-5

CASES = {
    "list": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "regex": dict(r=3, lora_alpha=5, target_modules=r"h\.\d+\.(fc|q_proj)"),
    "rslora": dict(r=4, lora_alpha=8, target_modules=["fc"], use_rslora=True),
    "all_linear": dict(r=2, lora_alpha=4, target_modules="all-linear"),
    "one_path": dict(r=2, lora_alpha=16, target_modules=["h.1.v_proj"], init_lora_weights="gaussian"),
    "dropout": dict(r=4, lora_alpha=8, target_modules=["q_proj", "head"], lora_dropout=0.5),
}

LLAMA_CASES = {
    "attention": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "everything": dict(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    "head": dict(r=2, lora_alpha=4, target_modules=r"model\.layers\.1\.mlp\.down_proj|lm_head"),
}

# Each by itself.
OTHER_FEATURES = {
    "dora": dict(use_dora=True),
    "alora": dict(alora_invocation_tokens=[1, 2]),
    "lora_bias": dict(lora_bias=True),
    "bias": dict(bias="lora_only"),
    "modules_to_save": dict(modules_to_save=["head"]),
    "rank_pattern": dict(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}),
    "exclude_modules": dict(exclude_modules=["h.0.q_proj"]),
    "layers_to_transform": dict(layers_to_transform=[1], layers_pattern="h"),
}


def save(model, folder: Path) -> None:
    with warnings.catch_warnings():
        # Of an embedding layer that was targeted: saving lm_head's base weight.
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, save_embedding_layers=False)


def make(out: Path) -> None:
    generator = torch.Generator().manual_seed(11)
    base = Net(seed=0)
    save_file(base.state_dict(), out / "net.safetensors")
    ids = torch.randint(0, 23, (3, 6), generator=generator)
    tensors = {"ids": ids, "base": base(ids).detach()}

    for index, (name, settings) in enumerate(CASES.items()):
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings)).eval()
        randomise(model, index)
        save(model, out / "from_peft" / name)
        tensors[name] = model(ids).detach()
    for name, settings in OTHER_FEATURES.items():
        settings = dict(r=4, lora_alpha=8, target_modules=["q_proj"]) | settings
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings)).eval()
        randomise(model, 99)
        save(model, out / "other_features" / name)
        tensors[f"other.{name}"] = model(ids).detach()
    save_file(tensors, out / "net_outputs.safetensors")

    for name, dropout in [("train", 0.0), ("train_dropout", 0.1)]:
        train(base, dropout, out, name)

    export.export("llama-tiny", out / "llama", seed=0)
    ids = torch.randint(0, 64, (3, 9), generator=generator)
    base = llama().eval()
    tensors = {"ids": ids, "base": base(ids).logits.detach()}
    for index, (name, settings) in enumerate(LLAMA_CASES.items()):
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings)).eval()
        randomise(model, 50 + index)
        save(model, out / "llama_from_peft" / name)
        tensors[name] = logits_of(model(ids)).detach()
        if name == "head":
            # PEFT's default copies the base's output embedding into an adapter that targets it.
            model.save_pretrained(out / "llama_with_base_layer")
    save_file(tensors, out / "llama_outputs.safetensors")


def train(base: Net, dropout: float, out: Path, name: str) -> None:
    """Five steps of AdamW from PEFT's own initial adapter, every value on record."""
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj", "fc"])
    model = get_peft_model(copy.deepcopy(base), config).train()
    save(model, out / name)
    optimizer = torch.optim.AdamW([p for _, p in sorted(adapters(model).items())], lr=1e-2)
    batches = [torch.randint(0, 23, (2 + step % 2, 7)) for step in range(5)]
    record = {}
    torch.manual_seed(1234)
    for step, ids in enumerate(batches):
        loss = next_token_loss(model(ids), ids)
        loss.backward()
        record |= {f"{step}.ids": ids, f"{step}.loss": loss.detach()}
        record |= snapshot(f"{step}.grad.", {n: p.grad for n, p in adapters(model).items()})
        optimizer.step()
        optimizer.zero_grad()
        record |= snapshot(f"{step}.value.", adapters(model))
    save_file(record, out / f"{name}.safetensors")


def check(out: Path) -> None:
    base = net(out / "net.safetensors")
    ids = load_file(out / "net_outputs.safetensors")["ids"]
    for folder in sorted((out / "from_rust").iterdir()):
        check_adapter(folder, copy.deepcopy(base), ids, CASES.get(folder.name))
    base = llama().eval()
    ids = load_file(out / "llama_outputs.safetensors")["ids"]
    for folder in sorted((out / "llama_from_rust").iterdir()):
        check_adapter(folder, copy.deepcopy(base), ids, LLAMA_CASES.get(folder.name))


def check_adapter(folder: Path, base, ids, settings) -> None:
    name = f"{folder.parent.name}/{folder.name}"
    expected = load_file(folder / "output.safetensors")["output"]
    written = load_file(folder / "adapter_model.safetensors")

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing and unknown keys
        # PEFT reads a property that transformers means to rename.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        config = LoraConfig.from_pretrained(folder)
        model = PeftModel.from_pretrained(base, folder).eval()
    result = model.load_adapter(folder, adapter_name="again")
    missing = [key for key in result.missing_keys if "lora" in key and ".again" in key]
    assert not missing, f"{name}: missing {missing}"
    assert not result.unexpected_keys, f"{name}: unexpected {result.unexpected_keys}"
    wanted = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    assert set(written) == set(wanted), f"{name}: keys differ: {set(written) ^ set(wanted)}"
    for key, value in wanted.items():
        assert torch.equal(value, written[key]), f"{name}: {key} came out differently"

    with torch.no_grad():
        found, plain = logits_of(model(ids)), logits_of(base_output(model, ids))
    error = ((found - expected).norm() / expected.norm()).item()
    assert error <= TOLERANCE, f"{name}: output differs by {error:.1e}"
    effect = ((expected - plain).norm() / expected.norm()).item()
    assert effect > 1e-2, f"{name}: the adapter changes the output by {effect:.1e} only"

    data = (folder / "adapter_model.safetensors").read_bytes()
    ours = safetensors.torch.save(written, metadata={"format": "pt"})
    assert data == ours, f"{name}: other bytes than safetensors.torch.save"
    check_config(name, folder, config, settings)
    print(f"{name}: {len(written)} tensors, outputs differ by {error:.1e} (effect {effect:.2f})")


def base_output(model, ids):
    with model.disable_adapter():
        return model(ids)


def check_config(name: str, folder: Path, config: LoraConfig, settings) -> None:
    text = (folder / "adapter_config.json").read_text()
    found = json.loads(text)
    assert text == json.dumps(found, indent=2, sort_keys=True), f"{name}: JSON in another layout than PEFT's"
    fields = LoraConfig(target_modules=["x"]).to_dict().keys() - {"runtime_config"}
    assert found.keys() == fields and len(fields) == 41, f"{name}: keys {found.keys() ^ fields}"
    if settings is None:
        return
    # What PEFT writes for the same settings.
    same = folder.parent.parent / folder.parent.name.replace("from_rust", "from_peft") / folder.name
    theirs = json.loads((same / "adapter_config.json").read_text())
    for key in fields - {"auto_mapping", "base_model_name_or_path", "peft_version", "task_type"}:
        ours, peers = found[key], theirs[key]
        if key == "target_modules" and isinstance(ours, list) and isinstance(peers, list):
            ours, peers = sorted(ours), sorted(peers)
        assert ours == peers and type(ours) is type(peers), f"{name}: {key} is {ours!r}, PEFT writes {peers!r}"
    assert config.peft_type == peft.PeftType.LORA


if __name__ == "__main__":
    torch.set_num_threads(2)
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
