#!/usr/bin/env python3
"""Compiles every kernel with the compiler of a real NVIDIA driver, each by itself, the way a user's driver will.

    tools/check_driver_jit.py                    fetch the 535 driver's compiler, try all images of the repository
    tools/check_driver_jit.py --library FILE     take another driver's libnvidia-ptxjitcompiler.so.1
    tools/check_driver_jit.py --time             say how long each kernel takes, and how much machine code it is

No GPU is needed and nothing is installed: the library comes from Debian's package libnvidia-ptxjitcompiler1 (bookworm,
non-free), which is unpacked into --directory. The mirror is that of this machine's apt, whose own lists stay as they
are. What it took once is remembered by hash there. Later drivers take what the 535 branch takes.
"""

import argparse
import concurrent.futures
import ctypes
import hashlib
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGES = [ROOT / "kernels" / "ptx", ROOT / "benches" / "kernels" / "ptx"]
CHIPS = ["sm_80", "sm_86", "sm_89", "sm_90"]
PACKAGE = "libnvidia-ptxjitcompiler1"
LIBRARY = "libnvidia-ptxjitcompiler.so.1"
BRANCH = "535"
ENTRY = "\n.visible .entry "
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def run(command: list[object], directory: Path) -> str:
    """What `command` prints; exits with its complaint where it fails."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, cwd=directory, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        sys.exit(f"{words[0]} is missing: this needs Debian's tools, or --library")
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)}:\n{done.stderr}")
    return done.stdout


def debian_mirror(directory: Path) -> str:
    """`[signed-by=KEYS] URI` of the Debian archive that this machine's apt is set up for."""
    lines = run(["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages", "Component: main"], directory)
    for site in lines.splitlines():
        if site.rstrip("/").endswith("/debian"):
            return f"[signed-by={KEYRING}] {site}" if KEYRING.exists() else site
    sys.exit("apt knows no Debian archive: give --library")


