"""Dynamic Logits Fusion beside a large model of transformers: a `LogitsProcessor`.

    processor = DynamicLogitsFusion(small, [expert])
    large.generate(**inputs, logits_processor=[processor], do_sample=False)
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedModel

from . import fuse


class DynamicLogitsFusion(LogitsProcessor):
    """Runs a small model and its experts on the same tokens, each with a cache of its own, finds α for each row, and
    returns the large model's scores with the experts' shifts added.

    One generation at a time: a sequence that doesn't continue the last one starts the caches anew. No padding, no beams.
    `alpha` holds α of the last step, `(rows, experts)`. Further arguments are those of `dlf_engine.fuse`.
    """

    def __init__(self, small: PreTrainedModel, experts: Sequence[PreTrainedModel], **options) -> None:
        self.models = [small, *experts]
        self.options = options
        self.alpha: np.ndarray = np.zeros((0, len(experts)))
        self._seen = None
        self._caches = [None] * len(self.models)

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        seen = self._seen
        known = 0 if seen is None else seen.shape[1]
        if not (0 < known < input_ids.shape[1] and input_ids.shape[0] == seen.shape[0]
                and torch.equal(input_ids[:, :known].cpu(), seen)):
            known, self._caches = 0, [None] * len(self.models)
        logits = []
        for index, model in enumerate(self.models):
            new = input_ids[:, known:].to(model.device)
            output = model(input_ids=new, past_key_values=self._caches[index], use_cache=True)
            self._caches[index] = output.past_key_values
            logits.append(output.logits[:, -1].float())
        self._seen = input_ids.cpu().clone()
        width = min([scores.shape[-1], *(x.shape[-1] for x in logits)])
        cut = [x[:, :width].cpu() for x in [scores.float(), *logits]]
        self.alpha = fuse(cut[0].numpy(), cut[1].numpy(), [x.numpy() for x in cut[2:]], **self.options).alpha
        alpha = torch.as_tensor(self.alpha, dtype=torch.float32)
        shift = sum(alpha[:, t : t + 1] * (expert - cut[1]) for t, expert in enumerate(cut[2:]))
        # Ids that not all models have can't be compared, and can't be chosen.
        fused = torch.full_like(scores, float("-inf"))
        fused[:, :width] = scores[:, :width] + shift.to(scores)
        return fused
