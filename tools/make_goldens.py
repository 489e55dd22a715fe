#!/usr/bin/env python3
"""Makes the data under tests/goldens with outside engines: transformers, PEFT and numpy.

    python3 tools/make_goldens.py tiny        tests/goldens/tiny      tiny Llamas and LoRA adapters
    python3 tools/make_goldens.py ensemble    tests/goldens/ensemble  the whole method, step by step
    python3 tools/make_goldens.py smollm2 --f32 DIR --bf16 DIR        tests/goldens/smollm2.json

The directories of the last one come from tools/convert_smollm2.py. The committed files were made on
Python 3.11 and an x86-64 CPU by

    torch==2.15.0 transformers==5.23.0 peft==0.21.2 safetensors==0.8.0 tokenizers==0.23.3 numpy==2.4.6

One thread, fixed seeds: with these versions the files come out the same, byte for byte.
tests/goldens/README.md says what each file holds.
"""

import argparse
from pathlib import Path

from goldens import ensemble, smollm2, tiny

GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "goldens"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=GOLDENS, help="directory of the goldens [%(default)s]")
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("tiny", help="parity of the forward pass on tiny models")
    kinds.add_parser("ensemble", help="the whole method on a tiny ensemble")
    smollm2_parser = kinds.add_parser("smollm2", help="parity on SmolLM2-135M-Instruct")
    smollm2_parser.add_argument("--f32", type=Path, required=True, help="converted with --dtype f32")
    smollm2_parser.add_argument("--bf16", type=Path, required=True, help="converted with --dtype bf16")
    arguments = parser.parse_args()
    if arguments.kind == "tiny":
        tiny.make(arguments.output / "tiny")
    elif arguments.kind == "ensemble":
        ensemble.make(arguments.output / "ensemble")
    else:
        smollm2.make(arguments.output / "smollm2.json", {"f32": arguments.f32, "bf16": arguments.bf16})


if __name__ == "__main__":
    main()
