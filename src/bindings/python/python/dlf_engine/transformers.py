"""Dynamic Logits Fusion beside a large model of transformers: a `LogitsProcessor`.

    processor = DynamicLogitsFusion(small, [expert])
    large.generate(**inputs, logits_processor=[processor], do_sample=False)
"""

from __future__ import annotations

from typing import Optional, Sequence

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedModel

from . import fuse


class DynamicLogitsFusion(LogitsProcessor):
    """Runs a small model and its experts on the same tokens, each with a cache of its own, finds α for each row, and
    returns the logarithm of the fused distribution: L + Σ α (E − S), normalised, so that beams compare.

    Batches of prompts of different lengths are padded on the left, as transformers wants it: `pad_token_id` says with what.
    A processor isn't given the attention mask, so the leading run of that token in each row is taken for padding: it must be
    no token that a prompt begins with. Beams may change places from step to step, and their caches follow.

    One generation at a time: sequences that don't continue those of the last step start the caches anew. `alpha` holds α of
    the last step, `(rows, experts)`. Further arguments are those of `dlf_engine.fuse`.
    """

    def __init__(self, small: PreTrainedModel, experts: Sequence[PreTrainedModel], *, pad_token_id: Optional[int] = None,
                 **options) -> None:
        self.models = [small, *experts]
        self.pad_token_id = pad_token_id
        self.options = options
        self.alpha: np.ndarray = np.zeros((0, len(experts)))
        self._seen = None
        self._caches = [None] * len(self.models)

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        ids = input_ids.cpu()
        known = self._follow(ids)
        mask = self._mask(ids)
        logits = []
        for index, model in enumerate(self.models):
            padding = {}
            if mask is not None:
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                padding = {"attention_mask": mask.to(model.device), "position_ids": positions[:, known:].to(model.device)}
            output = model(input_ids=ids[:, known:].to(model.device), past_key_values=self._caches[index], use_cache=True,
                           **padding)
            self._caches[index] = output.past_key_values
            logits.append(output.logits[:, -1].float())
        self._seen = ids.clone()
        width = min([scores.shape[-1], *(x.shape[-1] for x in logits)])
        cut = [x[:, :width].cpu() for x in [scores.float(), *logits]]
        self.alpha = fuse(cut[0].numpy(), cut[1].numpy(), [x.numpy() for x in cut[2:]], **self.options).alpha
        alpha = torch.as_tensor(self.alpha, dtype=torch.float32)
        shift = sum(alpha[:, t : t + 1] * (expert - cut[1]) for t, expert in enumerate(cut[2:]))
        # Ids that not all models have can't be compared, and can't be chosen.
        fused = torch.full_like(scores, float("-inf"))
        fused[:, :width] = torch.log_softmax(cut[0] + shift, dim=-1).to(scores)
        return fused

    def _follow(self, ids: torch.Tensor) -> int:
        """How many tokens the caches hold of these sequences, after their rows were put where the sequences went."""
        seen = self._seen
        known = 0 if seen is None else seen.shape[1]
        if 0 < known < ids.shape[1] and ids.shape[0] == seen.shape[0]:
            same = (ids[:, None, :known] == seen[None]).all(-1)
            if bool(same.any(1).all()):
                rows = same.int().argmax(1)
                # Rows that are alike have caches that are alike.
                if not bool(same.diagonal().all()):
                    for model, cache in zip(self.models, self._caches):
                        cache.reorder_cache(rows.to(model.device))
                return known
        self._caches = [None] * len(self.models)
        return 0

    def _mask(self, ids: torch.Tensor) -> Optional[torch.Tensor]:
        """1 from the first token of each row that is no padding; `None` where there is no padding."""
        if self.pad_token_id is None:
            return None
        mask = (ids != self.pad_token_id).long().cummax(1).values
        if not bool(mask[:, -1].all()):
            raise ValueError(f"input_ids: a row is nothing but pad_token_id, {self.pad_token_id}")
        return None if bool(mask.all()) else mask
