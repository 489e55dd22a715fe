from typing import Any, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import numpy.typing as npt

__version__: str

class Step:
    token_id: int
    text: str
    alpha: List[float]
    expert: Optional[int]
    loss: Optional[float]
    logprob: float
    logprob_large: Optional[float]
    argmax_large: Optional[int]
    finish_reason: Optional[str]

class Generation:
    text: str
    token_ids: List[int]
    finish_reason: Optional[str]
    steps: List[Step]

class Stream(Iterator[Step]):
    def __iter__(self) -> "Stream": ...
    def __next__(self) -> Step: ...
    def finish(self) -> Generation: ...

class Fused:
    token: npt.NDArray[np.uint32]
    alpha: npt.NDArray[np.float64]
    expert: npt.NDArray[np.int64]
    logprob: npt.NDArray[np.float64]
    loss: npt.NDArray[np.float64]

class Ensemble:
    def __init__(self, large: Optional[str], small: Optional[str], experts: Sequence[Tuple[Optional[str], str]]) -> None: ...
    @staticmethod
    def demo() -> "Ensemble": ...
    vocab_size: int
    experts: List[str]
    def encode(self, text: str, add_special_tokens: bool) -> List[int]: ...
    def release(self) -> None: ...
    def stream(self, prompt: Any, wanted: Any) -> Stream: ...
    def score(self, text: Any, wanted: Any) -> Stream: ...

def fuse(large: npt.NDArray[np.float32], small: npt.NDArray[np.float32], experts: List[npt.NDArray[np.float32]], options: Any,
         temperature: float, seed: int, step: int, threads: Optional[int]) -> Fused: ...
