"""infer.py: generation, the times of both arms, the command lines, the committed toy's answers."""
import contextlib
import json
import math
import sys
from collections import Counter
from dataclasses import asdict

import pytest
import torch

import infer
import toy
from conftest import SCHEDULE, TOY, command, tiny_model
from infer import bench, generate, greedy, sampler, side_by_side
from lab import quality
from lab.demo import show_arms
from lab.figures import dropped_at, survivors_text
from lab.scorers import SCORERS, make_scorer, random_scorer
from lab.tasks import Answer, Item
from model import Tokenizer, load
from prune import Schedule, extend, prefill
from support import checkpoint, timing
from support.data import examples
from support.parsers import infer_parser
from support.printing import print_bars
from support.prompts import Prompt
from support.sampling import fitting
from support.saved import load_pruning
from support.timing import random_prompt

# whatever was trained in this clone
COMMITTED = "--predictors", "checkpoints/toy"

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


def test_the_end_of_a_text_is_one_token_or_several(tiny, tokens):
    said = generate(tiny, tokens[:1], 8, eos=()).tokens
    end = said[2]
    stopped = said[:said.index(end) + 1]
    for eos in (end, (end,), [end, 89], {end}, torch.tensor([end])):
        assert generate(tiny, tokens[:1], 8, eos=eos).tokens == stopped
    for eos in ("2", 2.0, (end, None)):
        with pytest.raises(ValueError, match="expected a token id, or several"):
            generate(tiny, tokens[:1], 8, eos=eos)


@pytest.mark.parametrize("new", [0, -1, 2.0, "8", None])
def test_a_number_of_tokens_that_is_none_is_refused(tiny, tokens, new):
    with pytest.raises(ValueError, match="expected a whole number, at least 1"):
        generate(tiny, tokens[:1], new)


def test_more_than_one_prompt_is_refused(tiny, tokens):
    with pytest.raises(ValueError, match="reads one prompt, not 2: see lab/batch.py"):
        generate(tiny, tokens, 3)


@pytest.mark.parametrize("pick", [greedy, sampler(1.0)], ids=["greedy", "drawn"])
def test_damaged_weights_are_named(tiny, tokens, pick):
    tiny.head.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="not finite in torch.float32: the weights are damaged"):
        generate(tiny, tokens[:1], 8, pick=pick)


@pytest.mark.parametrize("damage", [math.nan, math.inf])
@pytest.mark.parametrize("drawn", [False, True])
def test_damage_that_only_decode_meets_is_named(tiny, tokens, damage, drawn):
    """A row of the embedding that the prompt does not read: the first new token meets it."""
    def pick():
        return sampler(2.0, torch.Generator().manual_seed(1)) if drawn else greedy

    prompt = tokens[:1, :8]
    first = generate(tiny, prompt, 1, pick=pick()).tokens[0]
    assert first not in prompt[0]
    tiny.embed.weight.data[first] = damage
    tiny.source = "folder/model.safetensors"
    assert generate(tiny, prompt, 1, pick=pick()).tokens == [first]
    with pytest.raises(ValueError, match="folder/model.safetensors: the logits are not finite in "
                                         "torch.float32: the weights are damaged"):
        generate(tiny, prompt, 4, pick=pick(), eos=())


def test_a_likelihood_that_is_none_names_its_row_and_is_not_kept(tiny, tmp_path):
    tiny.embed.weight.data[88] = math.nan
    items = [Item(list(range(20)), [Answer(answer, 0)]) for answer in ([5, 6], [88, 5])]
    log = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="^row 2, random: random weights: the logits are not fini"):
        quality.measure_rows(quality.Setup(tiny, SCHEDULE), items, ["full", "random"], log, "run")
    assert len(log.read_text().splitlines()) == 2       # "run", and the first row


