"""lab/speed.py: the arms of `infer.py --bench` beside the device's ceilings and other engines."""
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import SCHEDULE, draw, frozen_predictors, needs, tiny_model
from infer import generate
from lab import speed
from lab.speed import Transformers, engines, measure, retyped, their_caches
from prune import UNPRUNED, flops, predictor_scorer, prefill
from support.runs import Progress, random_prompt
from support.weights import hf_name

TOKENS = random_prompt(90, 40)
BEST = 1e12, 1e10                   # what a device reaches, so that floors are known


def arms_of(model):
    scorer = predictor_scorer(frozen_predictors(dim=model.config.dim))
    return {"full": (model, UNPRUNED, None), "sdtp": (model, SCHEDULE, scorer)}


def row_of(arms, new=5, repeats=1):
    return measure(TOKENS, arms, new, repeats, BEST, Progress(quiet=True))


# ------------------------------------------------------------------------------ times and floors


@pytest.mark.parametrize("changes", [{}, {"tied": True}])
def test_both_arms_are_measured_beside_their_floors(changes):
    model = tiny_model(**changes)
    arms, whole = arms_of(model), []
    row = row_of(arms, repeats=2)
    assert (row["n"], row["repeats"]) == (40, 2)
    # the head, a tensor of its own or the embedding, and the blocks
    weights = 4 * (90 * 48 + sum(p.numel() for p in model.blocks.parameters()))
    for name, (_, schedule, scorer) in arms.items():
        told, counts = row[name], schedule.counts(40, 6)
        _, caches, _ = prefill(model, TOKENS, schedule, scorer)
        assert told["kv_bytes"] == sum(2 * cache.k[:, :, :cache.n].nbytes for cache in caches)
        assert told["flops"] == flops(model.config, counts, schedule=schedule)
        floors = told["flops"] / 1e12, (weights + told["kv_bytes"]) / 1e10
        whole.append(floors[0] + 4 * floors[1])
        assert told["floors_s"] == pytest.approx([*floors, whole[-1]])
    assert row["speedup"]["e2e_by_floors"] == pytest.approx(whole[0] / whole[1])
    assert row["ideal"] == row["full"]["flops"] / row["sdtp"]["flops"] > 1


def test_the_ceilings_are_the_fastest_calls(monkeypatch):
    monkeypatch.setattr(speed, "timed",
                        lambda device, function, repeats: function() is None or [3.0, 0.5, 2.0])
    matmul, product = speed.ceilings(torch.device("cpu"), torch.float32)
    assert (matmul, product) == (4 * 1024**2 * 8192, 2 * 4 * 8192**2)


def test_the_first_call_is_not_timed(monkeypatch):
    calls, times = [], iter([0.0, 1.0, 5.0, 7.0])
    monkeypatch.setattr(speed.runs, "clock", lambda device: next(times))
    assert speed.timed(None, lambda: calls.append(1), 2) == [1.0, 2.0]
    assert len(calls) == 3


# ----------------------------------------------------------------------------------- transformers


@needs("transformers")
@pytest.mark.parametrize("changes", [       # a Llama, a Mistral, a Qwen2 and a Qwen3
    {"tied": True, "rope_llama3": (8.0, 1.0, 4.0, 48.0)}, {"window": 11}, {"qkv_bias": True},
    {"qk_norm": True, "qkv_bias": True, "o_bias": True}])
