"""How answers are read after a pruned prompt, what the table adds up, and runs that go on."""
import argparse
import json
import math
from functools import partial

import pytest
import torch

from conftest import SCHEDULE, TOY, command
from infer import generate
from lab import quality
from lab.quality import Metric, Setup, measure, measure_rows, parse_arm, ratio, read_answers
from lab.scorers import earliest_scorer, random_scorer
from lab.tasks import Answer, Item
from model import KVCache, Tokenizer
from prune import Schedule, nll, prefill
from support.caches import H2OCache, h2o
from support.data import encode_row
from support.options import add_pruning_arguments, command_parser
from support.saved import load_pruning


# -------------------------------------------------------------------------------------------- arms


def test_arms():
    assert parse_arm("oracle:norm_g", 9) == ("oracle:norm_g", 9, KVCache, False)
    assert parse_arm("full", 9) == ("full", 9, KVCache, False)
    assert parse_arm("random@12", 9).stages == 9
    scorer, stages, cache, cut = parse_arm("predictor@5+h2o", 9, 0.3)
    assert (scorer, stages, cache.func, cut) == ("predictor", 5, H2OCache, False)
    assert cache.keywords == {"share": 0.3, "heavy": 0.5}
    local = parse_arm("full+local", 9, 0.2)
    assert local[:2] == ("full", 9) and local.cache.keywords == {"share": 0.2, "heavy": 0.0}


@pytest.mark.parametrize("name", ["nonsense", "oracle:none", "full+", "random@x", "compress@0",
                                  "full+h2o@3", ""])
def test_arms_that_say_nothing_are_refused(name):
    with pytest.raises(ValueError, match="unknown scorer"):
        parse_arm(name, 9)


@pytest.mark.parametrize("n", [400, 1000])
@pytest.mark.parametrize("schedule", [Schedule.scaled(12), Schedule.scaled(30), Schedule()])
def test_one_cut_costs_as_much_as_the_stages(schedule, n):
    blocks = {3: 32, 2: 30}.get(schedule.step, 12) if schedule.first > 2 else 12
    arm = parse_arm("earliest@cut", schedule.stages)
    cut = arm.schedule(schedule, blocks)
    assert cut.after(blocks) == schedule.after(blocks)[:1]
    ours, theirs = sum(cut.counts(n, blocks)), sum(schedule.counts(n, blocks))
    assert abs(ours - theirs) <= blocks
    assert arm.schedule(Schedule(stages=0), blocks) == Schedule(stages=0)


def test_truncation_keeps_the_first_and_the_protected(tokens):
    text = quality.truncate(tokens[:1], SCHEDULE, 6)
    k = round(sum(SCHEDULE.counts(60, 6)) / 6)
    assert text.tolist() == torch.cat((tokens[:1, :k - 6], tokens[:1, -6:]), 1).tolist()


def test_default_arms_suit_the_task():
    own = ["full", "predictor", "prior"]
    rules = ["random", "recent", "earliest", "norm"]
    attention = ["attention", "attention16", "expected"]
    oracles = ["oracle:norm_gx", "oracle:norm_g", "oracle:abs_dot"]
    arms = partial(quality.default_arms, trained=True, prior=0.5, tp=False)
    assert arms("nll") == [*own, *rules, *attention, *oracles]
    assert arms("nll", prior=0.0) == [*own[:2], *rules, *attention, *oracles]
    assert arms("nll", tp=True) == [*own, *rules, *oracles]
    assert arms("text") == [*own, *rules, "attention", "oracle:norm_gx"]
    assert arms("lambada") == [*own, "random", "recent", "attention"]
    assert arms("lambada", tp=True, trained=False) == ["full", "random", "recent"]
    assert arms("long") == [*own, "compress", "random", "recent"]
    assert arms("long", trained=False) == ["full", "random", "recent"]


