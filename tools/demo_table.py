#!/usr/bin/env python3
"""Measures the demo ensemble with the engine itself: exact matches of every method on both held-out tasks.

    cargo build --release && python3 tools/demo_table.py target/release/dlf-engine

Prints the README's table. Needs Python 3.9 and nothing else.
"""

import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path

TASKS = Path(__file__).resolve().parent.parent / "models" / "demo" / "tasks"
PROMPT = "Question: {question}\nAnswer:"
MODELS = TASKS.parent


def flags(*experts):
    """The ensemble with these experts; without any, the demo ensemble as it is in the binary."""
    models = ["--large", MODELS / "large", "--small", MODELS / "small"]
    for name in experts:
        models += ["--expert", f"{name}={MODELS / f'expert-{name}'}"]
    return [str(flag) for flag in models]


def methods(task):
    """(name in the table, flags)."""
    own, both = flags(task), flags("facts", "sums")
    return [
        ("large alone", [*own, "--method", "large"]),
        ("small alone", [*own, "--method", "small"]),
        ("the task's expert alone", [*own, "--method", "expert"]),
        ("static α = 1", [*own, "--method", "static"]),
        ("dynamic", own),
        ("dynamic, `--search refine`", [*own, "--search", "refine"]),
        ("dynamic, both experts", both),
    ]


def answers(engine, problems, more):
    """The texts, one a problem: greedy, up to the end of the text or 40 tokens."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as prompts:
        for problem in problems:
            prompts.write(json.dumps({"prompt": PROMPT.format(**problem)}) + "\n")
        prompts.flush()
        command = [engine, "generate", "--input", prompts.name, "--json", "-n", "40", *more]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [json.loads(line)["text"] for line in lines]


def right(text, answer):
    """Exact match of the whole answer, but for spaces around it."""
    return text.strip() == answer.strip()


def result_right(text, answer):
    """For sums: the number after ####, whatever stands before it."""
    mark = text.rsplit("####", 1)[-1] if "####" in text else ""
    return mark.strip() == answer.rsplit("####", 1)[-1].strip()


def cell(hits, count):
    """Per cent with half the width of the 95 % Wilson interval."""
    p, z = hits / count, 1.96
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return f"{100 * p:.1f} ± {100 * half:.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    arguments = parser.parse_args()
    problems = {
        task: [json.loads(line) for line in (TASKS / f"{task}.jsonl").read_text().splitlines()]
        for task in ("facts", "sums")
    }
    rows = {}
    for task, match in (("facts", right), ("sums", result_right)):
        for name, more in methods(task):
            texts = answers(arguments.engine, problems[task], more)
            hits = sum(match(text, problem["answer"]) for text, problem in zip(texts, problems[task]))
            rows.setdefault(name, []).append(cell(hits, len(texts)))
    counts = [len(problems[task]) for task in ("facts", "sums")]
    print(f"| method | facts (n = {counts[0]}) | sums (n = {counts[1]}) |")
    print("|---|---|---|")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
