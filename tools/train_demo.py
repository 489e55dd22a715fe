"""Trains the demo ensemble in models/demo: one large model, one small model, two experts.

    python tools/train_demo.py large replies balance &
    python tools/train_demo.py small facts sums tasks    # the experts start from the small model

Every part is seeded and writes one Hugging Face directory (bf16 weights); `tasks` writes the held-out problems.
No text or weight comes from outside: demo_data.py generates everything.

Made with Python 3.11, torch 2.15.0, transformers 5.23.0, tokenizers 0.23.3, safetensors 0.8.0, numpy 2.4.6.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads ruin a machine that does other work too

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from demo_data import BOS, CHAT_TEMPLATE, EOS, World, prompt, train_tokenizer

WORLD_SEED, TASK_SEED, TOKENIZER_SEED = 2024, 3, 7
CONTEXT = 96  # tokens in a pre-training row
MAX_POSITIONS = 256
BATCH = 16  # pre-training rows in a batch
WARMUP, DECAY = 50, 0.4  # steps; last share of the steps, in which the rate falls to zero

SIZES = {
    "large": dict(hidden_size=192, num_hidden_layers=7, num_attention_heads=6, num_key_value_heads=2, intermediate_size=512),
    "small": dict(hidden_size=96, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1, intermediate_size=256),
}
# Phases: (mixture, steps of the schedule, steps taken of it).
# The large model's first two phases stop before their schedules end; the next, with its own schedule, takes over.
# `replies` and `balance` each go on from the saved large model, with new optimizer states, and replace it.
PRETRAINING = {
    "large": dict(seed=1, phases=[("wide", 2929, 2000), ("deep", 900, 300), ("stories", 800, 800)]),
    "replies": dict(seed=3, phases=[("replies", 400, 400)]),
    "balance": dict(seed=4, phases=[("balance", 400, 400)]),
    "small": dict(seed=2, phases=[("wide", 1822, 1822)]),
}
FINE_TUNING = {
    "facts": dict(seed=11, epochs=5, batch=16, lr=7e-4),
    "sums": dict(seed=12, epochs=6, batch=16, lr=1e-3),
}


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by a Newton-Schulz iteration (Jordan et al., 2024), in f32 and by shape."""

    def __init__(self, parameters, lr, momentum=0.95, iterations=4):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, iterations=iterations))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    mean.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(mean, group["momentum"]))
                x = torch.stack(updates)
                x = x.mT if rows > columns else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(group["iterations"]):
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = x.mT if rows > columns else x
                for parameter, update in zip(parameters, x):
                    parameter.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def make_tokenizer(world, tasks):
    """A tokenizer of 20,000 pre-training documents and the fine-tuning texts."""
    rng = random.Random(TOKENIZER_SEED)
    texts = [world.document(rng) for _ in range(20_000)]
    texts += [f"{prompt(p['question'])} {p['answer']}" for train, _ in tasks.values() for p in train]
    return train_tokenizer(texts, vocab_size=2048)


def rows(world, mixture, tokenizer, rng, count):
    """[count, CONTEXT + 1] token ids: whole documents, each `<s> ... </s>`; only the last of a row is cut."""
    eos = tokenizer.token_to_id(EOS)
    full = []
    while len(full) < count:
        row = []
        while len(row) <= CONTEXT:
            row += tokenizer.encode(world.document(rng, mixture)).ids + [eos]
        full.append(row[: CONTEXT + 1])
    return torch.tensor(full)


def rate(step, steps):
    return min(1, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))


