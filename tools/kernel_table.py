"""Writes the README.md of a folder of kernels: what each kernel computes, from the comment that opens it, and what it became.

The comment stands right above the function whose name, with or without a suffix (`_bf16_4`), is the kernel's symbol.
Its first paragraph says what is computed; lines that start with `grid`, `shared`, `bytes`, `bound` or
`needs` go on until the next of them or an empty one. Where a function has no such line, that of the file's opening
comment holds.
"""

import re
import sys
from pathlib import Path

FIELDS = ["grid", "shared", "bytes", "bound", "needs"]
REQUIRED = ["computes", "grid", "bytes"]
SHOWN = ["sm_80", "sm_90", "sm_120"]

HEAD = """# Kernels

Made by `tools/build_kernels.py`, which also fails with `--check` where this file isn't what the sources give.

A kernel opens with a comment: what it computes as a formula, then `grid`, `shared`, `bytes`, `bound` and `needs`, a
word each and the text behind it; `grid` and `bytes` are due. The comment that opens a file says what all its kernels
share. Shapes and types of what a kernel reads and writes stand at the fields of its `…Args`. The build fails where a
kernel whose `bound` is memory bandwidth has no 16-byte load, or one bound by tensor cores doesn't use them.

Registers are those of ptxas, a thread. *Loads* are instructions in the machine code for sm_90: 16-byte loads from
device memory over all loads from there. *Tensor* are its tensor-core instructions. Shared memory is what the image
fixes; what a launch asks for on top is said under `shared`. *Spills* are bytes on any of six chips, sm_80 to sm_120."""


def comment_above(lines: list[str], index: int) -> list[str]:
    """The `//` lines that end right above `index`, over a template's head."""
    end = index
    while end and re.match(r"\s*(template\b|__launch_bounds__|extern \"C\" __global__\s*\\?$)", lines[end - 1]):
        end -= 1
    start = end
    while start and lines[start - 1].startswith("//"):
        start -= 1
    return [line[2:].strip() for line in lines[start:end]]


def parse(comment: list[str]) -> dict[str, str]:
    """Fields of a comment; `computes` is its first paragraph."""
    fields: dict[str, str] = {}
    current = "computes"
    for line in comment:
        word, _, rest = line.partition(" ")
        if word in FIELDS:
            current, line = word, rest.strip()
        elif not line:
            current = ""
        if current and line:
            fields[current] = f"{fields[current]} {line}" if current in fields else line
    return fields


def documented(headers: Path, unit: Path) -> dict[str, dict[str, str]]:
    """Fields of every function of `unit` and of what it includes from `headers`, by the function's name."""
    found = {}
    texts = [unit]
    for text in texts:
        source = text.read_text(encoding="utf-8")
        for name in re.findall(r'^#include "(\w+\.cuh)"', source, re.MULTILINE):
            if headers / name not in texts:
                texts.append(headers / name)
        lines = source.splitlines()
        opening = next((n for n, line in enumerate(lines) if not line.startswith("//")), 0)
        shared = {key: text for key, text in parse([line[2:].strip() for line in lines[:opening]]).items() if key in FIELDS}
        for index, line in enumerate(lines):
            match = re.match(r"(?:extern \"C\" __global__|__device__).*?\bvoid (\w+)\(", line)
            own = parse(comment_above(lines, index)) if match else {}
            if "computes" in own:
                found[match[1]] = shared | own | {"file": text.name}
    return found


def family(symbol: str, functions: dict[str, dict[str, str]]) -> str | None:
    """The documented function that `symbol` is, perhaps with a suffix."""
    fitting = [name for name in functions if symbol == name or symbol.startswith(f"{name}_")]
    return max(fitting, key=len, default=None)


def table(folder: Path, headers: Path, reports: list[dict]) -> str:
    """The text of README.md for the sources in `folder`; exits where a kernel's comment lacks something."""
    families: dict[tuple[str, str], tuple[dict[str, str], dict[str, dict[str, dict]]]] = {}
    for module in sorted({row["module"] for row in reports}):
        functions = documented(headers, folder / f"{module}.cu")
        for row in (row for row in reports if row["module"] == module):
            name = family(row["kernel"], functions)
            if name is None:
                sys.exit(f"{module}.cu: {row['kernel']} has no comment that tells what it computes")
            fields = functions[name]
            missing = [key for key in REQUIRED if key not in fields]
            if missing:
                sys.exit(f"{folder.name}/{fields['file']}: the comment of {name} lacks {', '.join(missing)}")
            _, symbols = families.setdefault((fields["file"], name), (fields, {}))
            symbols.setdefault(row["kernel"], {})[row["chip"]] = row
            demand(row, fields)
    parts = [HEAD]
    for (file, name), (fields, symbols) in sorted(families.items()):
        parts.append(f"\n## {name}\n\n[`{file}`]({file}): {fields['computes']}\n")
        parts.append("\n".join(f"- {key}: {fields[key]}" for key in FIELDS if key in fields) + "\n")
        parts.append(f"| symbol | registers {', '.join(SHOWN)} | shared, bytes | spills | loads | tensor |\n|---|---|---|---|---|---|")
        for symbol, chips in sorted(symbols.items(), key=lambda item: natural(item[0])):
            registers = " · ".join(str(chips[chip]["registers"]) for chip in SHOWN)
            shared = max(row["shared"] for row in chips.values())
            spills = max(row["spills"] for row in chips.values())
            code = chips["sm_90"]["code"]
            loads = f"{code['wide_loads']} of {code['loads']}"
            parts.append(f"| `{symbol}` | {registers} | {shared} | {spills} | {loads} | {code['tensor']} |")
    return "\n".join(parts) + "\n"


def demand(row: dict, fields: dict[str, str]) -> None:
    """Exits where the machine code lacks what the comment's `bound` promises."""
    bound, code = fields.get("bound", ""), row["code"]
    if code is None:
        return
    if bound.startswith("memory bandwidth") and code["wide_loads"] == 0:
        sys.exit(f"{row['kernel']} is bound by memory bandwidth, but has no 16-byte load")
    if bound.startswith("tensor cores") and code["tensor"] == 0:
        sys.exit(f"{row['kernel']} is bound by tensor cores, but doesn't use them")


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts `_4` before `_16`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split("_")]


def listing(text: str) -> dict[str, dict[str, int]]:
    """What the listing of nvdisasm holds of each kernel: loads from device memory, tensor-core instructions."""
    kernels = {}
    for section in text.split(".section\t.text.")[1:] or text.split(".section .text.")[1:]:
        name = re.match(r"\w+", section)[0]
        loads = re.findall(r"\bLDG\.[\w.]*|\bLDGSTS\.[\w.]*", section)
        wide = sum(".128" in load for load in loads)
        tensor = len(re.findall(r"\b[HI]MMA\.", section))
        kernels[name] = {"loads": len(loads), "wide_loads": wide, "tensor": tensor}
    return kernels
