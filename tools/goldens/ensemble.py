"""tests/goldens/ensemble: Dynamic Logits Fusion on four tiny models, as the paper writes it, in numpy float64.

transformers computes the logits (f32, no cache, the whole sequence again at each step). All else is plain
numpy on rows widened to float64: softmaxes, Kullback-Leibler divergences by their definition, and a search
that tries every candidate in turn (Algorithm 1; equations 2 and 6 of arXiv 2406.15480).
"""

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from . import models

STEPS = 24
PROMPT_LENGTH = 12
# The models' own widths; the ids that all of them know are the first 131.
VOCAB = {"large": 131, "small": 133, "expert_0": 132, "expert_1": 132}
SHARED = min(VOCAB.values())
GRID = [k * 0.1 for k in range(20)]
# The second-best candidate loses by this much, and the chosen token leads by this much: rounding of f32
# logits (about 1e-5 here) cannot change a decision.
LOSS_MARGIN = 5e-4
TOKEN_MARGIN = 0.01

METHODS = {
    "dynamic_one": {"experts": ["expert_0"], "static": None},
    "dynamic_two": {"experts": ["expert_0", "expert_1"], "static": None},
    "static_one": {"experts": ["expert_0"], "static": [1.0]},
    "static_two": {"experts": ["expert_0", "expert_1"], "static": [0.5, 0.7]},
}


def log_softmax(logits):
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def kl(p, q):
    """Equation 1: KL(p||q) of two rows of log-probabilities."""
    return float((np.exp(p) * (p - q)).sum())


def fuse(large, small, experts, alphas):
    """Equation 2: the fused logits."""
    fused = large.copy()
    for alpha, expert in zip(alphas, experts):
        fused += alpha * (expert - small)
    return fused


def objective(large, small, experts, alphas):
    """Equation 6 at `alphas`: (loss, KL(fused||large), KL(large||fused))."""
    p_large, p_small = log_softmax(large), log_softmax(small)
    p_fused = log_softmax(fuse(large, small, experts, alphas))
    fused_large, large_fused = kl(p_fused, p_large), kl(p_large, p_fused)
    loss = 0.0
    for expert in experts:
        p_expert = log_softmax(expert)
        loss += (fused_large - kl(p_expert, p_small)) ** 2 + (large_fused - kl(p_small, p_expert)) ** 2
    return loss, fused_large, large_fused


def search(large, small, experts):
    """Every candidate of every expert, one expert active: (expert, alpha, margin). Ties keep the first."""
    losses, best, choice = [], float("inf"), None
    for active in range(len(experts)):
        for alpha in GRID:
            loss, _, _ = objective(large, small, experts, one_hot(active, alpha, len(experts)))
            losses.append(loss)
            if loss < best:
                best, choice = loss, (active, alpha)
    second = sorted(losses)[1]
    return *choice, second - best


def one_hot(active, alpha, count):
    return [alpha if t == active else 0.0 for t in range(count)]


def step(rows, method):
    """The decision at one step from the models' logits, all of them cut to the shared ids."""
    large, small = rows["large"], rows["small"]
    experts = [rows[name] for name in method["experts"]]
    record = {}
    if method["static"] is None:
        expert, alpha, margin = search(large, small, experts)
        alphas = one_hot(expert, alpha, len(experts))
        record.update(expert=expert, alpha=alpha, margin=margin)
    else:
        alphas = method["static"]
    loss, fused_large, large_fused = objective(large, small, experts, alphas)
    fused = fuse(large, small, experts, alphas)
    token = int(fused.argmax())
    second, first = np.sort(fused)[-2:]
    return {
        "token": token,
        "alphas": alphas,
        **record,
        "loss": loss,
        "kl_fused_large": fused_large,
        "kl_large_fused": large_fused,
        "kl_expert_small": [kl(log_softmax(expert), log_softmax(small)) for expert in experts],
        "kl_small_expert": [kl(log_softmax(small), log_softmax(expert)) for expert in experts],
        "log_prob": float(log_softmax(fused)[token]),
        "token_margin": float(first - second),
    }


