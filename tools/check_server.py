"""Check `dlf-engine serve` with real clients: the openai package and lm-eval's local-completions.

    python tools/check_server.py --binary target/release/dlf-engine [--limit 20]

Starts the server on the demo ensemble at a free port. The openai package completes, chats, streams and is told what
is wrong. lm-eval generates, scores log-likelihoods and answers multiple choice on the demo's tasks, with the server's
own tokenizer; every generated text is compared with `dlf-engine generate`, every log-likelihood with
`dlf-engine score`, and the scores of the tasks with `dlf-engine eval`. Needs tools/requirements-server.txt and no network.
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEY = "a-key-for-the-check"
# lm-eval sends token ids and adds no BOS of its own, so the prompt names it.
BOS = "<s>"
PROMPT = "Question: {question}\nAnswer:"


@contextlib.contextmanager
def server(binary):
    """The server's base URL; leaving the context stops it and checks that it ends well."""
    process = subprocess.Popen(
        [binary, "serve", "--port", "0", "--api-key", KEY, "--batch-size", "16"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stderr.readline()
        found = re.search(r"http://\S+", line)
        assert found, f"the server said {line!r}"
        yield found.group()
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
    assert code == 0, f"the server ended with {code}: {process.stderr.read()}"


def engine(binary, command, lines, *arguments):
    """Runs a batch command of the binary on JSON lines and returns its JSON lines."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()
        ran = subprocess.run(
            [binary, command, "--input", file.name, "--json", "--quiet", *arguments],
            check=True,
            capture_output=True,
            text=True,
        )
    return [json.loads(line) for line in ran.stdout.splitlines()]


def check_openai(url, binary):
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    question = "Tom has 17 apples and buys 25 more. How many apples does Tom have?"
    prompt = PROMPT.format(question=question)
    [expected] = engine(binary, "generate", [{"prompt": prompt}], "--max-new-tokens", "32")

    ids = [model.id for model in client.models.list()]
    assert ids[0] == "demo" and "demo:large" in ids, ids
    whole = client.completions.create(model="demo", prompt=prompt, max_tokens=32, temperature=0, logprobs=2)
    choice = whole.choices[0]
    assert choice.text == expected["text"], (choice.text, expected["text"])
    assert choice.finish_reason == expected["finish_reason"]
    assert whole.usage.completion_tokens == len(choice.logprobs.tokens) == len(expected["token_ids"])
    stream = client.completions.create(model="demo", prompt=prompt, max_tokens=32, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected["text"]

    messages = [{"role": "user", "content": question}]
    settings = dict(model="demo", messages=messages, max_tokens=32, temperature=0)
    chat = client.chat.completions.create(
        **settings, logprobs=True, top_logprobs=2, extra_body={"dlf": {"return_alpha": True}}
    )
    choice = chat.choices[0]
    assert choice.message.role == "assistant" and choice.message.content == expected["text"]
    assert len(choice.logprobs.content) == chat.usage.completion_tokens
    assert len(choice.dlf["alpha"]) == chat.usage.completion_tokens
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected["text"] and chunks[-1].usage == chat.usage

    for error, call in [
        (openai.BadRequestError, lambda: client.completions.create(model="demo", prompt="a", temperature=-1)),
        (openai.BadRequestError, lambda: client.completions.create(model="demo", prompt=[10**6])),
        (openai.BadRequestError, lambda: client.completions.create(model="demo", prompt="a", stop=[""], stream=True)),
        (openai.NotFoundError, lambda: client.completions.create(model="other", prompt="a")),
        (openai.AuthenticationError, lambda: client.with_options(api_key="wrong").models.list()),
    ]:
        try:
            call()
        except error as raised:
            assert isinstance(raised.body, dict) and raised.body["message"], raised
        else:
            raise AssertionError(f"no {error.__name__}")
    print("openai: models, completions, chat, streams and errors are as they should be")


def tasks(folder):
    """Writes the data and the descriptions of three tasks."""

    def rows(name):
        return [json.loads(line) for line in open(ROOT / "models/demo/tasks" / f"{name}.jsonl")]

    def kind(row):
        return tuple(row["question"].split(" ")[:2])

    sums, facts = rows("sums"), rows("facts")
    by_kind = {}
    for row in facts:
        by_kind.setdefault(kind(row), []).append(row["answer"])
    for index, row in enumerate(facts):
        others = sorted(set(by_kind[kind(row)]) - {row["answer"]})
        start = index % max(1, len(others) - 2)
        row["choices"] = [row["answer"], *others[start : start + 3]]
        # The right one isn't always the first.
        turn = index % len(row["choices"])
        row["choices"] = row["choices"][turn:] + row["choices"][:turn]
        row["label"] = row["choices"].index(row["answer"])
    for row in sums:
        row["number"] = row["answer"].split("#### ")[1]
    for name, data in [("sums", sums), ("facts", facts)]:
        with open(folder / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in data)

    def task(name, data, **description):
        description = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{data}.jsonl")}},
            "test_split": "test",
            "doc_to_text": BOS + PROMPT.replace("{question}", "{{question}}"),
            "target_delimiter": " ",
            **description,
        }
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps(description))

    number = [
        {"function": "regex", "regex_pattern": r"#### (-?\d+)", "group_select": -1},
        {"function": "take_first"},
    ]
    task(
        "demo_sums",
        "sums",
        output_type="generate_until",
        doc_to_target="{{number}}",
        generation_kwargs={"until": ["\n\n", "Question:"], "max_gen_toks": 40, "temperature": 0},
        filter_list=[{"name": "number", "filter": number}],
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    task("demo_facts_likelihood", "facts", output_type="loglikelihood", doc_to_target="{{answer}}",
         metric_list=[{"metric": "acc"}, {"metric": "perplexity"}])
    task("demo_facts_choice", "facts", output_type="multiple_choice", doc_to_choice="{{choices}}",
         doc_to_target="{{label}}", metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}])


EVAL_TASKS = {
    "demo_sums": ("sums", ["exact_match"], """
[generate]
max_new_tokens = 40
stop = ["\\n\\n", "Question:"]
extract = { after = "####" }
references = "number"
"""),
    "demo_facts_choice": ("facts", ["acc", "acc_norm"], """
[choice]
choices = "choices"
answer = "label"
continuation = " {{ choice }}"
"""),
}


def check_eval(binary, folder, limit, method, results):
    """The scores of lm-eval are those of `dlf-engine eval` on the same samples."""
    scores = {}
    for name, (data, metrics, rest) in EVAL_TASKS.items():
        file = folder / f"{name}.toml"
        prompt = json.dumps(PROMPT.replace("{question}", "{{ question }}"))
        file.write_text(f'name = "{name}"\nprompt = {prompt}\nmetrics = {json.dumps(metrics)}\n{rest}')
        command = [binary, "eval", "--task", file, "--data", folder / f"{data}.jsonl", "--limit", str(limit),
                   "--method", method, "--device", "cpu", "--quiet", "--json"]
        rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["rows"]
        of_lm_eval = {key.partition(",")[0]: value for key, value in results[name].items()}
        for row in rows:
            metric = row["metric"]
            assert math.isclose(row["score"], of_lm_eval[metric], rel_tol=1e-12), (name, metric, row, results[name])
            scores[f"{name} {metric}"] = row["score"]
    return scores


def check_lm_eval(url, binary, limit, model):
    import lm_eval
    from lm_eval.tasks import TaskManager

    names = ["demo_sums", "demo_facts_likelihood", "demo_facts_choice"]
    with tempfile.TemporaryDirectory() as folder:
        tasks(pathlib.Path(folder))
        results = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": model,
                "base_url": f"{url}/v1/completions",
                "auth_token": KEY,
                "num_concurrent": 4,
                "max_retries": 1,
                "max_length": 256,
            },
            tasks=names,
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            limit=limit,
            batch_size=8,
            bootstrap_iters=0,
            log_samples=True,
        )
        method = model.partition(":")[2] or "dynamic"
        equal = check_eval(binary, pathlib.Path(folder), limit, method, results["results"])
        assert equal, "nothing was compared"
    method = ["--method", method]

    samples = sorted(results["samples"]["demo_sums"], key=lambda sample: sample["doc_id"])
    lines = [{"prompt": PROMPT.format(question=sample["doc"]["question"])} for sample in samples]
    stops = ["--stop", "\n\n", "--stop", "Question:", "--stop", "</s>"]
    expected = engine(binary, "generate", lines, "--max-new-tokens", "40", *stops, *method)
    for sample, line in zip(samples, expected, strict=True):
        assert sample["resps"][0][0] == line["text"], (sample["resps"], line["text"])

    asked = []
    for name in names[1:]:
        for sample in results["samples"][name]:
            arguments = sample["arguments"]
            arguments = arguments.values() if isinstance(arguments, dict) else arguments
            pairs = [list(a.values())[:2] if isinstance(a, dict) else a[:2] for a in arguments]
            asked += [(pair, response[0]) for pair, response in zip(pairs, sample["resps"], strict=True)]
    lines = [{"prompt": context.removeprefix(BOS), "text": target} for (context, target), _ in asked]
    scored = engine(binary, "score", lines, *method)
    longest = max(len(line["ids"]) for line in scored)
    prompts = [{"prompt": line["prompt"]} for line in lines]
    said = engine(binary, "generate", prompts, "--max-new-tokens", str(longest), "--ignore-eos", *method)
    worst, greedy_ones = 0.0, 0
    for (pair, response), line, says in zip(asked, scored, said, strict=True):
        logprob, greedy = float(response[0]), str(response[1]) == "True"
        expected = line["sum_logprob_fused"]
        worst = max(worst, abs(logprob - expected))
        # lm-eval adds the same numbers in another order at most.
        assert math.isclose(logprob, expected, rel_tol=1e-12, abs_tol=1e-12), (pair, logprob, expected)
        greedy_ones += greedy
        assert greedy == (says["token_ids"][: len(line["ids"])] == line["ids"]), (pair, response)
    print(f"dlf-engine eval, {model}: the same scores: {json.dumps(equal)}")
    scores = {name: {k: v for k, v in results["results"][name].items() if isinstance(v, float)} for name in names}
    print(f"lm-eval {lm_eval.__version__}, {model}: {len(samples)} texts and {len(asked)} log-likelihoods ({greedy_ones} "
          f"greedy) equal the engine's (largest difference {worst:.1e}); {json.dumps(scores)}")
    return greedy_ones


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=str(ROOT / "target/release/dlf-engine"))
    parser.add_argument("--limit", type=int, default=20, help="samples of each task")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(HF_HOME=cache, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OPENAI_API_KEY=KEY)
        os.environ.update(TQDM_DISABLE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
        with server(arguments.binary) as url:
            check_openai(url, arguments.binary)
            models = ["demo", "demo:large", "demo:expert:facts"]
            greedy = [check_lm_eval(url, arguments.binary, arguments.limit, model) for model in models]
            assert any(greedy), "no continuation was greedy: the check of `is_greedy` saw one side only"


if __name__ == "__main__":
    main()
