"""Generation, the pictures, the benchmark's JSON and the command lines, on the tiny model and the committed toy."""
import importlib
import json
import math
import subprocess
import sys

import pytest
import torch

import bench
import infer
import pictures
from common import cli, examples
from conftest import ROOT, tiny_model
from model import PAD, Tokenizer, load
from prune import Schedule, attention_scorer, extend, make_scorer, norm_scorer, predictor_scorer, prefill, random_scorer

SCHEDULE = Schedule(1, 1, 4, 0.8)
TOY = ROOT / "checkpoints" / "toy"


def command(*words):
    """Run one of our commands as a user would: -> exit code, stdout, stderr."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def greedy_by_full_passes(model, tokens, n):
    tokens = tokens.clone()
    for _ in range(n):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    return tokens[0, -n:].tolist()


def test_generation_equals_recomputing_everything(tiny, tokens):
    run = infer.generate(tiny, tokens[:1], 8)
    assert run.tokens == greedy_by_full_passes(tiny, tokens[:1], 8)
    assert run.counts == [60] * 6 and run.trace == [] and run.kv_bytes == 67 * 6 * 2 * 24 * 4


def test_a_temperature_near_0_is_greedy_and_damaged_weights_are_named(tokens):
    model = tiny_model()
    assert infer.generate(model, tokens[:1], 8, temperature=1e-50).tokens == infer.generate(model, tokens[:1], 8).tokens
    model.head.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="not finite in torch.float32: the weights are damaged"):
        infer.generate(model, tokens[:1], 8, temperature=1.0)


def test_keep_everything_generates_the_same_text(tiny, tokens):
    full, kept = infer.generate(tiny, tokens[:1], 8), infer.generate(tiny, tokens[:1], 8, Schedule(1, 1, 4, 1.0), random_scorer())
    assert full.tokens == kept.tokens and full.kv_bytes == kept.kv_bytes


def test_pruned_generation_holds_the_scheduled_counts(tiny, tokens):
    run = infer.generate(tiny, tokens[:1], 5, SCHEDULE, random_scorer(1))
    assert run.counts == SCHEDULE.counts(60, 6) and len(run.tokens) == 5
    assert run.kv_bytes == sum(n + 4 for n in run.counts) * 2 * 24 * 4


def test_generation_stops_at_eos_and_samples_with_a_seed(tokens):
    model = tiny_model()
    first = infer.generate(model, tokens[:1], 8).tokens
    assert infer.generate(model, tokens[:1], 8, eos=(first[2],)).tokens == first[:first.index(first[2]) + 1]
    a, b = (infer.generate(model, tokens[:1], 8, temperature=2.0, generator=torch.Generator().manual_seed(s)).tokens for s in (1, 1))
    assert a == b and a != first
    with pytest.raises(ValueError, match="at least 1"):
        infer.generate(model, tokens[:1], 0)


def test_every_token_has_its_stage(tiny, tokens):
    _, caches, trace = prefill(tiny, tokens[:1], SCHEDULE, random_scorer(1))
    stage_of = pictures.dropped_at(trace, 60)
    counts = SCHEDULE.counts(60, 6)
    assert [stage_of.count(s) for s in range(5)] == [counts[5]] + [counts[s - 1] - counts[s] for s in range(1, 5)]
    assert pictures.survivors_text(["a", "b", "c"], [0, 1, 2], 2, color=False).startswith("a\u00b7\u00b7\n\nkept to the end: 1 of 3")


def test_bench_times_both_arms(tiny):
    rows = bench.bench(tiny, [40], SCHEDULE, random_scorer(), new=3, repeats=2)
    assert [row["n"] for row in rows] == [40]
    for arm in ("full", "sdtp"):
        assert {"prefill_s", "decode_s", "e2e_s", "peak_bytes", "kv_bytes"} <= set(rows[0][arm])
        assert rows[0][arm]["prefill_s"] > 0 and rows[0][arm]["decode_s"] > 0
        run = infer.generate(tiny, torch.zeros(1, 40, dtype=torch.long), 3, *((SCHEDULE, random_scorer()) if arm == "sdtp" else ()), eos=())
        assert rows[0][arm]["kv_bytes"] == run.kv_bytes
    assert rows[0]["sdtp"]["kv_bytes"] < rows[0]["full"]["kv_bytes"] and 1 < rows[0]["ideal"] < 3
    assert rows[0]["pruning_s"] > 0 and rows[0]["full"]["of_peak"] > 0


def test_bench_compares_with_transformers_on_the_same_weights(capsys):
    pytest.importorskip("transformers")
    for changes in ({"tied": True}, {"rope_llama3": (8.0, 1.0, 4.0, 48.0)}):
        row = bench.bench(tiny_model(**changes), [40], SCHEDULE, random_scorer(), new=2, repeats=1, vs="transformers")[0]
        assert row["vs"]["logits_differ_by"] < 1e-4 and {"prefill_s", "decode_s", "e2e_s", "peak_bytes", "kv_bytes"} <= set(row["transformers"])


ARMS = {"full": lambda m: (None, None), "norm": lambda m: (SCHEDULE, norm_scorer()), "attention": lambda m: (SCHEDULE, attention_scorer(m, SCHEDULE)),
        "prior": lambda m: (SCHEDULE, predictor_scorer([torch.nn.Linear(48, 2, device="cpu") for _ in range(4)], 0.3))}


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("arm", ARMS)
def test_a_batch_of_different_lengths_equals_its_rows_alone(tokens, arm, window):
    model = tiny_model(window=window)
    torch.manual_seed(0)
    schedule, scorer = ARMS[arm](model)
    prompts = [tokens[0, :48].tolist(), tokens[1, :31].tolist(), tokens[1, 5:11].tolist(), tokens[0, 10:11].tolist()]
    padded = torch.zeros(4, 48, dtype=torch.long)
    for b, p in enumerate(prompts):
        padded[b, :len(p)] = torch.tensor(p)
    logits, caches, trace = prefill(model, padded, schedule, scorer, lengths=[len(p) for p in prompts])
    for b, p in enumerate(prompts):
        alone, own, stages = prefill(model, torch.tensor([p]), schedule, scorer)
        assert torch.allclose(logits[b], alone[0], atol=1e-5)
        for stage, single in zip(trace, stages):
            assert stage.kept[b][stage.kept[b] < PAD].tolist() == single.kept[0].tolist()
        for cache, single in zip(caches, own):
            assert torch.equal(cache.pos[b][cache.pos[b] < PAD], single.pos[0]) and torch.allclose(cache.k[b, :, :single.n], single.k[0], atol=1e-5)
    new = infer.generate_batch(model, prompts, 7, schedule, scorer, eos=())
    assert new == [infer.generate(model, torch.tensor([p]), 7, schedule, scorer, eos=()).tokens for p in prompts]
    stop = new[1][3]
    assert infer.generate_batch(model, prompts, 7, schedule, scorer, eos=(stop,)) == [row[:row.index(stop) + 1] if stop in row else row for row in new]


def test_a_bad_batch_is_refused(tiny, tokens):
    for lengths in ([48, 30], [60, 0], [60]):
        with pytest.raises(ValueError, match="lengths"):
            prefill(tiny, tokens, lengths=lengths)
    with pytest.raises(ValueError, match="no empty one"):
        infer.generate_batch(tiny, [[1], []], 3)
    with pytest.raises(ValueError, match="one length"):
        prefill(tiny, tokens, SCHEDULE, attention_scorer(tiny, SCHEDULE, 16), lengths=[60, 20])


@pytest.mark.parametrize("window", [None, 11])
def test_static_decode_equals_plain_decode_on_ragged_caches(tokens, window):
    model = tiny_model(window=window)
    for arm in ((None, None), (SCHEDULE, norm_scorer())):
        plain, static = (prefill(model, tokens[:, :48], *arm, room=8)[1] for _ in range(2))
        step = infer.static_decode(model, static, 48, 56)
        for i in range(48, 56):
            assert torch.allclose(step(tokens[:, i:i + 1]), extend(model, tokens[:, i:i + 1], i, plain)[:, -1], atol=1e-5)
        a, b = (infer.generate(model, tokens[:1], 8, *arm, eos=(), static=s) for s in (False, True))
        assert a.tokens == b.tokens and a.kv_bytes == b.kv_bytes
    with pytest.raises(ValueError, match="no room"):
        infer.static_decode(model, prefill(model, tokens)[1], 60, 64)
    with pytest.raises(ValueError, match="static shapes"):
        infer.generate(model, tokens[:1], 8, h2o=0.4, static=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_cuda_graph_decodes_what_plain_decode_does(tokens):
    model = tiny_model().cuda()
    for arm in ((None, None), (SCHEDULE, norm_scorer())):
        plain, graph = (infer.generate(model, tokens[:1].cuda(), 12, *arm, eos=(), static=s) for s in (False, True))
        assert plain.tokens == graph.tokens and plain.kv_bytes == graph.kv_bytes


def test_h2o_that_keeps_everything_changes_nothing(tiny, tokens):
    for arm in ((None, None), (SCHEDULE, random_scorer(1))):
        plain = infer.generate(tiny, tokens[:1], 8, SCHEDULE if arm[0] else None, random_scorer(1) if arm[0] else None)
        kept = infer.generate(tiny, tokens[:1], 8, SCHEDULE if arm[0] else None, random_scorer(1) if arm[0] else None, h2o=1.0)
        assert plain.tokens == kept.tokens and plain.kv_bytes == kept.kv_bytes
    small = infer.generate(tiny, tokens[:1], 8, SCHEDULE, random_scorer(1), h2o=0.4)
    assert small.kv_bytes == sum(math.ceil(0.4 * (n + 7) - 1e-9) for n in small.counts) * 2 * 24 * 4
    with pytest.raises(ValueError, match="both are shares"):
        infer.generate(tiny, tokens[:1], 8, h2o=1.5)


# ----------------------------------------------------------------------------------------------------------- the toy


def test_toy_answers_with_a_third_of_the_tokens():
    """A dozen held-out prompts: full and pruned by the committed predictors are right, random is mostly wrong."""
    args = infer.argparse.Namespace(ckpt="toy", tp=False, predictors=None, device="cpu", dtype=None, first=None, step=None, stages=None, keep=None, sink=None, local=None)
    model, schedule, predictors, metadata = infer.load_pruning(args)
    assert 0.64 < schedule.pruned < 0.66 and len(schedule.after(12)) == schedule.stages
    right = {}
    for example in examples(Tokenizer("toy"), TOY / "train.jsonl", "heldout", limit=12):
        tokens, n = example.tokens[None], example.prompt_len
        assert n >= 300
        for name in ("full", "predictor", "random"):
            arm = (None, None) if name == "full" else (schedule, make_scorer(name, model, schedule, predictors))
            said = infer.generate(model, tokens[:, :n], tokens.shape[1] - n, *arm).tokens
            right[name] = right.get(name, 0) + (said == tokens[0, n:].tolist())
    assert right["full"] >= 11 and right["predictor"] >= 10 and right["random"] <= 8, right


def test_toy_on_disk_is_small_and_its_tokenizer_round_trips():
    assert sum(f.stat().st_size for f in TOY.iterdir()) < 10_000_000
    tokenizer = Tokenizer("toy")
    text = "Anna sells golden lamps. Zürich 42!"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    model = load("toy", device="cpu")
    assert len(model.blocks) == 12 and model.config.n_kv_heads < model.config.n_heads
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([tokenizer.encode(text)]))).all()


def test_infer_command(tmp_path):
    code, out, err = command("infer.py", "--json", "--html", tmp_path / "page.html")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["full"]["text"].strip() == result["expected"] == result["sdtp"]["text"].strip()
    assert result["sdtp"]["counts"][-1] < 0.36 * result["prompt_tokens"] and (tmp_path / "page.html").is_file()


def test_bench_eval_saliency_and_train_commands(tmp_path):
    code, out, err = command("infer.py", "--bench", 64, "--max-new-tokens", 2, "--repeats", 1, "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["bench"][0]["n"] == 64, err
    code, out, err = command("eval.py", "--limit", 2, "--scorers", "full", "random", "predictor", "--json")
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert code == 0 and {r["scorer"] for r in rows} == {"full", "random", "predictor"} and set(rows[0]) >= {"metric", "value", "stderr", "n", "mean_keep"}, err
    for figure in (1, 2):
        code, out, err = command("saliency.py", "--figure", figure, "--limit", 2, "--json")
        assert code == 0 and json.loads(out.splitlines()[-1])["figure"] == figure, err
    code, out, err = command("train.py", "--steps", 1, "--accum", 1, "--report-rows", 1, "--out", tmp_path / "p.safetensors", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["log"][0]["step"] == 1 and (tmp_path / "p.safetensors").is_file(), err
    code, out, err = command("infer.py", "--predictors", tmp_path / "p.safetensors", "--max-new-tokens", 2)
    assert code == 0, err
    code, out, err = command("prune.py", "--shape", "llama-7b", "--lengths", 4096, "--json")
    assert code == 0 and abs(json.loads(out.splitlines()[-1])["pruned"] - 0.651) < 1e-3, err


def leaves(words, monkeypatch):
    """Run a command's main in this process, as its last line does: -> what it leaves with."""
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with pytest.raises(SystemExit) as ended:
        cli(importlib.import_module(words[0].removesuffix(".py")).main)
    return ended.value.code


