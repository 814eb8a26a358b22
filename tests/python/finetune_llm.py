"""The models of finetune_llm.rs, and PEFT's verdict on what came of them.

make DIR    a tiny random Qwen2 in DIR/model with a word-level tokenizer, and texts with their ids
check DIR   loads DIR/straight/adapter over the model, and writes DIR/logits.safetensors
"""

import json
import random
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, Qwen2Config

WORDS = "the a red blue old new cat dog bird sees likes finds house tree river .".split()


def tokenizer() -> Tokenizer:
    vocabulary = {word: n for n, word in enumerate(["<eos>", "<bos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return made


def sentence(choose: random.Random) -> str:
    article, kind, animal, verb, thing = WORDS[:2], WORDS[2:6], WORDS[6:9], WORDS[9:12], WORDS[12:15]
    return " ".join([*map(choose.choice, [article, kind, animal, verb, article, kind, thing]), "."])


def make(out: Path) -> None:
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(WORDS) + 3,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(out / "model", max_shard_size="60KB")
    words = tokenizer()
    words.save(str(out / "model" / "tokenizer.json"))

    choose = random.Random(2)
    sentences = [sentence(choose) for _ in range(120)]
    (out / "data.txt").write_text("\n".join(sentences))
    lines = [{"text": s} if n % 2 else {"prompt": s[:12], "completion": s[12:]} for n, s in enumerate(sentences)]
    (out / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ids = {"text": words.encode("\n".join(sentences)).ids, "lines": []}
    for line in lines:
        if "text" in line:
            ids["lines"].append([words.encode(line["text"]).ids + [0], 1])
        else:
            prompt = words.encode(line["prompt"]).ids
            rest = words.encode(line["completion"], add_special_tokens=False).ids
            ids["lines"].append([prompt + rest + [0], len(prompt)])
    (out / "ids.json").write_text(json.dumps(ids))


def check(out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, out / "straight" / "adapter").eval()
    tokens = torch.tensor([json.loads((out / "ids.json").read_text())["text"][:20]])
    with torch.no_grad():
        save_file({"tokens": tokens, "logits": adapted(tokens).logits.contiguous()}, out / "logits.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
