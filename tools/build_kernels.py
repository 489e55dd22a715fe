#!/usr/bin/env python3
"""Compiles kernels/*.cu to the images in kernels/ptx, and assembles them for every chip. So it does with
benches/kernels, what the benchmarks hold the kernels against.

    tools/build_kernels.py            compile, write ptx, its MANIFEST and README.md in both folders
    tools/build_kernels.py --check    fail where an image isn't what its sources give, or ptxas refuses one

Needs Python 3 and nothing of CUDA: the compiler comes from PyPI (tools/requirements-kernels.txt) into --venv. No GPU.
An image is PTX for compute_80, so that it runs on any chip since Ampere. ptxas, which turns it into machine code for
each chip as the driver will, checks what NVRTC doesn't (inline PTX) and tells registers and spills.
"""

import argparse
import concurrent.futures
import ctypes
import hashlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import kernel_table

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
FOLDERS = [KERNELS, ROOT / "benches" / "kernels"]
REPORTS = ROOT / "target" / "ptxas"
REQUIREMENTS = ROOT / "tools" / "requirements-kernels.txt"
PARTS = ["cuda_nvrtc", "cuda_runtime", "cuda_nvcc", "cu13"]
LISTED = "sm_90"
CHIPS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]


def fnv1a(data: bytes) -> str:
    """The hash that build.rs computes, too."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def toolchain(path: Path) -> Path:
    """The directory of NVIDIA's packages in the virtual environment `path`, which is made if needed."""
    python = path / "bin" / "python"
    if not python.exists():
        venv.create(path, with_pip=True)
    found = sorted(path.glob("lib/python3*/site-packages/nvidia"))
    if not (found and all((found[0] / part).is_dir() for part in PARTS)):
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-r", REQUIREMENTS]
        subprocess.run(command, check=True)
        found = sorted(path.glob("lib/python3*/site-packages/nvidia"))
    return found[0]


