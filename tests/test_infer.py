"""infer.py: generation, the times of both arms, the command lines, the committed toy's answers."""
import json
import math
from collections import Counter
from dataclasses import asdict

import pytest
import torch

import infer
from conftest import SCHEDULE, TOY, command, tiny_model
from infer import bench, generate, greedy, sampler, side_by_side
from lab.figures import dropped_at, survivors_text
from lab.scorers import SCORERS, make_scorer, random_scorer
from model import Tokenizer, load
from prune import Schedule, extend, prefill
from support import checkpoint
from support.data import examples
from support.parsers import infer_parser
from support.saved import load_pruning

# -------------------------------------------------------------------------------------- generation


def greedy_by_full_passes(model, tokens, n):
    for _ in range(n):
        token = model(tokens)[:, -1:].argmax(-1)
        tokens = torch.cat((tokens, token), 1)
    return tokens[0, -n:].tolist()


def test_generation_equals_recomputing_everything(tiny, tokens):
    run = generate(tiny, tokens[:1], 8)
    assert run.tokens == greedy_by_full_passes(tiny, tokens[:1], 8)
    assert run.counts == [60] * 6
    assert run.trace == []
    assert run.kv_bytes == 67 * 6 * 2 * 24 * 4


def test_keep_everything_generates_the_same_text(tiny, tokens):
    full = generate(tiny, tokens[:1], 8)
    everything = Schedule(1, 1, 4, 1.0)
    kept = generate(tiny, tokens[:1], 8, everything, random_scorer())
    assert full.tokens == kept.tokens
    assert full.kv_bytes == kept.kv_bytes


def test_pruned_generation_holds_the_scheduled_counts(tiny, tokens):
    run = generate(tiny, tokens[:1], 5, SCHEDULE, random_scorer(1))
    assert run.counts == SCHEDULE.counts(60, 6)
    assert len(run.tokens) == 5
    assert run.kv_bytes == sum(n + 4 for n in run.counts) * 2 * 24 * 4


def test_generation_stops_at_eos(tiny, tokens):
    said = generate(tiny, tokens[:1], 8).tokens
    end = said[2]
    stopped = generate(tiny, tokens[:1], 8, eos=(end,)).tokens
    assert stopped == said[:said.index(end) + 1]
    with pytest.raises(ValueError, match="at least 1"):
        generate(tiny, tokens[:1], 0)


def test_the_models_own_eos_is_the_default(tokens):
    said = generate(tiny_model(), tokens[:1], 8).tokens
    model = tiny_model(eos=(said[0],))
    assert generate(model, tokens[:1], 8).tokens == said[:1]
    assert generate(model, tokens[:1], 8, eos=()).tokens == said


def test_a_seed_fixes_what_is_drawn(tiny, tokens):
    def drawn():
        pick = sampler(2.0, torch.Generator().manual_seed(1))
        return generate(tiny, tokens[:1], 8, pick=pick).tokens

    said = drawn()
    assert drawn() == said
    assert said != generate(tiny, tokens[:1], 8).tokens


def test_a_temperature_near_0_is_greedy(tiny, tokens):
    cold = generate(tiny, tokens[:1], 8, pick=sampler(1e-50))
    assert cold.tokens == generate(tiny, tokens[:1], 8).tokens
    assert sampler(0) is greedy


@pytest.mark.parametrize("temperature", [-1.0, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ValueError, match=r"expected 0 \(greedy\) or more"):
        sampler(temperature)


@pytest.mark.parametrize("pick", [greedy, sampler(1.0)], ids=["greedy", "drawn"])
def test_damaged_weights_are_named(tiny, tokens, pick):
    tiny.head.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="not finite in torch.float32: the weights are damaged"):
        generate(tiny, tokens[:1], 8, pick=pick)