def test_transformers_runs_on_the_same_weights(changes):
    model = draw(tiny_model(**changes), torch.Generator().manual_seed(5))
    other = Transformers(model)
    theirs = dict(other.theirs.named_parameters())
    for name, p in model.named_parameters():
        assert theirs[hf_name(name)].data_ptr() == p.data_ptr(), "shared, not copied"
        assert not p.requires_grad
    arm = UNPRUNED, None, their_caches
    row = row_of({**arms_of(model), "transformers": (other, *arm)}, new=2)
    full, own, vs = row["full"], row["transformers"], row["vs"]["transformers"]
    assert vs["logits_differ_by"] < 1e-4
    assert vs["prefill"] == own["prefill_s"] / full["prefill_s"]
    assert vs["decode"] == own["decode_s"] / full["decode_s"]
    assert own["floors_s"] == full["floors_s"]
    ours = generate(model, TOKENS, 12, eos=()).tokens
    for _ in range(2):              # the second finds no caches of the first
        assert generate(other, TOKENS, 12, *arm, eos=()).tokens == ours


# -------------------------------------------------------------------------------------- llama.cpp


@pytest.mark.parametrize("kind, error", [("F32", 0), ("BF16", 2**-8), ("Q8_0", 2**-6)])
def test_a_gguf_file_in_another_type_holds_the_same(kind, error, tmp_path):
    gguf = pytest.importorskip("gguf")
    import test_convert
    first = test_convert.write(tmp_path / "m.gguf", test_convert.draw(), "llama", "Q4_0")
    old, new = map(gguf.GGUFReader, (first, retyped(first, kind, tmp_path / "again.gguf")))
    told, again = ({name: field.contents() for name, field in file.fields.items()
                    if not name.startswith("GGUF.")} for file in (old, new))
    assert told == again
    for a, b in zip(old.tensors, new.tensors, strict=True):
        want, found = (gguf.dequantize(t.data, t.tensor_type) for t in (a, b))
        assert a.name == b.name and abs(want - found).max() <= error * abs(want).max()
        assert b.tensor_type.name == (kind if want.ndim > 1 else "F32")


@needs("llama_cpp")
def test_llama_cpp_says_the_same(tmp_path):
    import test_convert
    model = tiny_model(dim=64, head_dim=16, n_blocks=4, vocab=len(test_convert.TOKENS))
    file = test_convert.write(tmp_path / "m.gguf", model)
    args = SimpleNamespace(vs=["llama.cpp", str(file)], lengths=[40], max_new_tokens=12)
    arms = engines(args, model)
    assert list(arms) == ["llamacpp_F32", "llamacpp_BF16", "llamacpp_Q8_0"]
    ours = generate(model, TOKENS, 12, eos=()).tokens
    for _ in range(2):              # the second finds no caches of the first
        assert generate(arms["llamacpp_F32"][0], TOKENS, 12, *arms["llamacpp_F32"][1:],
                        eos=()).tokens == ours
    row = row_of({**arms_of(model), **arms}, new=2)
    assert row["vs"]["llamacpp_F32"]["logits_differ_by"] < 0.01


def test_an_engine_that_nobody_knows_is_refused(leaves):
    for words in (("vllm",), ("llama.cpp",), ("llama.cpp", "a", "b")):
        assert "--vs: expected transformers, or llama.cpp and a GGUF file" in leaves(
            "lab/speed.py", "--lengths", 32, "--vs", *words)


# ------------------------------------------------------------------------------------- the command


def test_the_command_prints_a_row_for_each_length(monkeypatch, capsys):
    words, told = "speed.py --lengths 32 48 --max-new-tokens 2 --repeats 1 --quiet", {}
    monkeypatch.setattr(sys, "argv", words.split())
    monkeypatch.setattr(speed, "ceilings", lambda *given: BEST)
    monkeypatch.setattr(speed.options, "print_json", lambda args, model, found: told.update(found))
    speed.main()
    out = capsys.readouterr().out
    assert [row["n"] for row in told["bench"]] == [32, 48]
    for row in told["bench"]:
        assert f"prefill {row['speedup']['prefill']:.2f}x of {row['ideal']:.2f}x" in out


def test_too_long_prompts_are_refused_before_anything_is_measured(leaves, monkeypatch):
    monkeypatch.setattr(speed, "ceilings", None)
    assert "position 2174 is " in leaves("lab/speed.py", "--lengths", 64, 2048)
