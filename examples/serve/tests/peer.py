"""The models and adapters of serve.rs, and what transformers and PEFT answer with them.

peer.py make DIR     DIR/dense and DIR/packed (bitsandbytes' nf4), DIR/adapters/…, and DIR/expected.json with the
                     greedy completions of each adapter on each of the two
peer.py bench DIR    DIR/model, of 113 million weights, and four adapters in DIR/adapters, for `serve bench`
"""

import json
import os
import random
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import bitsandbytes as bnb  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM  # noqa: E402

WORDS = [a + b for a in ["ba", "de", "fi", "go", "ku", "la", "me", "no"] for b in ["ra", "se", "ti", "vo", "zu", "pe", "lo"]]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "poet": LoraConfig(r=4, lora_alpha=8, target_modules=ALL),
    "clerk": LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_dora=True),
    "sailor": LoraConfig(r=2, lora_alpha=4, target_modules=["o_proj", "lm_head"], use_rslora=True),
    # To put in poet's place: another rank, and other layers.
    "more/poet-2": LoraConfig(r=6, lora_alpha=6, target_modules=["v_proj", "down_proj"]),
}
SHORT, LONG = 12, 400
PROMPTS = 6
# The likeliest token leads the next one by so much everywhere: more than rounding can take away.
LEAD = 3e-4


def tokenizer() -> Tokenizer:
    vocabulary = {word: n for n, word in enumerate(["<eos>", "<bos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.add_special_tokens(["<eos>", "<bos>"])
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return made


def randomise(model: torch.nn.Module, only: str = "", std: float = 0.2) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                noise = torch.randn_like(parameter) * std
                parameter.copy_(1.0 + noise if "norm" in name else noise)


def complete(model, words: Tokenizer, prompt: str, length: int) -> dict | None:
    """None if a tie could be decided by rounding."""
    ids = words.encode(prompt).ids
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        do_sample=False,
        max_new_tokens=length,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.scores).topk(2).values
    if (best[..., 0] - best[..., 1]).min() < LEAD:
        return None
    tokens = out.sequences[0].tolist()
    ended = tokens[-1] == 0
    tokens = tokens[:-1] if ended else tokens
    text = words.decode(tokens).removeprefix(words.decode(ids))
    finish = "stop" if ended else "length"
    return {"prompt": prompt, "prompt_tokens": len(ids), "text": text, "tokens": len(tokens) - len(ids), "finish": finish}


def adapted(model: LlamaForCausalLM, folder: Path):
    fresh = LlamaForCausalLM(model.config)
    fresh.load_state_dict(model.state_dict())
    return PeftModel.from_pretrained(fresh, folder).eval()


def dequantised(folder: Path) -> LlamaForCausalLM:
    """The packed model with dense weights of its values."""
    packed = LlamaForCausalLM.from_pretrained(folder, device_map="cpu")
    values = {
        name: bnb.functional.dequantize_4bit(p.data, p.quant_state) if isinstance(p, bnb.nn.Params4bit) else p.data
        for name, p in packed.named_parameters()
    }
    config = LlamaConfig.from_pretrained(folder)
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(values)
    return model.eval()


def expected(model: LlamaForCausalLM, adapters: Path, words: Tokenizer) -> dict:
    """Completions of the same prompts by the base and by each adapter, and a long one by poet."""
    models = {"base": model} | {name: adapted(model, adapters / name) for name in ADAPTERS}
    choose = random.Random(5)
    answers = {name: [] for name in models}
    while len(answers["base"]) < PROMPTS or all(answer["finish"] == "length" for answer in answers["sailor"]):
        prompt = " ".join(choose.choices(WORDS, k=choose.choice([1, 2, 5, 11, 23, 37])))
        found = {name: complete(model, words, prompt, SHORT) for name, model in models.items()}
        if all(found.values()) and len({answer["text"] for answer in found.values()}) == len(found):
            for name, answer in found.items():
                answers[name].append(answer)
    while not answers.get("long"):
        answer = complete(models["poet"], words, choose.choice(WORDS), LONG)
        if answer and answer["finish"] == "length":
            answers["long"] = [answer]
    return answers


def make(out: Path) -> None:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=64,
        # bitsandbytes reads rows of no whole blocks (64) wrongly on the CPU.
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    randomise(model)
    with torch.no_grad():
        # No text ends by itself, except sailor's.
        model.lm_head.weight[0] *= 0.3
    model.save_pretrained(out / "dense")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    options = dict(quantization_config=nf4, dtype=torch.float32, device_map="cpu")
    LlamaForCausalLM.from_pretrained(out / "dense", **options).save_pretrained(out / "packed")
    words = tokenizer()
    for folder in ["dense", "packed"]:
        words.save(str(out / folder / "tokenizer.json"))
    for name, lora in ADAPTERS.items():
        fresh = get_peft_model(LlamaForCausalLM(config), lora)
        randomise(fresh, "lora_A")
        randomise(fresh, "lora_B")
        if name == "sailor":
            with torch.no_grad():
                fresh.base_model.model.lm_head.lora_B["default"].weight[0] *= 8
        fresh.save_pretrained(out / "adapters" / name, save_embedding_layers=False)
    bases = {"dense": model, "packed": dequantised(out / "packed")}
    answers = {name: expected(base, out / "adapters", words) for name, base in bases.items()}
    (out / "expected.json").write_text(json.dumps(answers))


def bench(out: Path) -> None:
    torch.manual_seed(8)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(out / "model")
    tokenizer().save(str(out / "model" / "tokenizer.json"))
    for n in range(4):
        adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=ALL))
        randomise(adapted, "lora_B", 0.02)
        adapted.save_pretrained(out / "adapters" / f"adapter-{n}", save_embedding_layers=False)
        model = adapted.unload()


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"make": make, "bench": bench}[sys.argv[1]](Path(sys.argv[2]))