def test_rows_meet_the_arms_there_and_back(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(quality, "measure_arm", lambda s, i, arm, *_: seen.append(arm.scorer))
    names = ["full", "random", "recent"]
    for number in range(2):
        found = quality.measure(quality.Setup(tiny, SCHEDULE), None, names, number)
        assert list(found) == names
    assert seen == [*names, *reversed(names)]


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


# What the toy's folder says of its positions in the tests below, where prompts of 60 are long.
LIMIT = 64


@pytest.fixture
def short(tmp_path):
    """The toy with LIMIT positions."""
    for path in TOY.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((TOY / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    config["max_position_embeddings"] = LIMIT
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def words_of(n):
    """A text of n tokens, with the begin-of-text."""
    text = "Anna sells old maps. " * 40
    return Tokenizer("toy").decode(Tokenizer("toy").encode(text)[1:n])


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*words) -> what infer.py prints, run in this process: out, err."""
    def said(*words):
        monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, words)])
        with contextlib.redirect_stdout(sys.stdout):        # --json turns it
            infer.main()
        return capsys.readouterr()
    return said


@pytest.mark.parametrize("n, new", [(60, 5), (LIMIT, 1)])
def test_as_many_tokens_as_fit_are_the_default(short, run, n, new):
    said = run("--ckpt", short, "--prompt", words_of(n), "--json")
    result = json.loads(said.out)
    assert result["prompt_tokens"] == n
    assert result["full"]["new_tokens"] <= new
    assert (f"new tokens: {new} instead of 48, because behind {n} prompt tokens no more fit into "
            "this model's 64 positions\n") in said.err


def test_what_fits_is_said_only_where_it_matters(tiny, capsys):
    assert [fitting(tiny.config, n, None, 48) for n in (1, 465, 466)] == [48, 48, 47]
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert fitting(tiny.config, 512, 1, 48) == 1
    with pytest.raises(ValueError, match="beyond this model's 512 positions"):
        fitting(tiny.config, 512, 50, 48)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("n, more", [(60, ("--max-new-tokens", 6)), (65, ()),
                                     (65, ("--max-new-tokens", 1))])
def test_what_does_not_fit_is_refused_before_any_prefill(short, leaves, monkeypatch, n, more):
    monkeypatch.setattr(infer, "prefill", None)
    ended = leaves("infer.py", "--ckpt", short, "--prompt", words_of(n), *more)
    assert ended.startswith("infer.py: ")
    assert "beyond this model's 64 positions; use a shorter prompt" in ended
    assert len(ended.splitlines()) == 1


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


def test_arms_are_timed_there_and_back_over_as_many_tokens(tiny, tokens, monkeypatch):
    """Whatever they say: here full ends with its second token, sdtp does not."""
    arms, made = {"full": (None, None), "sdtp": (SCHEDULE, random_scorer(1))}, []
    alone = {name: generate(tiny, tokens[:1], 6, *arm, eos=()).tokens
             for name, arm in arms.items()}
    end = alone["full"][1]
    assert end not in alone["full"][:1] + alone["sdtp"]

    def noting(model, tokens, new, *arm, **options):
        run = generate(model, tokens, new, *arm, **options)
        made.append(("sdtp" if arm[0] else "full", len(run.tokens)))
        return run

    monkeypatch.setattr(infer, "generate", noting)
    arms["sdtp"] = SCHEDULE, random_scorer(1)
    runs = side_by_side(tiny, tokens[:1], arms, 6, eos=(end,))
    assert [len(run.tokens) for run in runs.values()] == [2, 6]
    there, back = ["full", "sdtp"], ["sdtp", "full"]
    assert [name for name, _ in made] == [*there, *there, *there, *back, *there, *back]
    assert [n for _, n in made] == [2, 6, 4, 4, 1, 1, *[6] * 6]
    assert all(run.decode_s > 0 for run in runs.values())


class Letters:
    """Stands in for a tokenizer where only numbers matter."""

    def decode(self, ids):
        return " ".join(map(str, ids))

    def piece(self, token):
        return str(token)


def test_the_demo_compares_what_is_comparable(tiny, tokens, capsys):
    """Caches after the prompt, and times of as many tokens, though one text is shorter."""
    arms = {"full": (None, None), "sdtp": (SCHEDULE, random_scorer(1))}
    runs = {name: generate(tiny, tokens[:1], new, *arm, eos=())
            for (name, arm), new in zip(arms.items(), (8, 2))}
    told = show_arms(tiny, Prompt(tokens[0].tolist(), None, Letters()), runs, SCHEDULE)
    counts = SCHEDULE.counts(60, 6)
    assert told["full"]["kv_bytes"] == 60 * 6 * 2 * 24 * 4
    assert told["sdtp"]["kv_bytes"] == sum(counts) * 2 * 24 * 4
    for name, run in runs.items():
        assert told[name]["e2e_s"] == run.prefill_s + run.decode_s * 7
        assert told[name]["new_tokens"] == len(run.tokens)
    said = capsys.readouterr().out
    assert f"KV cache {1 - sum(counts) / 360:.0%} smaller" in said
    assert said.count("; 8 tokens in ") == 2


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


def test_the_peak_of_memory_is_that_of_the_run():
    if timing.peak_memory(torch.device("cpu")) is None:
        pytest.skip("this system does not say")
    taken = 1 << 27

    def hungry(new, first=None):
        torch.ones(taken, dtype=torch.uint8)
        return 1.0, 0.1

    arms = {"hungry": hungry, "modest": lambda new, first=None: (1.0, 0.1)}
    found = timing.take_turns(tiny_model(), 40, arms, 2, 2)
    grew = {name: arm["peak"] - arm["before"] for name, arm in found.items()}
    assert grew["hungry"] == pytest.approx(taken, rel=0.1) and grew["modest"] < taken / 10


def test_what_no_system_tells_is_a_dash(tiny, capsys, monkeypatch):
    monkeypatch.setattr(timing, "peak_memory", lambda device, reset=False: None)
    row, = bench(tiny, [40], SCHEDULE, random_scorer(), new=1, repeats=1)
    assert row["full"]["peak_bytes"] is row["sdtp"]["peak_bytes"] is None
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-2] for line in lines if line[0] == "40"] == ["-", "-"]


def test_bars_are_as_long_as_the_times(capsys):
    row = {"full": {"prefill_s": 3.0, "e2e_s": 6.0}, "sdtp": {"prefill_s": 1.5, "e2e_s": 4.0}}
    print_bars(row, ("full", "sdtp"))
    full, sdtp = capsys.readouterr().out.splitlines()
    assert full.split() == ["full", "=" * 30 + "-" * 30, "6.00", "s"]
    assert sdtp.split() == ["sdtp", "=" * 15 + "-" * 25, "4.00", "s"]


def test_bench_looks_at_all_lengths_first(capsys):
    model = tiny_model(max_positions=64)
    with pytest.raises(ValueError, match="position 64 is beyond this model's 64 positions"):
        bench(model, [20, 62, 30], SCHEDULE, random_scorer(), new=4, repeats=1)
    assert capsys.readouterr().out == ""
    row, = bench(model, [61], SCHEDULE, random_scorer(), new=4, repeats=1)
    assert row["n"] == 61


def test_a_type_that_this_cpu_emulates_is_not_measured(tiny, monkeypatch):
    monkeypatch.setattr(timing, "matmul_s", lambda dtype: 1.0 if dtype == torch.float16 else 0.02,
                        raising=False)
    with pytest.raises(ValueError, match="50 times as long as in float32, so measure with "):
        bench(tiny.half(), [20], SCHEDULE, random_scorer(), new=1, repeats=1)


def test_what_was_measured_is_kept_where_another_length_fails(leaves, capsys, monkeypatch):
    def no_room(model, n):
        if n == 33:
            raise torch.OutOfMemoryError("out of memory.\nTried to allocate 64 GB")
        return random_prompt(model, n)

    monkeypatch.setattr(infer, "random_prompt", no_room)
    ended = leaves("infer.py", "--bench", 32, 33, 34, "--max-new-tokens", 2, "--repeats", 1,
                   "--json")
    assert ended == "infer.py: not measured, see above: prompts of 33 tokens"
    out, err = capsys.readouterr()
    assert "     33  not measured: out of memory. Tried to allocate 64 GB" in err.splitlines()
    assert [row["n"] for row in json.loads(out)["bench"]] == [32, 34]


# ----------------------------------------------------------------------------------------- the toy


def test_toy_answers_with_a_third_of_the_tokens():
    """A dozen held-out prompts: right in full and as the committed predictors prune them.

    Pruned at random the toy is mostly wrong.
    """
    args = infer_parser("", SCORERS).parse_args(["--device", "cpu", *COMMITTED])
    model, schedule, predictors, _ = load_pruning(args)
    assert 0.34 < schedule.share(schedule.stages) < 0.36
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


def test_the_toy_is_asked_nothing_that_it_has_no_positions_for(leaves, monkeypatch):
    monkeypatch.setattr(toy, "examine", None)
    for least in (2049, 2046):      # no prompt fits; the prompt does, but its answer does not
        ended = leaves("toy.py", "--eval", 1, "--least", least)
        assert "beyond this model's 2048 positions" in ended
        assert len(ended.splitlines()) == 1


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
    code, out, err = command("infer.py", *COMMITTED, "--json", "--html", page)
    assert code == 0, err
    result = json.loads(out)
    full, sdtp = result["full"], result["sdtp"]
    assert full["text"].strip() == result["expected"] == sdtp["text"].strip()
    assert sdtp["counts"][-1] < 0.36 * result["prompt_tokens"]
    assert page.is_file()


def test_h2o_of_everything_and_fewer_stages(run):
    words = "--prompt", words_of(60), "--max-new-tokens", 3, "--json"
    plain, kept, fewer = (json.loads(run(*words, *more).out)
                          for more in ((), ("--h2o", 1), ("--stages", 5)))
    for name in ("full", "sdtp"):
        assert kept[name]["text"] == plain[name]["text"]
        assert kept[name]["kv_bytes"] == plain[name]["kv_bytes"]
    assert fewer["schedule"]["stages"] == max(fewer["stage_of"]) == 5
    assert fewer["sdtp"]["counts"][:7] == plain["sdtp"]["counts"][:7]
    assert set(fewer["sdtp"]["counts"][6:]) == {fewer["sdtp"]["counts"][6]}


@pytest.mark.beside
def test_bench_command():
    code, out, err = command("infer.py", "--bench", 64, "--max-new-tokens", 2, "--repeats", 1,
                             "--json")
    assert code == 0, err
    assert json.loads(out)["bench"][0]["n"] == 64


REFUSED = [     # options of infer.py, what the one line says
    (("--prompt", " "), "the prompt is empty"),
    (("--ckpt", "none"), "no checkpoint 'none'"),
    (("--ckpt", "random:llama-1", "--bench", "64"), "unknown shape"),
    (("--prompt", "word " * 3000), "beyond this model's 2048 positions"),
    (("--row", 9999), "held-out rows"),
    (("--first", 3), "predictors stand after blocks"),
    (("--keep", 0), "keep lies in"),
    (("--device", "warp"), "not available here"),
    (("--prompt-file", "tests"), "tests: no such prompt file"),
    (("--temperature", "nan"), "expected 0 (greedy) or more"),
    (("--predictors", "none.safetensors"), "no such file"),
    (("--h2o", 0), "have to be shares"),
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
