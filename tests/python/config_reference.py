"""PEFT's side of config.rs.

make DIR    configurations as PEFT writes them
check DIR   reads those that Rust wrote, and compares every field
"""

import json
import sys
import warnings
from pathlib import Path

from peft import EvaConfig, LoraConfig
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    KasaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)

# One target only: PEFT writes the order of a set, which changes from run to run.
ONE = dict(target_modules=["q_proj"])

# Each field of LoraConfig at a value other than its default.
CASES = {
    "defaults": ONE,
    "numbers": dict(r=3, lora_alpha=12, lora_dropout=0.25, **ONE),
    "fractional_alpha": dict(lora_alpha=2.5, **ONE),
    "pattern": dict(target_modules=r".*\.q_proj"),
    "all_linear": dict(target_modules="all-linear"),
    "exclude_list": dict(exclude_modules=["h.0.q_proj"], **ONE),
    "exclude_pattern": dict(exclude_modules=r"h\.0\..*", **ONE),
    "one_layer": dict(layers_to_transform=1, layers_pattern="h", **ONE),
    "layers": dict(layers_to_transform=[0, 2], layers_pattern=["h", "layers"], **ONE),
    "any_layers": dict(layers_to_transform=[], **ONE),
    "patterns": dict(rank_pattern={"a": 4, "^b.c": 2}, alpha_pattern={"a": 3, "c": 1.5}, **ONE),
    "modules_to_save": dict(modules_to_save=["score", "head"], **ONE),
    "bias_all": dict(bias="all", **ONE),
    "bias_lora_only": dict(bias="lora_only", **ONE),
    "lora_bias": dict(lora_bias=True, **ONE),
    "flags": dict(use_rslora=True, use_dora=True, fan_in_fan_out=True, ensure_weight_tying=True, **ONE),
    "init_false": dict(init_lora_weights=False, **ONE),
    **{
        f"init_{init}": dict(init_lora_weights=init, **ONE)
        for init in ("gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "lora_ga", "mica")
    },
    "eva": dict(init_lora_weights="eva", eva_config=EvaConfig(rho=1.5, whiten=True), **ONE),
    "corda": dict(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"), **ONE),
    "lora_ga": dict(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(direction="ArBr"), **ONE),
    "tokens": dict(trainable_token_indices=[1, 5], **ONE),
    "tokens_by_module": dict(trainable_token_indices={"wte": [1, 5], "embed": [0]}, **ONE),
    "parameters": dict(target_parameters=["experts.gate_up_proj"], **ONE),
    "replication": dict(layer_replication=[(0, 2), (1, 3)], **ONE),
    "task": dict(task_type="CAUSAL_LM", base_model_name_or_path="org/model", revision="main", **ONE),
    "seq_cls": dict(task_type="SEQ_CLS", inference_mode=True, **ONE),
    "alora": dict(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM", **ONE),
    "arrow": dict(arrow_config=ArrowConfig(top_k=2), **ONE),
    "bdlora": dict(use_bdlora=BdLoraConfig(nblocks=2, target_modules_bd_a=["q_proj"]), **ONE),
    "kasa": dict(kasa_config=KasaConfig(beta=0.5), **ONE),
    "montecarlo": dict(monteclora_config=MontecloraConfig(num_samples=4, kl_loss_weight=0.01), **ONE),
    "velora": dict(velora_config=VeloraConfig(num_groups=2), **ONE),
    "qalora": dict(use_qalora=True, qalora_group_size=8, **ONE),
    "megatron": dict(megatron_config={"a": 1}, megatron_core="other.core", **ONE),
}


def make(out: Path) -> None:
    fields = set()
    for name, settings in CASES.items():
        fields |= settings.keys()
        LoraConfig(**settings).save_pretrained(out / "from_peft" / name)
    # loftq needs scipy even to be parsed; PEFT's own dictionary by hand.
    text = (out / "from_peft/defaults/adapter_config.json").read_text()
    loftq = json.loads(text) | dict(init_lora_weights="loftq", loftq_config=dict(loftq_bits=4, loftq_iter=1))
    (out / "from_peft/loftq").mkdir()
    (out / "from_peft/loftq/adapter_config.json").write_text(json.dumps(loftq, indent=2, sort_keys=True))
    untested = loftq.keys() - fields - {"peft_type", "peft_version", "auto_mapping", "loftq_config"}
    assert not untested, f"fields without a case: {untested}"


def check(out: Path) -> None:
    expected = {
        "everything": LoraConfig(
            r=6, lora_alpha=2.5, lora_dropout=0.1, target_modules=["q", "v"], exclude_modules=r"h\.0\..*",
            layers_to_transform=[1, 2], layers_pattern="h", rank_pattern={"a": 4, "b": 2}, alpha_pattern={"a": 3},
            modules_to_save=["head"], bias="lora_only", fan_in_fan_out=True, use_rslora=True, use_dora=True,
            init_lora_weights="pissa_niter_4", trainable_token_indices={"wte": [1, 2]}, target_parameters=["e.w"],
            ensure_weight_tying=True, layer_replication=[(0, 2), (1, 3)], task_type="CAUSAL_LM",
            base_model_name_or_path="org/model",
        ),
        "bias": LoraConfig(target_modules=r".*\.q", lora_bias=True, init_lora_weights=False, bias="all",
                           layers_to_transform=None, trainable_token_indices=[3]),
    }
    for name, wanted in expected.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # That a conversion of the base would not be possible.
            warnings.filterwarnings("ignore", message="Using Rank-Stabilized LoRA with rank_pattern")
            found = LoraConfig.from_pretrained(out / "from_rust" / name)
        # JSON has no tuples and no sets; PEFT turns both into lists.
        ours, theirs = (json.dumps(c.to_dict(), sort_keys=True, default=sorted) for c in (found, wanted))
        assert ours == theirs, f"{name}:\n{ours}\n{theirs}"


if __name__ == "__main__":
    with warnings.catch_warnings():
        {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