def generate(loaded, method, prompt):
    """(records of the steps, {role: f32 logits [steps, vocab of the role]}), or None at a near-tie."""
    ids, records = list(prompt), []
    roles = ["large", "small", *method["experts"]]
    logits = {role: [] for role in roles}
    for _ in range(STEPS):
        rows = {}
        for role in roles:
            row = models.logits_of(loaded[role], ids)[-1]
            logits[role].append(row)
            rows[role] = row[:SHARED].double().numpy()
        record = step(rows, method)
        if record["token_margin"] < TOKEN_MARGIN or record.get("margin", 1.0) < LOSS_MARGIN:
            return None
        records.append(record)
        ids.append(record["token"])
    return records, {role: torch.stack(rows) for role, rows in logits.items()}


def write_models(output, seed):
    """Four directories. An expert is the small model, its weights moved; it has one row less."""
    large = LlamaConfig(
        vocab_size=VOCAB["large"], hidden_size=48, intermediate_size=88, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )
    small = LlamaConfig(
        vocab_size=VOCAB["small"], hidden_size=32, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )
    expert = LlamaConfig(**{**small.to_dict(), "vocab_size": VOCAB["expert_0"]})
    large_model = models.randomise(LlamaForCausalLM(large), seed)
    small_model = models.randomise(LlamaForCausalLM(small), seed + 1)
    large_model.to(torch.bfloat16).save_pretrained(output / "large")
    state = small_model.state_dict()
    for n, strength in enumerate([0.2, 0.35]):
        generator = torch.Generator().manual_seed(seed + 10 + n)
        model = LlamaForCausalLM(expert)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                origin = state[name][: parameter.shape[0]]
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(origin + strength * origin.std() * noise)
        model.to(torch.bfloat16).save_pretrained(output / f"expert_{n}")
    small_model.to(torch.bfloat16).save_pretrained(output / "small")


def varied(results):
    """Whether the search has something to find: many alphas, and both experts in turn."""
    alphas = [{record["alpha"] for record in results[name][0]} for name in ("dynamic_one", "dynamic_two")]
    active = [record["expert"] for record in results["dynamic_two"][0]]
    tokens = {record["token"] for record in results["dynamic_one"][0]}
    return min(map(len, alphas)) >= 7 and STEPS // 4 <= sum(active) <= 3 * STEPS // 4 and len(tokens) >= 12


def attempt(output, seed):
    """(prompt, results by method) of one seed, or None."""
    models.fresh_directory(output)
    write_models(output, seed)
    loaded = {role: models.load(output / role) for role in VOCAB}
    generator = torch.Generator().manual_seed(seed + 20)
    prompt = torch.randint(3, SHARED, (PROMPT_LENGTH,), generator=generator).tolist()
    results = {}
    for name, method in METHODS.items():
        results[name] = generate(loaded, method, prompt)
        if results[name] is None:
            return None
    return (prompt, results) if varied(results) else None


def make(output):
    """Writes the models, golden.json and logits.safetensors under `output`."""
    for seed in range(100, 40000, 100):
        made = attempt(output, seed)
        if made is not None:
            break
    else:
        raise ValueError("no seed gives clear decisions")
    prompt, results = made
    tensors = {f"{name}.{role}": rows for name, (_, logits) in results.items() for role, rows in logits.items()}
    save_file(tensors, output / "logits.safetensors")
    models.write_json(
        output / "golden.json",
        {
            "what": "Dynamic Logits Fusion, greedy, by definition in float64; ends of sequence ignored",
            "seed": seed,
            "vocab_sizes": VOCAB,
            "shared_vocab": SHARED,
            "input_ids": prompt,
            "alpha_candidates": GRID,
            "methods": {name: {**METHODS[name], "steps": results[name][0]} for name in METHODS},
            "versions": models.versions(),
        },
    )