# ----------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("cache", [KVCache, h2o(1.0)])
def test_answers_are_read_on_the_same_caches(tiny, tokens, cache):
    """Each is as likely as in a pass of its own; H2O that keeps everything changes nothing."""
    prompt = tokens[:1, :48]
    answers = [Answer([3, 4, 5], 0), Answer([7], 0), Answer([9, 8, 7, 6], 2)]
    found, seconds = read_answers(tiny, prompt, answers, SCHEDULE, random_scorer(4), cache)
    assert seconds > 0
    for answer, (value, count, chosen) in zip(answers, found, strict=True):
        row = torch.cat((prompt, torch.tensor([answer.tokens])), 1)
        alone = nll(tiny, row, 48, SCHEDULE, random_scorer(4))[0, answer.start:]
        assert value == pytest.approx(-alone.sum().item(), abs=1e-4)
        assert count == len(alone) and not chosen


@pytest.mark.parametrize("cache", [KVCache, h2o(0.4), h2o(0.4, 0.0)])
def test_an_answer_does_not_depend_on_those_before_it(tiny, tokens, cache):
    answers = [Answer([9, 8, 7, 6], 2), Answer([3, 4, 5], 0), Answer([9, 8, 7, 6], 2)]

    def read(some):
        return read_answers(tiny, tokens[:1], some, SCHEDULE, random_scorer(4), cache)[0]
    together = read(answers)
    assert together == [read([answer])[0] for answer in answers]


def test_an_answer_under_h2o_is_what_decode_would_say(tiny, tokens):
    said = generate(tiny, tokens[:1], 8, cache=h2o(0.4), eos=()).tokens
    whole = generate(tiny, tokens[:1], 8, eos=()).tokens
    assert said != whole and said[0] == whole[0]
    answers = [Answer(said, 0), Answer(whole, 0)]
    found, _ = read_answers(tiny, tokens[:1], answers, cache=h2o(0.4))
    assert [chosen for _, _, chosen in found] == [True, False]


def test_greedy_answer_is_recognised(tiny, tokens):
    said = generate(tiny, tokens[:1], 3).tokens
    found, _ = read_answers(tiny, tokens[:1], [Answer(said, 0)])
    assert found[0][2]


def test_compression_keeps_the_mean_count_and_the_protected(tiny, tokens):
    short = quality.compress(tiny, tokens[:1], SCHEDULE, earliest_scorer())
    k = round(sum(SCHEDULE.counts(60, 6)) / 6)
    expected = torch.cat((tokens[:1, :k - 6], tokens[:1, -6:]), 1)
    assert short.tolist() == expected.tolist()


def test_every_arm_on_the_toy():
    tokenizer = Tokenizer("toy")
    parser = command_parser("")
    add_pruning_arguments(parser)
    args = parser.parse_args(["--predictors", "checkpoints/toy"])
    model, schedule, predictors, _ = load_pruning(args)
    row = json.loads((TOY / "train.jsonl").read_text().splitlines()[-1])
    item = quality.as_item(encode_row(tokenizer, row))._replace(texts=(row["response"],))
    names = ["full", "full+h2o", "full+local", "predictor", "prior", "predictor@3",
             "predictor+h2o", "compress", "random", "oracle:norm_gx"]
    setup = Setup(model, schedule, predictors, 0.5, new_tokens=12, tokenizer=tokenizer)
    found = measure(setup, item, names, 0)
    assert list(found) == names
    assert found["full"]["score"] == found["predictor"]["score"] == 1.0
    assert found["full"]["answers"][0][2]
    assert found["full"]["keep"] == found["full+h2o"]["keep"] == 1.0
    assert found["predictor"]["keep"] < found["predictor@3"]["keep"] < 1.0
    assert found["compress"]["keep"] == pytest.approx(found["predictor"]["keep"], abs=0.01)
    for arm in found.values():
        assert arm["prefill_s"] > 0 and arm["e2e_s"] > arm["prefill_s"]
    _, caches, _ = prefill(model, torch.tensor([item.prompt]))
    assert caches[0].n == len(item.prompt)


# ----------------------------------------------------------------------------------------- metrics


