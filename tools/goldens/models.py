"""Tiny random models, and what transformers computes from a model directory."""

import json
import os
import platform
import shutil

# Hashed tokens and thread counts must not reach the data; the model hub must not be asked.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import peft
import safetensors
import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
transformers.utils.logging.disable_progress_bar()

GREEDY_STEPS = 16
# Two forward passes that differ in rounding must not pick different tokens: the logit of each greedy
# token leads by at least this much, about a thousand times the f32 error of these models.
GREEDY_MARGIN = 0.02


def versions():
    packages = [torch, transformers, peft, safetensors, tokenizers, np]
    return {
        "python": platform.python_version(),
        **{package.__name__: package.__version__.split("+")[0] for package in packages},
    }


def write_json(path, value):
    """JSON with one line for each list of plain numbers."""
    path.write_text(indented(value, "") + "\n", encoding="utf-8")


def indented(value, margin):
    plain = not isinstance(value, (dict, list)) or (
        isinstance(value, list) and not any(isinstance(item, (dict, list)) for item in value)
    )
    if plain or not value:
        return json.dumps(value, ensure_ascii=False)
    inner = margin + "  "
    if isinstance(value, dict):
        lines = [f"{inner}{json.dumps(key)}: {indented(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{margin}}}"
    lines = [f"{inner}{indented(item, inner)}" for item in value]
    return "[\n" + ",\n".join(lines) + f"\n{margin}]"


def fresh_directory(path):
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def randomise(model, seed):
    """Fills `model` so that no part of it is idle.

    Attention scores spread over about 2 units, logits over about 3, residual contributions stay near 1,
    norm weights are random around 1 and biases are random.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, std):
        return torch.randn(shape, generator=generator) * std

    tied = model.config.tie_word_embeddings
    gains = {"q_proj": 1.4, "k_proj": 1.4, "lm_head": 3.0}
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith("bias"):
                parameter.copy_(normal(parameter.shape, 0.3))
            elif "norm" in name:
                parameter.copy_(1.0 + normal(parameter.shape, 0.25))
            elif "embed_tokens" in name:
                std = 3.0 / parameter.shape[1] ** 0.5 if tied else 1.0
                parameter.copy_(normal(parameter.shape, std))
            else:
                gain = gains.get(name.split(".")[-2], 1.0)
                parameter.copy_(normal(parameter.shape, gain / parameter.shape[1] ** 0.5))
    return model


def load(directory, dtype=torch.float32):
    """The model in `directory`, its weights widened to `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def logits_of(model, ids):
    """f32 (or f64) logits [positions, vocab] of one forward pass without a cache."""
    return model(torch.tensor([ids]), use_cache=False).logits[0]


@torch.no_grad()
def logits_token_by_token(model, ids):
    """Logits [positions, vocab], each position fed alone on top of the cache of those before it.

    `model` must be fresh: dynamic rope keeps the longest length it has seen.
    """
    cache = DynamicCache(config=model.config)
    rows = []
    for position, token in enumerate(ids):
        output = model(
            torch.tensor([[token]]),
            past_key_values=cache,
            position_ids=torch.tensor([[position]]),
            use_cache=True,
        )
        rows.append(output.logits[0, -1])
    return torch.stack(rows)


def greedy(next_logits, ids, steps=GREEDY_STEPS):
    """Greedy continuation, ends of sequence ignored: (ids, smallest lead of a chosen logit).

    `next_logits(ids)` gives the logits [vocab] after `ids`.
    """
    generated, margin = [], float("inf")
    for _ in range(steps):
        row = next_logits(ids + generated)
        best, second = torch.topk(row, 2).values.tolist()
        margin = min(margin, best - second)
        generated.append(int(row.argmax()))
    return generated, margin


def log_probs(logits):
    return torch.log_softmax(logits, dim=-1)
