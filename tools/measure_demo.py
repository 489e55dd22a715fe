"""Measures the demo ensemble on its two tasks: each model alone, static fusion, dynamic fusion.

    python tools/measure_demo.py [--models models/demo] [--count 400] [--json]

Dynamic Logits Fusion as the paper's equation 6 says it, literally: every candidate's fused distribution is written
out in float64 and both divergences are summed over the whole vocabulary.  Greedy decoding from the bf16 weights,
computed in float32.  `strict` asks for the task's form; `substance` looks for the right value anywhere.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from demo_data import EOS, prompt

GRID = [i / 10 for i in range(20)]  # 0.0, 0.1, ... 1.9
MAX_NEW_TOKENS = 32
TASKS = ("facts", "sums")


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def fuse(large, small, experts, grid):
    """Equation 6. Rows of logits [n, vocabulary]; returns log P~ [n, vocabulary], expert [n], alpha [n].

    One expert is active in P~; the loss sums over all of them. The first of equal losses wins.
    """
    large, small = large.double(), small.double()
    experts = [expert.double() for expert in experts]
    log_p, log_q = large.log_softmax(-1), small.log_softmax(-1)
    targets = [(kl(e.log_softmax(-1), log_q), kl(log_q, e.log_softmax(-1))) for e in experts]
    best = torch.full(large.shape[:1], torch.inf, dtype=torch.float64)
    fused, which, alpha = log_p.clone(), torch.zeros(len(large), dtype=torch.long), torch.zeros(len(large))
    for index, expert in enumerate(experts):
        for candidate in grid:
            log_fused = (large + candidate * (expert - small)).log_softmax(-1)
            there, back = kl(log_fused, log_p), kl(log_p, log_fused)
            loss = sum((there - first) ** 2 + (back - second) ** 2 for first, second in targets)
            better = loss < best
            best = torch.where(better, loss, best)
            fused[better], which[better], alpha[better] = log_fused[better], index, candidate
    return fused, which, alpha


@dataclass
class Method:
    name: str
    roles: list  # the models that run, in order
    choose: object  # their logits -> (scores [n, vocabulary], expert [n] or None, alpha [n] or None)


def methods(task):
    expert = f"expert-{task}"
    both = [f"expert-{name}" for name in TASKS]
    fusing = ["large", "small"]
    return [
        Method("large alone", ["large"], lambda a: (a, None, None)),
        Method("small alone", ["small"], lambda a: (a, None, None)),
        Method("expert alone", [expert], lambda a: (a, None, None)),
        Method("static, alpha 1", [*fusing, expert], lambda a, b, c: fuse(a, b, [c], [1.0])),
        Method("dynamic", [*fusing, expert], lambda a, b, c: fuse(a, b, [c], GRID)),
        Method("dynamic, both experts", [*fusing, *both], lambda a, b, *c: fuse(a, b, c, GRID)),
    ]


@torch.no_grad()
def complete(models, tokenizer, method, prompts):
    """Greedy completions of these prompts, and the list of (expert, alpha) of each step."""
    eos = tokenizer.token_to_id(EOS)
    encoded = [tokenizer.encode(text).ids for text in prompts]
    texts, traces = [None] * len(prompts), [None] * len(prompts)
    for length in sorted({len(ids) for ids in encoded}):  # equal lengths together: no padding anywhere
        members = [i for i, ids in enumerate(encoded) if len(ids) == length]
        tokens = torch.tensor([encoded[i] for i in members])
        caches, generated, steps = [None] * len(method.roles), [], []
        while len(generated) < MAX_NEW_TOKENS:
            logits = []
            for slot, role in enumerate(method.roles):
                output = models[role](input_ids=tokens, past_key_values=caches[slot], use_cache=True)
                caches[slot] = output.past_key_values
                logits.append(output.logits[:, -1])
            scores, which, alpha = method.choose(*logits)
            tokens = scores.argmax(-1, keepdim=True)
            generated.append(tokens)
            steps.append((which, alpha))
            if all(eos in row for row in torch.cat(generated, 1).tolist()):
                break
        for row, (member, ids) in enumerate(zip(members, torch.cat(generated, 1).tolist())):
            end = ids.index(eos) if eos in ids else len(ids)
            texts[member] = tokenizer.decode(ids[:end])
            if steps[0][0] is not None:
                traces[member] = [(int(w[row]), round(float(a[row]), 1)) for w, a in steps[: end + 1]]
    return texts, traces


def strict(task, text, answer):
    """Exact match in the task's form: the bare value, or the number after `####`."""
    if task == "facts":
        return text.strip().lower() == answer.lower()
    found = re.search(r"#### (-?[0-9.,]+)", text)
    return found is not None and found[1] == answer.split("#### ")[1]


def substance(task, text, answer):
    """The right value, whatever the form: the value among the words, or the last number."""
    if task == "facts":
        return answer.lower() in re.findall(r"[a-z]+", text.lower())
    numbers = re.findall(r"[0-9]+", text)
    return bool(numbers) and numbers[-1] == answer.split("#### ")[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(__file__).parent.parent / "models" / "demo")
    parser.add_argument("--count", type=int, default=400, help="problems of each task")
    parser.add_argument("--show", type=int, default=0, help="completions to print for each method")
    parser.add_argument("--json", action="store_true", help="one JSON object a line in place of the table")
    arguments = parser.parse_args()

    roles = ["large", "small", *(f"expert-{name}" for name in TASKS)]
    models = {r: LlamaForCausalLM.from_pretrained(arguments.models / r, dtype=torch.float32).eval() for r in roles}
    tokenizer = Tokenizer.from_file(str(arguments.models / "large" / "tokenizer.json"))
    if not arguments.json:
        print("| task | method | strict % | substance % | mean alpha | own expert % |\n|---|---|---|---|---|---|")
    for task in TASKS:
        lines = (arguments.models / "tasks" / f"{task}.jsonl").read_text().splitlines()[: arguments.count]
        problems = [json.loads(line) for line in lines]
        for method in methods(task):
            texts, traces = complete(models, tokenizer, method, [prompt(p["question"]) for p in problems])
            row = {"task": task, "method": method.name, "count": len(problems)}
            for name, judge in (("strict", strict), ("substance", substance)):
                hits = sum(judge(task, text, p["answer"]) for text, p in zip(texts, problems))
                row[name] = 100 * hits / len(problems)
            steps = [step for trace in traces if trace for step in trace]
            if steps:
                row["mean_alpha"] = sum(alpha for _, alpha in steps) / len(steps)
            if method.name.endswith("both experts"):
                row["own_expert"] = 100 * sum(which == TASKS.index(task) for which, _ in steps) / len(steps)
            if arguments.json:
                print(json.dumps(row), flush=True)
            else:
                numbers = [f"{row[k]:.2f}" if k in row else "" for k in ("mean_alpha", "own_expert")]
                print(f"| {task} | {method.name} | {row['strict']:.1f} | {row['substance']:.1f} | {' | '.join(numbers)} |")
                for text, trace, problem in list(zip(texts, traces, problems))[: arguments.show]:
                    print("   ", repr(problem["question"]), "->", repr(text), trace or "", flush=True)


if __name__ == "__main__":
    main()