def test_ratio_estimator():
    assert ratio([2.0, 6.0], [1, 3]) == (2.0, 0.0)
    assert ratio([1.0, 3.0], [1, 1]) == (2.0, 1.0)
    # the usual error of a share
    shares = [1.0] * 30 + [0.0] * 20
    assert ratio(shares, [1.0] * 50) == pytest.approx((0.6, math.sqrt(0.24 / 49)))


def row_of(sums, **more):
    """A measured row: {arm: negative log-likelihoods of two answers of 4 tokens}."""
    return {arm: {"answers": [[-a, 4, False], [-b, 4, True]], "keep": 0.5, **more}
            for arm, (a, b) in sums.items()}


def test_an_accuracy_has_a_difference_and_no_share():
    done = [row_of({"full": (1, 2), "random": (3, 2)}), row_of({"full": (3, 2), "random": (1, 2)})]
    done[0]["full"]["answers"][0][2] = done[1]["random"]["answers"][0][2] = True
    table = quality.table(done, ["full", "random"], "lambada")
    rows = {(row["scorer"], row["metric"]): row for row in table}
    assert rows["full", "acc"]["value"] == rows["random", "acc"]["value"] == 0.5
    assert rows["random", "acc"]["vs_full"] == 0.0
    assert rows["random", "acc"]["vs_full_stderr"] == 1.0
    assert "share_of_gap" not in rows["random", "acc"]


def test_table_of_likelihoods(capsys):
    done = [row_of({"full": (4, 0), "recent": (6, 0), "random": (8, 0)})] * 3
    table = quality.table(done, ["full", "recent", "random"], "nll")
    full, recent, random = table
    assert full == {"scorer": "full", "metric": "nll", "value": 1.0, "stderr": 0.0, "n": 3,
                    "mean_keep": 0.5}
    assert recent["vs_full"] == 0.5 and recent["vs_full_stderr"] == 0.0
    assert recent["share_of_gap"] == 0.5 and recent["share_stderr"] == 0.0
    assert random["vs_full"] == 1.0 and "share_of_gap" not in random
    quality.show(table)
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["scorer", "nll", "kept", "against", "full", "share", "of", "gap"]
    assert [text.split()[0] for text in out[2:]] == ["full", "recent", "random"]
    assert out[3].split()[1:] == ["1.500", "+-", "0.000", "50.0%", "+0.500", "+-", "0.000",
                                  "50.0%", "+-", "0.0%"]


def test_how_far_the_predictors_are_ahead_is_paired_by_row(capsys):
    """Every row has its own level, but the same lead: no error."""
    done = [row_of({"full": (4 + i, 0), "predictor": (6 + i, 0), "recent": (7 + i, 0),
                    "random": (8 + i, 0)}) for i in range(3)]
    table = quality.table(done, ["full", "predictor", "recent", "random"], "nll")
    leads = {row["scorer"]: (row.get("predictor_ahead"), row.get("predictor_ahead_stderr"))
             for row in table}
    assert leads == {"full": (-0.5, 0.0), "predictor": (None, None), "recent": (0.25, 0.0),
                     "random": (0.5, 0.0)}
    quality.show(table)
    out = capsys.readouterr().out
    assert "predictor ahead by" in out and "+25.0% +- 0.0%" in out


def test_shares_by_the_length_of_the_answer(capsys):
    """Short answers at a half of the gap, long ones at a quarter; a single middling one is none."""
    def rows(tokens, recent, n):
        arms = {"full": 4, "recent": recent, "random": 8}
        return [{arm: {"answers": [[-value, tokens, False]], "keep": 0.5}
                 for arm, value in arms.items()}] * n

    done = [*rows(24, 6, 3), *rows(64, 5, 1), *rows(65, 7, 2)]
    arms = ["full", "recent", "random"]
    short, long = groups = quality.by_answer(done, arms, "nll")
    assert (short["tokens"], short["n"]) == ([1, 24], 3)
    assert (long["tokens"], long["n"]) == ([65, None], 2)
    shares = [{row["scorer"]: row.get("share_of_gap") for row in one["rows"]} for one in groups]
    assert shares == [{"full": None, "recent": share, "random": None} for share in (0.5, 0.25)]
    quality.show_answers(groups)
    head, recent = capsys.readouterr().out.splitlines()[1:]
    assert "1 to 24 tokens (3)" in head and "65 tokens or more (2)" in head
    assert recent.split() == ["recent", "50%", "+-", "0%", "25%", "+-", "0%"]