def fetch(directory: Path) -> Path:
    """The driver's compiler under `directory`, fetched if it isn't there."""
    unpacked = directory / BRANCH
    found = sorted(unpacked.rglob(f"{LIBRARY}*"))
    if found:
        return found[0]
    apt = directory / "apt"
    (apt / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (apt / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    (apt / "sources.list").write_text(f"deb {debian_mirror(directory)} bookworm non-free\n")
    options = ["Dir::Etc::SourceParts=/dev/null", "APT::Sandbox::User=", "APT::Architecture=amd64"]
    places = {"Dir::Etc::SourceList": "sources.list", "Dir::State::Lists": "lists", "Dir::Cache": "cache"}
    options += [f"{key}={apt / name}" for key, name in places.items()]
    flags = [word for option in options for word in ("-o", option)]
    run(["apt-get", *flags, "update"], apt)
    run(["apt-get", *flags, "download", PACKAGE], apt)
    archives = sorted(apt.glob(f"{PACKAGE}_{BRANCH}.*.deb"))
    if not archives:
        got = ", ".join(path.name for path in apt.glob("*.deb"))
        sys.exit(f"{PACKAGE}: expected branch {BRANCH}, found {got or 'nothing'}")
    run(["dpkg-deb", "-x", archives[-1], unpacked], apt)
    found = sorted(unpacked.rglob(f"{LIBRARY}*"))
    if not found:
        sys.exit(f"{archives[-1].name} holds no {LIBRARY}")
    return found[0]


def kernels(image: str) -> dict[str, bytes]:
    """The image with one of its kernels, for each, as src/backend/cuda/images.rs cuts it."""
    head, *rest = image.split(ENTRY)
    return {kernel.split("(")[0]: (head + ENTRY + kernel).encode() for kernel in rest}


class Jit:
    """The driver's compiler, by the nvPTXCompiler interface that it exports."""

    def __init__(self, path: Path):
        try:
            self.library = ctypes.CDLL(str(path))
        except OSError as error:
            sys.exit(f"{path}: {error}")

    def version(self) -> str:
        major, minor = ctypes.c_uint(), ctypes.c_uint()
        self.library.nvPTXCompilerGetVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def compile(self, ptx: bytes, chip: str) -> tuple[int, str | None]:
        """Bytes of machine code that `ptx` gives for `chip`, and why not, where it gives none."""
        handle = ctypes.c_void_p()
        result = self.library.nvPTXCompilerCreate(ctypes.byref(handle), ctypes.c_size_t(len(ptx)), ptx)
        if result != 0:
            return 0, f"nvPTXCompilerCreate: error {result}"
        options = (ctypes.c_char_p * 1)(f"--gpu-name={chip}".encode())
        result = self.library.nvPTXCompilerCompile(handle, 1, options)
        size, reason = ctypes.c_size_t(), None
        if result != 0:
            reason = self.log(handle) or f"nvPTXCompilerCompile: error {result}"
        else:
            self.library.nvPTXCompilerGetCompiledProgramSize(handle, ctypes.byref(size))
            if size.value == 0:
                reason = "no machine code came out"
        self.library.nvPTXCompilerDestroy(ctypes.byref(handle))
        return size.value, reason

    def log(self, handle: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        self.library.nvPTXCompilerGetErrorLogSize(handle, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value + 1)
        self.library.nvPTXCompilerGetErrorLog(handle, text)
        return text.value.decode(errors="replace").strip()


# What a driver must refuse: a check that takes this would take anything.
BROKEN = b"""
.version 8.1
.target sm_80
.address_size 64
.visible .entry broken() {
    .reg .f32 %f<2>;
    add.rn.f32 %f1, %f0, no_such_register;
    ret;
}
"""


def show_times(jit: Jit, images: dict[str, str], chips: list[str]) -> None:
    """Prints processor time and machine code of every image as a whole, and of each of its kernels by itself."""
    for chip in chips:
        print(f"{chip}\n{'image, kernel':28} {'ms':>7} {'bytes':>9}")
        for name, image in images.items():
            for symbol, ptx in [(name, image.encode()), *((f"  {symbol}", ptx) for symbol, ptx in kernels(image).items())]:
                times, size = [], 0
                for _ in range(3):
                    begin = time.thread_time()
                    size, reason = jit.compile(ptx, chip)
                    times.append(time.thread_time() - begin)
                    if reason is not None:
                        sys.exit(f"{name} for {chip}: {reason}")
                print(f"{symbol:28} {1000 * min(times):7.1f} {size:9}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path, help="PTX files; all of the repository's where none is given")
    parser.add_argument("--library", type=Path, help=f"a driver's {LIBRARY}, instead of fetching that of {BRANCH}")
    parser.add_argument("--directory", type=Path, default=ROOT / "target" / "driver-jit", help="where it is unpacked")
    parser.add_argument("--time", action="store_true", help="the fastest of three times each, of one thread")
    parser.add_argument("--chips", nargs="+", default=CHIPS, metavar="CHIP", help=f"default: {' '.join(CHIPS)}")
    arguments = parser.parse_args()

    paths = arguments.images or sorted(path for folder in IMAGES for path in folder.glob("*.ptx"))
    if not paths:
        sys.exit("there is no image: run tools/build_kernels.py")
    try:
        images = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    except OSError as error:
        sys.exit(str(error))
    directory = arguments.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    library = arguments.library or fetch(directory)
    jit = Jit(library)
    if jit.compile(BROKEN, arguments.chips[0])[1] is None:
        sys.exit(f"{library}: takes PTX that is broken on purpose, so its word is worth nothing")
    if arguments.time:
        show_times(jit, images, arguments.chips)
        return
    cut = {f"{name}: {symbol}": ptx for name, image in images.items() for symbol, ptx in kernels(image).items()}
    jobs = [(name, ptx, chip) for name, ptx in cut.items() for chip in arguments.chips]
    passed = directory / "passed"
    passed.mkdir(exist_ok=True)

    def attempt(job: tuple[str, bytes, str]) -> str | None:
        name, ptx, chip = job
        mark = passed / hashlib.sha256(library.resolve().name.encode() + chip.encode() + ptx).hexdigest()
        if mark.exists():
            return None
        _, reason = jit.compile(ptx, chip)
        if reason is not None:
            return f"{name} for {chip}: {reason}"
        mark.touch()
        return None

    with concurrent.futures.ThreadPoolExecutor() as pool:
        failures = [reason for reason in pool.map(attempt, jobs) if reason is not None]
    for failure in failures:
        print(failure, file=sys.stderr)
    name = library.resolve().name
    if failures:
        sys.exit(f"{name} refuses {len(failures)} of {len(jobs)}")
    print(f"{name} (nvPTXCompiler {jit.version()}) takes {len(cut)} kernels for {', '.join(arguments.chips)}")


if __name__ == "__main__":
    main()