def test_pick_and_step_are_any_functions(tiny, tokens):
    """The choice of a token, and what decodes one: here the least likely, and counted steps."""
    positions = []

    def step(model, token, pos, caches, end):
        positions.append(pos.item())
        return extend(model, token, pos, caches, end)

    def least(logits):
        return logits.argmin(-1, keepdim=True)

    run = generate(tiny, tokens[:1], 4, pick=least, step=step)
    assert positions == [60, 61, 62]
    assert run.tokens[0] == tiny(tokens[:1])[0, -1].argmin()


def test_too_many_new_tokens_are_refused_before_the_prompt_is_read(tokens, monkeypatch):
    """A prompt of 60 and 5 new tokens read positions up to 63: the last token is never read."""
    model, read = tiny_model(max_positions=64), []

    def noting(*args):
        read.append(1)
        return prefill(*args)

    monkeypatch.setattr(infer, "prefill", noting)
    with pytest.raises(ValueError, match="position 64 is beyond this model's 64 positions"):
        generate(model, tokens[:1], 6)
    assert read == []
    assert len(generate(model, tokens[:1], 5).tokens) == 5
    assert read == [1]


def test_every_token_has_its_stage(tiny, tokens):
    _, _, trace = prefill(tiny, tokens[:1], SCHEDULE, random_scorer(1))
    stage_of = dropped_at(trace, 60)
    counts = SCHEDULE.counts(60, 6)
    dropped = [counts[s - 1] - counts[s] for s in range(1, 5)]
    found = [stage_of.count(s) for s in range(5)]
    assert found == [counts[5], *dropped]
    text = survivors_text(["a", "b", "c"], [0, 1, 2], 2, color=False)
    assert text.startswith("a\u00b7\u00b7\n\nkept to the end: 1 of 3")


# ------------------------------------------------------------------------------------------- times


def test_side_by_side_gives_what_each_arm_alone_does(tiny, tokens):
    arms = {"full": (None, None), "sdtp": (SCHEDULE, random_scorer(1))}
    runs = side_by_side(tiny, tokens[:1], arms, 6, eos=())
    assert runs["full"].tokens == generate(tiny, tokens[:1], 6, eos=()).tokens
    assert runs["sdtp"].counts == SCHEDULE.counts(60, 6)
    assert all(len(run.tokens) == 6 for run in runs.values())
    assert all(run.prefill_s > 0 for run in runs.values())


def test_bench_times_both_arms(tiny):
    row, = bench(tiny, [40], SCHEDULE, random_scorer(), new=3, repeats=2)
    assert row["n"] == 40
    prompt = torch.zeros(1, 40, dtype=torch.long)
    arms = {"full": (None, None), "sdtp": (SCHEDULE, random_scorer())}
    for name, arm in arms.items():
        times = row[name]
        assert {"prefill_s", "decode_s", "e2e_s", "peak_bytes", "kv_bytes"} <= set(times)
        assert times["prefill_s"] > 0
        assert times["decode_s"] > 0
        run = generate(tiny, prompt, 3, *arm, eos=())
        assert times["kv_bytes"] == run.kv_bytes
    assert row["sdtp"]["kv_bytes"] < row["full"]["kv_bytes"]
    assert 1 < row["ideal"] < 3
    assert row["share_of_ideal"] == row["speedup"]["prefill"] / row["ideal"]


# ----------------------------------------------------------------------------------------- the toy


def test_toy_answers_with_a_third_of_the_tokens():
    """A dozen held-out prompts: right in full and as the committed predictors prune them.

    Pruned at random the toy is mostly wrong.
    """
    args = infer_parser("", SCORERS).parse_args(["--device", "cpu"])
    model, schedule, predictors, _ = load_pruning(args)
    assert 0.64 < schedule.pruned < 0.66
    assert len(schedule.after(12)) == schedule.stages
    right = Counter()
    for example in examples(Tokenizer("toy"), TOY / "train.jsonl", "heldout", limit=12):
        tokens, n = example.tokens[None], example.prompt_len
        assert n >= 300
        arms = {"full": (None, None)}
        for name in ("predictor", "random"):
            arms[name] = schedule, make_scorer(name, model, schedule, predictors)
        for name, arm in arms.items():
            said = generate(model, tokens[:, :n], tokens.shape[1] - n, *arm).tokens
            right[name] += said == tokens[0, n:].tolist()
    assert right["full"] >= 11, right
    assert right["predictor"] >= 10, right
    assert right["random"] <= 8, right