def test_nothing_is_said_by_length_where_there_is_one_group_no_gap_or_another_task():
    done = [row_of({"full": (4, 0), "recent": (6, 0), "random": (8, 0)})] * 3
    two = done + [{arm: {"answers": [[-4, 99, False]], "keep": 0.5} for arm in done[0]}] * 2
    assert quality.by_answer(done, ["full", "recent", "random"], "nll") == []
    assert quality.by_answer(two, ["full", "recent"], "nll") == []
    assert quality.by_answer(two, ["full", "recent", "random"], "text") == []
    assert len(quality.by_answer(two, ["full", "recent", "random"], "nll")) == 2


def test_table_of_long_prompts():
    full = row_of({"full": (4, 0)}, score=1.0, prefill_s=3.0, e2e_s=8.0)
    done = [full | row_of({"recent": (8, 0)}, score=0.25, prefill_s=1.0, e2e_s=4.0)] * 2
    table = quality.table(done, ["full", "recent"], "long", "rouge_l")
    values = {(row["scorer"], row["metric"]): row["value"] for row in table}
    assert values == {
        ("full", "rouge_l"): 1.0, ("recent", "rouge_l"): 0.25,
        ("full", "nll"): 1.0, ("recent", "nll"): 2.0,
        ("full", "prefill_speedup"): 1.0, ("recent", "prefill_speedup"): 3.0,
        ("full", "e2e_speedup"): 1.0, ("recent", "e2e_speedup"): 2.0}
    assert [row["scorer"] for row in table if "vs_full" in row] == ["recent", "recent"]


def test_lambada_counts_the_models_own_choice():
    done = [row_of({"full": (4, 0)}), row_of({"full": (2, 0)})]
    done[1]["full"]["answers"][0][2] = True
    found = quality.metrics(done, "full", "lambada")
    assert found == {"acc": Metric([0.0, 1.0], [1.0, 1.0]), "nll": Metric([4, 2], [4, 4])}


# -------------------------------------------------------------------------------- runs that go on


def answers_of(rows, names):
    return [[row[name]["answers"] for name in names] for row in rows]


def test_a_killed_run_goes_on_and_measures_no_row_twice(tiny, tmp_path, monkeypatch):
    setup, names = Setup(tiny, SCHEDULE), ["full", "random"]
    items = [Item(list(range(20 + i)), [Answer([5, 6], 0)]) for i in range(4)]
    log = tmp_path / "rows.jsonl"
    whole = measure_rows(setup, items, names, tmp_path / "whole.jsonl", "settings")
    measure_rows(setup, items[:2], names, log, "settings")
    with log.open("a") as f:
        f.write('{"full": {"answers": [[-1')    # a kill in the middle of a line
    seeds = []

    def counting(setup, item, names, seed):
        seeds.append(seed)
        return measure(setup, item, names, seed)
    monkeypatch.setattr(quality, "measure", counting)
    again = measure_rows(setup, items, names, log, "settings")
    assert seeds == [2, 2, 3]                   # the first is the warm-up
    assert answers_of(again, names) == answers_of(whole, names)
    assert len(log.read_text().splitlines()) == 5
    seeds.clear()
    assert measure_rows(setup, items, names, log, "settings") == again and not seeds
    with pytest.raises(ValueError, match="belong to another command"):
        measure_rows(setup, items, names, log, "other settings")