def descend(optimizers, base_rates, factor):
    for optimizer, base in zip(optimizers, base_rates):
        for group in optimizer.param_groups:
            group["lr"] = base * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def pretrain(world, tokenizer, size, seed, phases, start, checkpoint, log):
    """The trained model, from new weights or those in `start`. A stopped run goes on from `checkpoint`, all the same."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        **SIZES[size],
    )
    model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32) if start else LlamaForCausalLM(config)
    embedding = model.model.embed_tokens.weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim == 1] + [embedding]
    optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    plan = [(mixture, step, scheduled) for mixture, scheduled, taken in phases for step in range(taken)]
    done, total = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        done, total = state["done"], state["total"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        for mixture, _, _ in plan[:done]:
            rows(world, mixture, tokenizer, rng, BATCH)
    for index in range(done, len(plan)):
        mixture, step, scheduled = plan[index]
        batch = rows(world, mixture, tokenizer, rng, BATCH)
        hidden = model.model(input_ids=batch[:, :-1]).last_hidden_state
        loss = F.cross_entropy(hidden.flatten(0, 1) @ embedding.T, batch[:, 1:].flatten())
        loss.backward()
        descend(optimizers, [0.02, 3e-3], rate(step, scheduled))
        total += loss.item()
        if (index + 1) % 100 == 0:
            log(index + 1, len(plan), total / 100)
            total = 0.0
            saved = [optimizer.state_dict() for optimizer in optimizers]
            state = {"done": index + 1, "total": total, "model": model.state_dict(), "optimizers": saved}
            torch.save(state, checkpoint)
    checkpoint.unlink(missing_ok=True)
    return model


def encode(tokenizer, problems):
    """(token ids of prompt and completion, `</s>` included; length of the prompt) of each problem."""
    examples = []
    for problem in problems:
        asked = tokenizer.encode(prompt(problem["question"])).ids
        whole = tokenizer.encode(f"{prompt(problem['question'])} {problem['answer']}").ids
        assert whole[: len(asked)] == asked, "the prompt must be a prefix of its text in tokens too"
        examples.append((whole + [tokenizer.token_to_id(EOS)], len(asked)))
    return examples


def pad(examples):
    """Inputs [n, width], the targets of the completions (-100 elsewhere), and which positions hold a token."""
    width = max(len(ids) for ids, _ in examples)
    inputs = torch.zeros(len(examples), width, dtype=torch.long)
    targets, real = torch.full_like(inputs, -100), torch.zeros_like(inputs, dtype=torch.bool)
    for row, (ids, asked) in enumerate(examples):
        inputs[row, : len(ids)] = torch.tensor(ids)
        targets[row, asked : len(ids)] = torch.tensor(ids[asked:])
        real[row, : len(ids)] = True
    return inputs, targets, real


def fine_tune(tokenizer, small, problems, others, seed, epochs, batch, lr, log):
    """Full fine-tuning on the completions of `problems`; prompts carry no loss.

    On the texts of `others`, the other task, the expert is held to the small model by KL(small || expert), so that
    an expert stays silent (equal to the small model) in the task that is not its own.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    base = LlamaForCausalLM.from_pretrained(small, dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(small, dtype=torch.float32)
    examples, others = encode(tokenizer, problems), encode(tokenizer, others)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    batches = len(examples) // batch
    for epoch in range(epochs):
        rng.shuffle(examples)
        total = held = 0.0
        for index in range(batches):
            inputs, targets, _ = pad(examples[index * batch : (index + 1) * batch])
            logits = model(input_ids=inputs).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
            inputs, _, real = pad(rng.sample(others, batch // 2))
            with torch.no_grad():
                wanted = base(input_ids=inputs).logits[real].log_softmax(-1)
            got = model(input_ids=inputs).logits[real].log_softmax(-1)
            kl = F.kl_div(got, wanted, log_target=True, reduction="batchmean")
            (loss + kl).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            descend([optimizer], [lr], 1 - (epoch * batches + index) / (epochs * batches))
            total, held = total + loss.item(), held + kl.item()
        log(epoch + 1, epochs, total / batches)
    print(f"KL(small || expert) on the other task's texts: {held / batches:.4f}")
    return model


def save(model, tokenizer, folder):
    """config.json, generation_config.json, model.safetensors (bf16), tokenizer.json, tokenizer_config.json."""
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=model.config.eos_token_id, max_new_tokens=48
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")


def write_tasks(tasks, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, test) in tasks.items():
        lines = "".join(json.dumps(problem) + "\n" for problem in test)
        (folder / f"{name}.jsonl").write_text(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["large", "replies", "balance", "small", "facts", "sums", "tasks"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "models" / "demo")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (one beside another part)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    world = World(WORLD_SEED)
    tasks = world.tasks(TASK_SEED)
    tokenizer = make_tokenizer(world, tasks)
    for part in arguments.parts:
        wall, cpu = time.time(), time.process_time()

        def log(step, steps, loss):
            spent = f"{time.time() - wall:.0f} s, {time.process_time() - cpu:.0f} s of processor"
            print(f"{part}: {step}/{steps} loss {loss:.4f} ({spent})", flush=True)

        if part == "tasks":
            write_tasks(tasks, arguments.out / "tasks")
            continue
        if part in PRETRAINING:
            size, start = ("large", arguments.out / "large") if part in ("replies", "balance") else (part, None)
            folder = arguments.out / size
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint = folder / "checkpoint.pt"
            plan = PRETRAINING[part]
            model = pretrain(world, tokenizer, size, start=start, checkpoint=checkpoint, log=log, **plan)
        else:
            (other,) = FINE_TUNING.keys() - {part}
            problems, others = tasks[part][0], tasks[other][0]
            model = fine_tune(tokenizer, arguments.out / "small", problems, others, log=log, **FINE_TUNING[part])
            folder = arguments.out / f"expert-{part}"
        print(f"{part}: {sum(p.numel() for p in model.parameters())} parameters")
        save(model, tokenizer, folder)


if __name__ == "__main__":
    main()
