"""The wheel: what it gives is what the binary and the paper's definition give."""

import os
import signal
import threading
import time

import numpy as np
import pytest

import dlf_engine as dlf

SUM = "Question: Tom has 17 apples and buys 25 more. How many apples does Tom have?\nAnswer:"


@pytest.fixture(scope="module")
def demo():
    return dlf.Ensemble.demo()


def test_generate_solves_a_sum(demo):
    result = demo.generate(SUM, max_new_tokens=32, device="cpu")
    assert "42" in result.text
    assert result.finish_reason == "stop"
    assert [step.token_id for step in result.steps] == result.token_ids
    assert all(len(step.alpha) == len(demo.experts) == 2 for step in result.steps)
    streamed = list(demo.stream(SUM, max_new_tokens=32, device="cpu", threads=1))
    assert "".join(step.text for step in streamed) == result.text


def test_methods_and_samplers(demo):
    ids = demo.encode(SUM)
    large = demo.generate(ids, method="large", max_new_tokens=8, device="cpu")
    still = demo.generate(ids, method="static", alpha=0.0, max_new_tokens=8, device="cpu")
    assert large.token_ids == still.token_ids
    drawn = [demo.generate(ids, temperature=1.5, seed=seed, max_new_tokens=30, device="cpu").token_ids
             for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_scores_are_those_of_generation(demo):
    result = demo.generate(SUM, max_new_tokens=5, device="cpu")
    scored = demo.score(demo.encode(SUM) + result.token_ids, device="cpu")[-len(result.steps):]
    assert [step.token_id for step in scored] == result.token_ids
    # One batch or step by step: the same sums.
    assert [step.logprob for step in scored] == [step.logprob for step in result.steps]


def test_fuse_finds_the_loss_of_the_definition():
    rng = np.random.default_rng(0)
    large = rng.normal(0, 3, (4, 1000)).astype(np.float32)
    small = (0.8 * large + rng.normal(0, 1.5, large.shape)).astype(np.float32)
    expert = (small + rng.normal(0, 1, large.shape)).astype(np.float32)
    found = dlf.fuse(large, small, [expert])

    def softmax(x):
        e = np.exp(x.astype(np.float64) - x.max())
        return e / e.sum()

    kl = lambda p, q: float((p * np.log(p / q)).sum())  # noqa: E731
    for row in range(4):
        p, q, qt = softmax(large[row]), softmax(small[row]), softmax(expert[row])
        losses = {}
        for k in range(20):
            alpha = round(0.1 * k, 12)
            fused = softmax(large[row].astype(np.float64) + alpha * (expert[row].astype(np.float64) - small[row]))
            losses[alpha] = (kl(fused, p) - kl(qt, q)) ** 2 + (kl(p, fused) - kl(q, qt)) ** 2
        best = min(losses, key=losses.get)
        assert found.alpha[row, 0] == best
        # Sums of a thousand terms in f32.
        assert found.loss[row] == pytest.approx(losses[best], rel=1e-3, abs=1e-6)
        fused = large[row] + best * (expert[row] - small[row])
        assert found.token[row] == fused.argmax()
    one = dlf.fuse(large[0], small[0], [expert[0]])
    assert one.alpha.shape == (1, 1) and one.token[0] == found.token[0]


@pytest.mark.parametrize("call, says", [
    (lambda demo: demo.generate("", device="cpu"), "prompt"),
    (lambda demo: demo.generate([10**6], device="cpu"), "1000000"),
    (lambda demo: demo.generate("a", method="best"), "expected dynamic"),
    (lambda demo: demo.generate("a", alpha=1.0), "static"),
    (lambda demo: demo.generate("a", method="static", alpha=[1.0] * 9), "at most 8"),
    (lambda demo: demo.generate("a", device="tpu"), "auto, cpu, cuda"),
    (lambda demo: demo.generate("a", temperature=-1.0, device="cpu"), "temperature"),
    (lambda demo: dlf.Ensemble("/nowhere"), "/nowhere"),
    (lambda demo: dlf.fuse(np.zeros(4), np.zeros(5), [np.zeros(4)]), "shape"),
    (lambda demo: dlf.fuse(np.zeros((2, 2, 2)), np.zeros(4), []), "dimensions"),
    (lambda demo: dlf.fuse(np.full(4, np.nan), np.zeros(4), [np.zeros(4)]), "NaN"),
])
def test_wrong_input_is_named(demo, call, says):
    with pytest.raises((ValueError, OSError), match=says):
        call(demo)


def engine_threads():
    """The threads that compute, which Python doesn't know of."""
    names = []
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/comm", encoding="utf-8") as file:
                names.append(file.read().strip())
        except OSError:
            pass  # It ended meanwhile.
    return names.count("dlf-engine")


def wait_until_no_thread_computes():
    for _ in range(600):
        before = time.process_time()
        time.sleep(0.1)
        # A thread that computes takes most of that.
        if time.process_time() - before < 0.03:
            return
    raise AssertionError("a thread still computes")


def test_a_stream_that_is_dropped_ends(demo):
    stream = demo.stream(SUM, max_new_tokens=400, ignore_eos=True, device="cpu")
    next(stream)
    del stream
    wait_until_no_thread_computes()
    assert "42" in demo.generate(SUM, device="cpu").text


def test_generations_share_a_thread():
    ensemble = dlf.Ensemble.demo()
    before = engine_threads()
    alone = ensemble.generate(SUM, device="cpu").token_ids
    for length in (8, 200, 8):
        ensemble.generate(SUM, max_new_tokens=length, ignore_eos=True, device="cpu")
        assert engine_threads() == before + 1, "the one that waits serves, or is replaced"
    # Two at once are two threads, and one of them waits afterwards.
    first, second = (ensemble.stream(SUM, device="cpu") for _ in range(2))
    next(first)
    next(second)
    assert engine_threads() == before + 2
    assert first.finish().token_ids[-1] == alone[-1] and second.finish().token_ids[-1] == alone[-1]
    with pytest.raises(RuntimeError, match="cuda:77"):
        ensemble.generate(SUM, device="cuda:77")
    assert ensemble.generate(SUM, device="cpu").token_ids == alone
    ensemble.release()
    assert engine_threads() == before
    assert ensemble.generate(SUM, device="cpu").token_ids == alone


def test_ctrl_c_is_seen_while_the_engine_computes(demo):
    whole = demo.generate(SUM, max_new_tokens=400, ignore_eos=True, device="cpu")
    stream = demo.stream(SUM, max_new_tokens=400, ignore_eos=True, device="cpu")
    next(stream)
    # A small part of what the whole takes.
    timer = threading.Timer(0.02, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        stream.finish()
        time.sleep(60)
    timer.join()
    # It stopped on the way, and not when all was done.
    rest = stream.finish().token_ids
    assert 0 < len(rest) < 399
    assert rest == whole.token_ids[-len(rest):]


def test_the_documentation_runs(capsys):
    path = os.path.join(os.path.dirname(__file__), "..", "..", "docs", "embedding.md")
    with open(path, encoding="utf-8") as file:
        program = file.read().split("```python\n")[1].split("```")[0]
    exec(compile(program, path, "exec"), {})
    assert "42" in capsys.readouterr().out
