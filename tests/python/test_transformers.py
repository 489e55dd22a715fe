"""A large model of transformers with the processor says what the engine says."""

import os

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import dlf_engine as dlf  # noqa: E402
from dlf_engine.transformers import DynamicLogitsFusion  # noqa: E402

GOLDENS = os.path.join(os.path.dirname(__file__), "..", "goldens", "ensemble")


def test_greedy_ids_are_the_engines():
    path = lambda name: os.path.join(GOLDENS, name)  # noqa: E731
    names = ["large", "small", "expert_0", "expert_1"]
    load = lambda name: transformers.AutoModelForCausalLM.from_pretrained(path(name), dtype=torch.float32).eval()  # noqa: E731
    large, small, *experts = [load(name) for name in names]
    ensemble = dlf.Ensemble(path("large"), path("small"), [path("expert_0"), path("expert_1")])
    for prompt in ([5, 17, 3, 60, 2], [9], [7, 7, 7]):
        processor = DynamicLogitsFusion(small, experts)
        expected = ensemble.generate(prompt, max_new_tokens=12, ignore_eos=True, device="cpu")
        ids = large.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False,
                             logits_processor=[processor], eos_token_id=None, pad_token_id=0)
        assert ids[0, len(prompt):].tolist() == expected.token_ids
        assert processor.alpha.shape == (1, 2)
        assert processor.alpha[0].tolist() == expected.steps[-1].alpha
