"""A large model of transformers with the processor says what the engine says."""

import os

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import dlf_engine as dlf  # noqa: E402
from dlf_engine.transformers import DynamicLogitsFusion  # noqa: E402

GOLDENS = os.path.join(os.path.dirname(__file__), "..", "goldens", "ensemble")


def path(name):
    return os.path.join(GOLDENS, name)


@pytest.fixture(scope="module")
def models():
    load = lambda name: transformers.AutoModelForCausalLM.from_pretrained(path(name), dtype=torch.float32).eval()  # noqa: E731
    return [load(name) for name in ["large", "small", "expert_0", "expert_1"]]


def test_greedy_ids_are_the_engines(models):
    large, small, *experts = models
    ensemble = dlf.Ensemble(path("large"), path("small"), [path("expert_0"), path("expert_1")])
    for prompt in ([5, 17, 3, 60, 2], [9], [7, 7, 7]):
        processor = DynamicLogitsFusion(small, experts)
        expected = ensemble.generate(prompt, max_new_tokens=12, ignore_eos=True, device="cpu")
        ids = large.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False,
                             logits_processor=[processor], eos_token_id=None, pad_token_id=0)
        assert ids[0, len(prompt):].tolist() == expected.token_ids
        assert processor.alpha.shape == (1, 2)
        assert processor.alpha[0].tolist() == expected.steps[-1].alpha


def test_a_padded_batch_is_each_prompt_alone(models):
    large, small, *experts = models
    prompts = [[5, 17, 3, 60, 2], [9], [7, 7, 7]]
    pad = 1
    longest = max(map(len, prompts))
    padded = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    processor = DynamicLogitsFusion(small, experts, pad_token_id=pad)
    ids = large.generate(padded, attention_mask=(padded != pad).long(), max_new_tokens=12, min_new_tokens=12, do_sample=False,
                         logits_processor=[processor], eos_token_id=None, pad_token_id=pad)
    ensemble = dlf.Ensemble(path("large"), path("small"), [path("expert_0"), path("expert_1")])
    for row, prompt in enumerate(prompts):
        expected = ensemble.generate(prompt, max_new_tokens=12, ignore_eos=True, device="cpu")
        assert ids[row, longest:].tolist() == expected.token_ids
        assert processor.alpha[row].tolist() == expected.steps[-1].alpha
    with pytest.raises(ValueError, match="nothing but pad_token_id"):
        processor(torch.tensor([[pad, pad]]), torch.zeros(1, large.config.vocab_size))


class FromTheStart(DynamicLogitsFusion):
    """Reads every sequence anew at each step: slow, and nothing can be in the wrong place."""

    def __call__(self, input_ids, scores):
        self._seen = None
        return super().__call__(input_ids, scores)


def test_beams_take_their_caches_along(models):
    large, small, *experts = models
    moved = []

    class Counts(DynamicLogitsFusion):
        def _follow(self, ids):
            known = super()._follow(ids)
            moved.append((known, self._seen is not None and not torch.equal(ids[:, :known], self._seen)))
            return known

    def beams(kind):
        processor = kind(small, experts)
        out = large.generate(torch.tensor([[5, 17, 3], [9, 2, 4]]), max_new_tokens=10, num_beams=4, do_sample=False,
                             logits_processor=[processor], eos_token_id=None, pad_token_id=0, output_scores=True,
                             return_dict_in_generate=True)
        return out.sequences.tolist(), out.sequences_scores

    ids, scores = beams(Counts)
    expected_ids, expected_scores = beams(FromTheStart)
    assert ids == expected_ids
    # The same f32 sums in another order.
    assert torch.allclose(scores, expected_scores, atol=1e-4)
    assert all(known > 0 for known, _ in moved[1:]), "no cache was begun anew"
    assert any(other for _, other in moved), "beams did change places"
    # Scores are log-probabilities: a mean of ten of them is below 0.
    assert bool((scores < 0).all())
