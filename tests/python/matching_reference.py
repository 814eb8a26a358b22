"""Which modules PEFT's rules mean, over a table of names and configurations.

usage: matching_reference.py OUT.json
"""

import itertools
import json
import sys
from pathlib import Path

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key


def names() -> list[str]:
    llama = [
        f"model.layers.{i}.{part}"
        for i in (0, 1, 2, 10, 11)
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                     "mlp.up_proj", "mlp.down_proj")
    ]
    gpt2 = [f"transformer.h.{i}.{p}" for i in (0, 1, 7) for p in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    t5 = [
        f"{side}.block.{i}.layer.{j}.{p}"
        for side in ("encoder", "decoder")
        for i, j in ((0, 0), (1, 1), (2, 0))
        for p in ("SelfAttention.q", "SelfAttention.v", "DenseReluDense.wi_0")
    ]
    moe = [f"model.layers.{i}.mlp.experts.{e}.w{k}" for i in (0, 1) for e in (0, 1, 7) for k in (1, 2, 3)]
    unet = [
        f"{block}.{i}.attentions.{j}.transformer_blocks.0.{p}"
        for block, i, j in (("down_blocks", 0, 0), ("down_blocks", 1, 1), ("up_blocks", 1, 0))
        for p in ("attn1.to_q", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    ]
    odd = [
        "lin", "lin0", "0.lin", "h.0", "h.0.lin", "h.1.lin", "h.10.lin", "xh.1.lin", "h.1.xlin", "head", "bighead",
        "head.proj", "net.head", "net.header", "lm_head", "model.lm_head", "score", "q_proj", "xq_proj", "a.xq_proj",
        "foo", "module.foo", "module.middle.foo", "module.module.foo", "foo.bar", "bar.1.foo", "blocks.1.weight.lin",
        "blocks.1.bias.2.lin", "model.1.lin", "model.1.2.lin", "a.b.c.d.e", "layers.1.q_proj", "enc.layers.1.q_proj",
        "weight.proj", "lora_A.proj", "h.0.mlp.fc", "h.0.mlpx.fc", "h.00.lin", "h.-1.lin", "h.1a.lin", "a+b.lin", "a.é.lin",
    ]
    return llama + gpt2 + t5 + moe + unet + odd


LISTS = [
    ["q_proj"], ["q_proj", "v_proj"], ["lin"], ["h.1.lin", "lin"], ["mlp.c_fc"], ["1.q_proj"], ["self_attn.q_proj"],
    ["foo"], ["proj"], ["model.layers.1.self_attn.q_proj"], ["w1", "w3"], ["0"], ["to_out.0", "ff.net.2"], ["head"],
    ["SelfAttention.q", "wi_0"], ["layers.1.q_proj"], ["q", "v"], ["a.é.lin", "a+b.lin"],
]
PATTERNS = [
    "lin", ".*lin", "lin.*", r".*\.lin", r"model\.layers\.\d+\.self_attn\.[qv]_proj", ".*q_proj|.*v_proj", "q_proj|lin",
    r".*\.(1|10)\..*", r"(encoder|decoder)\.block\.[0-1]\..*", r"^h\.\d+\.lin$", r".*\.experts\.\d\.w[12]", "(?:foo|module.*foo)",
    r"(?P<side>encoder)\..*\.q", r"(?i).*Q_PROJ", r"[^.]+", r"[^.]+\.[^.]+", r"h\.\w+\.lin", r".*\bhead\b.*", "", "all_linear",
    r".*\.q_proj(?:|x)", r"a\+b\.lin", r"model\.layers\.(?:[02468]|1[0-9])\..*_proj",
]
EXCLUDES = [
    ["q_proj"], ["model.layers.1.self_attn.q_proj"], ["lin", "head"], ["layers"], "q_proj", ".*q_proj", r".*\.1\..*",
    r"model\.layers\.\d+\..*", [], ["1.lin"], "h.*",
]
FILTERS = [
    (1, None), ([1], None), ([0, 2], None), ([], None), (1, "layers"), ([1], ["h"]), ([0, 1], ["layers", "h"]),
    ([1], "block"), ([0, 1], "blocks"), ([1], ["nothing", "layer"]), ([0], "experts"), ([10, 11], "layers"), ([1], []),
    ([1], ""), ([1], r"h|layers"), ([7], [r"(?:h|experts)"]), ([0, 1, 2], r"transformer_blocks"), (0, [r"\w+"]),
]
SAVED = [["head"], ["lm_head", "score"], ["mlp"], ["model"], ["layers.1"], ["self_attn.q_proj"], ["q"], ["nothing"]]

RANKS = [
    {"q_proj": 4}, {"^foo": 2}, {"foo": 2, "module.foo": 3}, {"module.foo": 3, "foo": 2}, {"^module.foo": 5}, {"q|v": 3},
    {r"model.layers.\d+.self_attn.q_proj": 6, "q_proj": 7}, {".*": 4, "q_proj": 8}, {"q_proj": 8, ".*": 4}, {"proj": 2},
    {r".*\.1\..*": 5}, {"lin0?": 3}, {"h.1.lin": 3, r"h\.\d+\.lin": 2}, {"(?i:HEAD)": 3}, {"": 9}, {"head|lin": 3, "lm_.*": 5},
]


def configs():
    for target in LISTS + PATTERNS:
        yield dict(target_modules=target)
    for target, exclude in itertools.product([["q_proj", "lin", "head"], r".*(q_proj|lin|head)"], EXCLUDES):
        yield dict(target_modules=target, exclude_modules=exclude)
    for target, (layers, pattern) in itertools.product(
        [["q_proj", "lin", "q", "c_fc", "w1", "to_q"], ["h.1.lin", "lin", "model.layers.0.self_attn.q_proj"]], FILTERS
    ):
        yield dict(target_modules=target, layers_to_transform=layers, layers_pattern=pattern)
    for target, saved in itertools.product([["q_proj", "proj", "c_fc", "q"], ".*"], SAVED):
        yield dict(target_modules=target, modules_to_save=saved)
    yield dict(
        target_modules=["q_proj", "lin"], exclude_modules=["h.1.lin"], layers_to_transform=[0, 1],
        modules_to_save=["head"],
    )
    for ranks in RANKS:
        if "" not in ranks:
            alphas = {key: value * 1.5 for key, value in ranks.items()}
            yield dict(target_modules=["q_proj"], rank_pattern=ranks, alpha_pattern=alphas)


def plain(value):
    return sorted(value) if isinstance(value, set) else value


def main() -> None:
    table = names()
    cases = []
    for settings in configs():
        config = LoraConfig(**settings)
        ranks = {n: config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), n), config.r) for n in table}
        alphas = {
            n: config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), n), config.lora_alpha) for n in table
        }
        fields = {key: plain(value) for key, value in config.to_dict().items()}
        matched = [name for name in table if check_target_module_exists(config, name)]
        cases.append(dict(config=fields, matched=matched, ranks=ranks, alphas=alphas))
    Path(sys.argv[1]).write_text(json.dumps(dict(names=table, cases=cases)))


if __name__ == "__main__":
    main()