def test_rows_of_another_format_are_another_commands(tiny):
    args, setup = argparse.Namespace(task="lambada", data=None), Setup(tiny, SCHEDULE)
    texts = [quality.identity(args, ["full"], setup, Item([1, 2], [Answer(tokens, 0)]))
             for tokens in ([3], [3], [9, 3])]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("text, message", [
    ('settings\n{"row": 1}\n', "its rows are not in order"),
    ('settings\n{"row": 0}\nrow\n', "line 3: not valid JSON"),
    ('settings\n{"row": 0}\n[]\n', "line 3: expected a JSON object"),
    ("", "belong to another command"),
    ("settings", "belong to another command"),
])
def test_a_damaged_rows_file_is_refused_and_left_alone(tmp_path, text, message):
    log = tmp_path / "rows.jsonl"
    log.write_text(text)
    with pytest.raises(ValueError, match=message):
        quality.stored_rows(log, "settings")
    assert log.read_text() == text


@pytest.mark.beside
def test_the_command_goes_on_with_a_larger_limit(tmp_path):
    log = tmp_path / "rows.jsonl"
    words = ("-m", "lab.quality", "--scorers", "full", "random", "predictor", "--rows-file", log,
             "--json")
    for limit, more in ((1, ()), (3, ("--quiet",))):        # which changes nothing of the rows
        code, out, err = command(*words, "--limit", limit, *more)
        assert code == 0, err
        result = json.loads(out)
        assert [row["scorer"] for row in result["rows"]] == ["full", "random", "predictor"]
        for row in result["rows"]:
            assert row["n"] == limit
            assert {"metric", "value", "stderr", "n", "mean_keep"} <= set(row)
    assert "1 rows are in" in err and len(log.read_text().splitlines()) == 4
    assert result["command"].startswith("python -m lab.quality --scorers full random")


def test_a_task_with_words_of_its_own(tmp_path):
    rows = [{"context": f"Clara sells {what}. The fog moved.", "input": "What does Clara sell?",
             "answers": [what]} for what in ("cups", "hats")]
    data = tmp_path / "l.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = command("-m", "lab.quality", "--task", "long", "--data", data, "--json",
                             "--max-new-tokens", 4, "--rows-file", tmp_path / "rows")
    assert code == 0, err
    found = json.loads(out)["rows"]
    metrics = list(dict.fromkeys(row["metric"] for row in found))
    assert metrics == ["f1", "nll", "prefill_speedup", "e2e_speedup"]
    assert [row["scorer"] for row in found][:4] == ["full", "predictor", "compress", "random"]


@pytest.mark.parametrize("words, message", [
    (("--ckpt", "random:llama-7b"), "random weights are for timings"),
    (("--task", "lambada"), "--task lambada needs --data"),
    (("--scorers", "full", "nonsense"), "unknown scorer 'nonsense'"),
    (("--scorers", "full+h2o", "--h2o", "1.5"), "have to be shares"),
    (("--scorers", "predictor", "--first", 3), "predictors stand after blocks"),
    (("--data", "none.jsonl"), "no such data file"),
    (("--rouge", "--task", "text", "--data", "p.jsonl"), "--task text generates no text"),
])
def test_bad_input_ends_in_one_line(leaves, words, message):
    ended = leaves("lab/quality.py", *words)
    assert isinstance(ended, str) and message in ended
    assert len(ended.splitlines()) == 1 and ended.startswith("quality.py: ")


def test_a_row_beyond_the_models_positions_is_named_before_the_work(leaves, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "measure", None)
    text = "The fog moved behind the green mirrors. " * 400
    rows = {"text": [{"text": text}],
            "lambada": [{"text": "a short one"}, {"text": text}]}
    words = {"text": ("--max-prompt", 2000, "--max-response", 50), "lambada": ()}
    for task, number in (("text", 1), ("lambada", 2)):
        data = tmp_path / f"{task}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[task]))
        ended = leaves("lab/quality.py", "--task", task, "--data", data, *words[task])
        assert ended.startswith(f"quality.py: row {number}: a prompt of ")
        assert "more than this model's 2,048 positions" in ended
        assert len(ended.splitlines()) == 1


def test_a_limit_is_a_number(leaves, capsys):
    assert leaves("lab/quality.py", "--limit", "x") == 2
    assert "expected a whole number, at least" in capsys.readouterr().err
