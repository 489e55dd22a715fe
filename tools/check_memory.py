"""Checks how much memory a generation takes: the mapped weights, the key-value cache, and less than 100 MB.

A prompt of 512 tokens is read and 64 more are decoded, on two threads; the peak is what the kernel counts as resident,
pages of the mapped weights included. Needs nothing but Python.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

PROMPT, NEW = 512, 64
BLOCK = 16  # positions of the cache are reserved in blocks of so many
MOST_BESIDES = 100e6


def peak_bytes(command: list[str]) -> int:
    """Runs a command, and returns its largest resident set."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", required=True)
    parser.add_argument("model", nargs="+", type=Path)
    arguments = parser.parse_args()
    failed = False
    for model in arguments.model:
        report = json.loads(subprocess.check_output([arguments.binary, "inspect", "--json", str(model)]))
        described = report["models"][0]
        weights = described["weight_bytes"]
        cache = described["kv_bytes_per_token"] * -(-(PROMPT + NEW) // BLOCK) * BLOCK
        ids = ",".join(str(1000 + 7 * k) for k in range(PROMPT))
        request = ["--prompt-ids", ids, "--max-new-tokens", str(NEW), "--ignore-eos"]
        place = ["--device", "cpu", "--threads", "2", "--method", "large", "--large", str(model)]
        command = [arguments.binary, "generate", *place, *request]
        peak = peak_bytes(command)
        besides = peak - weights - cache
        mb = [round(number / 1e6, 1) for number in (peak, weights, cache, besides)]
        print("{}: {} MB at most: weights {}, cache {}, besides {}".format(model.name, *mb))
        # Less than its weights would mean that the peak isn't what it is taken for.
        failed |= not 0 < besides < MOST_BESIDES
    if failed:
        sys.exit("a model must take more than its weights and its cache, and less than 100 MB besides")


if __name__ == "__main__":
    main()