def test_toy_on_disk_is_small_and_its_tokenizer_round_trips():
    assert sum(f.stat().st_size for f in TOY.iterdir()) < 10_000_000
    tokenizer = Tokenizer("toy")
    text = "Anna sells golden lamps. Zürich 42!"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    model = load("toy", device="cpu")
    assert len(model.blocks) == 12
    assert model.config.n_kv_heads < model.config.n_heads
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([ids]))).all()


# ------------------------------------------------------------------------------------ command lines


@pytest.mark.beside
def test_infer_command(tmp_path):
    page = tmp_path / "page.html"
    code, out, err = command("infer.py", "--json", "--html", page)
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    full, sdtp = result["full"], result["sdtp"]
    assert full["text"].strip() == result["expected"] == sdtp["text"].strip()
    assert sdtp["counts"][-1] < 0.36 * result["prompt_tokens"]
    assert page.is_file()


@pytest.mark.beside
def test_bench_command():
    code, out, err = command("infer.py", "--bench", 64, "--max-new-tokens", 2, "--repeats", 1,
                             "--json")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["bench"][0]["n"] == 64


REFUSED = [     # options of infer.py, what the one line says
    (("--prompt", " "), "the prompt is empty"),
    (("--ckpt", "llama-7b"), "no checkpoint 'llama-7b'"),
    (("--ckpt", "random:llama-1", "--bench", "64"), "unknown shape"),
    (("--prompt", "word " * 3000), "beyond this model's 2048 positions"),
    (("--row", 9999), "held-out rows"),
    (("--first", 3), "predictors stand after blocks"),
    (("--keep", 0), "keep lies in"),
    (("--device", "warp"), "not available here"),
    (("--prompt-file", "tests"), "directory"),
    (("--temperature", "nan"), "expected 0 (greedy) or more"),
    (("--predictors", "none.safetensors"), "no such file"),
    (("--h2o", 0.4, "--compile"), "cannot decode in static shapes"),
    (("--bench", 64, "--h2o", 0.4), "--bench reads whole caches greedily"),
    (("--tp", "--bench", 64), "--tp runs without --compile and --bench"),
    (("--tp",), "--tp and torchrun"),
]


@pytest.mark.parametrize("words, message", REFUSED)
def test_bad_input_ends_in_one_line(words, message, leaves):
    ended = leaves("infer.py", *words)      # sys.exit prints a text on stderr and exits with 1
    assert isinstance(ended, str)
    assert ended.startswith("infer.py: ")
    assert message in ended
    assert len(ended.splitlines()) == 1


def test_random_weights_have_nothing_to_say(leaves, monkeypatch):
    monkeypatch.setitem(checkpoint.PUBLISHED, "tiny", asdict(tiny_model().config))
    ended = leaves("infer.py", "--ckpt", "random:tiny")
    assert ended == "infer.py: random weights have nothing to say: use --bench"


@pytest.mark.beside
def test_a_bad_command_writes_one_line_and_no_traceback():
    code, _, err = command("infer.py", "--keep", 0)
    assert code == 1
    assert len(err.strip().splitlines()) == 1
    assert "keep lies in" in err


@pytest.mark.parametrize("words", [("--bench", -5), ("--max-new-tokens", 0)])
def test_numbers_out_of_range_are_refused_by_the_command_line(words, leaves, capsys):
    assert leaves("infer.py", *words) == 2
    assert "expected a whole number, at least" in capsys.readouterr().err