@pytest.mark.parametrize("words, message", [
    (("infer.py", "--prompt", " "), "the prompt is empty"),
    (("infer.py", "--ckpt", "llama-7b"), "no checkpoint 'llama-7b'"),
    (("infer.py", "--ckpt", "random:llama-1"), "unknown shape"),
    (("infer.py", "--prompt", "word " * 3000), "beyond this model's 2048 positions"),
    (("infer.py", "--row", 9999), "held-out rows"),
    (("infer.py", "--first", 3), "predictors stand after blocks"),
    (("infer.py", "--keep", 0), "keep lies in"),
    (("infer.py", "--device", "warp"), "not available here"),
    (("infer.py", "--prompt-file", "tests"), "directory"),
    (("infer.py", "--temperature", "nan"), "expected 0 (greedy) or more"),
    (("eval.py", "--ckpt", "random:llama-7b"), "no checkpoint"),
    (("infer.py", "--predictors", "none.safetensors"), "no such file"),
    (("train.py", "--data", "none.jsonl"), "no such data file"),
    (("train.py", "--cls", 0, "--mse", 0, "--rank", 0), "all loss weights are 0"),
    (("saliency.py", "--prompt", "a"), "needs --response"),
])
def test_bad_input_ends_in_one_line(words, message, monkeypatch):
    ended = leaves(words, monkeypatch)                               # sys.exit prints a text on stderr, and the exit code is 1
    assert isinstance(ended, str) and message in ended and len(ended.splitlines()) == 1 and ended.startswith(words[0])


def test_a_bad_command_writes_one_line_and_no_traceback():
    code, out, err = command("infer.py", "--keep", 0)
    assert code == 1 and len(err.strip().splitlines()) == 1 and "keep lies in" in err


@pytest.mark.parametrize("words", [("infer.py", "--bench", -5), ("infer.py", "--max-new-tokens", 0), ("saliency.py", "--row", -1), ("train.py", "--accum", 0),
                                   ("eval.py", "--limit", "x"), ("prune.py", "--lengths", 0)])
def test_numbers_out_of_range_are_refused_by_the_command_line(words, monkeypatch, capsys):
    assert leaves(words, monkeypatch) == 2 and "expected a whole number, at least" in capsys.readouterr().err
