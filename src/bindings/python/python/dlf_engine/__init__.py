"""Llama inference for ensembles: a large model steered by small experts, token by token (Dynamic Logits Fusion)."""

from __future__ import annotations

import os
from typing import Iterator, Mapping, Optional, Sequence, Union

import numpy as np

from . import _native
from ._native import Fused, Generation, Step, __version__

__all__ = ["Ensemble", "Fused", "Generation", "Step", "fuse", "__version__"]

Path = Union[str, "os.PathLike[str]"]
Prompt = Union[str, Sequence[int]]


def _options(method, alpha, grid, search, objective, every):
    if alpha is not None and not isinstance(alpha, Sequence):
        alpha = [alpha]
    return {"method": method, "alpha": alpha, "grid": grid, "search": search, "objective": objective, "every": every}


class Ensemble:
    """A large model, a small one, and experts fine-tuned from the small one (or LoRA adapters over it).

    Arguments are Hugging Face directories; `experts` is a list of them, or a mapping from names. What the last generation
    needed, threads and on a GPU the weights, is kept for the next one until `release` or the end of the object.
    """

    def __init__(self, large: Optional[Path] = None, small: Optional[Path] = None,
                 experts: Union[Sequence[Path], Mapping[str, Path]] = ()) -> None:
        named = experts.items() if isinstance(experts, Mapping) else ((None, path) for path in experts)
        path = lambda p: None if p is None else os.fspath(p)  # noqa: E731
        self._native = _native.Ensemble(path(large), path(small), [(name, path(p)) for name, p in named])

    @classmethod
    def demo(cls) -> "Ensemble":
        """The small ensemble that is built in."""
        self = cls.__new__(cls)
        self._native = _native.Ensemble.demo()
        return self

    @property
    def vocab_size(self) -> int:
        """The token ids that all models share."""
        return self._native.vocab_size

    @property
    def experts(self) -> list:
        """The names of the experts."""
        return self._native.experts

    def encode(self, text: str, add_special_tokens: bool = True) -> list:
        """The token ids of a text."""
        return self._native.encode(text, add_special_tokens)

    def release(self) -> None:
        """Frees the memory that is kept for the next generation."""
        self._native.release()

    def stream(self, prompt: Prompt, *, max_new_tokens: int = 256, method: str = "dynamic", alpha=None, grid=None,
               search: str = "grid", objective: str = "both", every: int = 1, temperature: float = 0.0, top_k: int = 0,
               top_p: float = 1.0, min_p: float = 0.0, seed: int = 0, stop: Sequence[str] = (), ignore_eos: bool = False,
               device: str = "auto", threads: Optional[int] = None) -> Iterator[Step]:
        """Yields tokens as they come. Ctrl-C ends it."""
        return self._native.stream(prompt if isinstance(prompt, str) else list(prompt), {
            "options": _options(method, alpha, grid, search, objective, every), "max_new_tokens": max_new_tokens,
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed, "stop": list(stop),
            "ignore_eos": ignore_eos, "device": device, "threads": threads})

    def generate(self, prompt: Prompt, **options) -> Generation:
        """The whole generation; the options are those of `stream`."""
        return self.stream(prompt, **options).finish()

    def score(self, text: Prompt, *, method: str = "dynamic", alpha=None, grid=None, search: str = "grid",
              objective: str = "both", device: str = "auto", threads: Optional[int] = None) -> list:
        """The steps at every position of a text after its first token, each with the token that is there."""
        return self._native.score(text if isinstance(text, str) else list(text), {
            "options": _options(method, alpha, grid, search, objective, 1), "max_new_tokens": 0, "temperature": 0.0,
            "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "stop": [], "ignore_eos": False, "device": device,
            "threads": threads}).finish().steps


def fuse(large: np.ndarray, small: np.ndarray, experts: Sequence[np.ndarray], *, method: str = "dynamic", alpha=None,
         grid=None, search: str = "grid", objective: str = "both", temperature: float = 0.0, seed: int = 0, step: int = 0,
         threads: Optional[int] = None) -> Fused:
    """Fuses logits that another engine computed, and chooses a token for each row.

    `large`, `small` and each of `experts` are float32, `(vocab_size,)` or `(rows, vocab_size)`. Contiguous arrays are read in
    place; the GIL is released meanwhile.
    """
    array = lambda x: np.ascontiguousarray(x, dtype=np.float32)  # noqa: E731
    return _native.fuse(array(large), array(small), [array(e) for e in experts],
                        _options(method, alpha, grid, search, objective, 1), temperature, seed, step, threads)