class Nvrtc:
    """NVRTC, by its C interface."""

    def __init__(self, packages: Path):
        self.library = ctypes.CDLL(str(next((packages / "cuda_nvrtc" / "lib").glob("libnvrtc.so.*"))))
        self.headers = packages / "cuda_runtime" / "include"

    def compile(self, source: Path) -> str:
        program = ctypes.c_void_p()
        name = source.relative_to(ROOT).as_posix()
        self.call("nvrtcCreateProgram", ctypes.byref(program), source.read_bytes(), name.encode(), 0, None, None)
        options = ["--gpu-architecture=compute_80", "--std=c++17", f"-I{KERNELS}", f"-I{self.headers}"]
        encoded = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        result = self.library.nvrtcCompileProgram(program, len(options), encoded)
        log = self.text("nvrtcGetProgramLog", program)
        if result != 0 or log.strip():
            sys.exit(f"{name}:\n{log}")
        ptx = self.text("nvrtcGetPTX", program)
        self.call("nvrtcDestroyProgram", ctypes.byref(program))
        return ptx

    def text(self, function: str, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        self.call(f"{function}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(function, program, buffer)
        return buffer.value.decode()

    def call(self, function: str, *arguments: object) -> None:
        result = getattr(self.library, function)(*arguments)
        if result != 0:
            sys.exit(f"{function}: error {result}")


def assemble(packages: Path, image: Path, chip: str) -> list[dict]:
    """Registers, memory and spills of every kernel of `image` on `chip`; exits where ptxas refuses it.

    It takes minutes for all, so what an image gave stays in target/ptxas, by the hash of image, compilers and this function.
    """
    how = inspect.getsource(assemble) + inspect.getsource(kernel_table.listing)
    key = hashlib.sha256(image.read_bytes() + REQUIREMENTS.read_bytes() + how.encode()).hexdigest()
    known = REPORTS / f"{image.stem}.{chip}.{key[:16]}.json"
    if known.exists():
        return json.loads(known.read_text())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        command = [packages / "cuda_nvcc" / "bin" / "ptxas", "-v", f"-arch={chip}", str(image), "-o", cubin.name]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            sys.exit(f"{image.name} for {chip}:\n{run.stderr}")
        code = {}
        if chip == LISTED:
            command = [packages / "cu13" / "bin" / "nvdisasm", "-c", cubin.name]
            code = kernel_table.listing(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    kernels = []
    for block in run.stderr.split("Compiling entry function ")[1:]:
        number = lambda pattern: int((re.search(pattern, block) or [0, 0])[1])
        name = re.match(r"'(\w+)'", block)[1]
        kernels.append(
            {
                "module": image.stem,
                "kernel": name,
                "chip": chip,
                "registers": number(r"Used (\d+) registers"),
                "shared": number(r"(\d+) bytes smem"),
                "stack": number(r"(\d+) bytes stack frame"),
                "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
                "code": code.get(name),
            }
        )
    REPORTS.mkdir(parents=True, exist_ok=True)
    for old in REPORTS.glob(f"{image.stem}.{chip}.*.json"):
        old.unlink()
    known.write_text(json.dumps(kernels, indent=1) + "\n")
    return kernels


def outputs(nvrtc: Nvrtc, folder: Path) -> dict[Path, str]:
    """The images of the folder's sources, and the MANIFEST: a line for every file that they may be made from or are."""
    units = sorted(folder.glob("*.cu"))
    images = {folder / "ptx" / f"{unit.stem}.ptx": nvrtc.compile(unit) for unit in units}
    sources = {*units, *folder.glob("*.cuh"), *KERNELS.glob("*.cuh")}
    hashes = {path: fnv1a(path.read_bytes()) for path in sorted(sources)}
    hashes |= {path: fnv1a(text.encode()) for path, text in images.items()}
    lines = [f"{value} {path.relative_to(ROOT).as_posix()}\n" for path, value in hashes.items()]
    return images | {folder / "ptx" / "MANIFEST": "".join(lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on any difference")
    parser.add_argument("--venv", type=Path, default=ROOT / "target" / "kernels-venv", help="where the compiler lies")
    parser.add_argument("--json", type=Path, help="write what ptxas says of every kernel and chip to this file")
    parser.add_argument("--only-compile", action="store_true", help="leave ptxas out, which takes most of the time")
    arguments = parser.parse_args()

    packages = toolchain(arguments.venv)
    nvrtc = Nvrtc(packages)
    expected = {path: text for folder in FOLDERS for path, text in outputs(nvrtc, folder).items()}
    left = {path for folder in FOLDERS for path in folder.glob("ptx/*.ptx")} - set(expected)
    if arguments.check:
        stale = [path for path, text in expected.items() if not path.exists() or path.read_text() != text]
        stale += left
        if stale:
            names = ", ".join(sorted(path.relative_to(ROOT).as_posix() for path in stale))
            sys.exit(f"not what the sources give: {names}\nrun tools/build_kernels.py")
    else:
        for path in left:
            path.unlink()
        for path, text in expected.items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    if arguments.only_compile:
        return
    jobs = [(path, chip) for path in expected if path.suffix == ".ptx" for chip in CHIPS]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        reports = [row for rows in pool.map(lambda job: assemble(packages, *job), jobs) for row in rows]
    if arguments.json:
        arguments.json.write_text(json.dumps(reports, indent=1) + "\n")
    for row in sorted(reports, key=lambda row: (row["module"], row["kernel"])):
        if row["chip"] == "sm_90" or row["spills"]:
            print("{module}: {kernel} on {chip}: {registers} registers, {shared} B shared, {spills} B spilled".format(**row))
    spilled = sorted({row["kernel"] for row in reports if row["spills"] or row["stack"]})
    if spilled:
        sys.exit(f"spills or local memory in {', '.join(spilled)}")
    for folder in FOLDERS:
        text = kernel_table.table(folder, KERNELS, [row for row in reports if (folder / f"{row['module']}.cu").exists()])
        readme = folder / "README.md"
        if not arguments.check:
            readme.write_text(text, encoding="utf-8")
        elif not readme.exists() or readme.read_text(encoding="utf-8") != text:
            sys.exit(f"{readme.relative_to(ROOT)} is not what the sources give\nrun tools/build_kernels.py")


if __name__ == "__main__":
    main()
