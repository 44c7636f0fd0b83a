"""lab/quality.py: arms, answers after a pruned prompt, what the table adds up, runs that go on."""
import json
import math
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import (ROOT, SCHEDULE, TOKENS, TOY, command, frozen_predictors, jsonl,
                      tiny_model)
from infer import generate
from lab import quality
from lab.caches import H2OCache, h2o
from lab.quality import Setup, measure, parse_arm, prepare, ratio, read_answers, shortened
from lab.scorers import lookahead, one_cut, random_scorer
from lab.tasks import Answer, Item
from model import KVCache
from prune import UNPRUNED, nll, prefill
from saliency import saliency
from support import options
from support.files import load_tensors, save_tensors
from support.runs import Measured

MODEL = tiny_model()
SETUP = Setup(MODEL, SCHEDULE, frozen_predictors())
PROMPT = TOKENS[:, :48]
ITEM = Item(PROMPT[0].tolist(), [Answer([3, 4, 5], 0)])


# -------------------------------------------------------------------------------------------- arms


def test_names_of_arms():
    assert parse_arm("oracle:norm_g", 9) == ("oracle:norm_g", 9, KVCache, False)
    assert parse_arm("random@12", 9).stages == 9
    scorer, stages, cache, _ = parse_arm("predictor@5+h2o", 9, 0.3)
    assert (scorer, stages, cache.func) == ("predictor", 5, H2OCache)
    assert cache.keywords == {"share": 0.3, "heavy": 0.5}
    assert parse_arm("full+local", 9, 0.2).cache.keywords == {"share": 0.2, "heavy": 0.0}


@pytest.mark.parametrize("name", ["nonsense", "oracle:none", "full+", "random@x", "compress@0",
                                  "full+h2o@3", "norm:2", ""])
def test_arms_that_say_nothing_are_refused(name):
    with pytest.raises(ValueError, match="unknown scorer"):
        parse_arm(name, 9)


def prepared(name, known=None):
    """-> text, (schedule, scorer, cache), keep."""
    return prepare(SETUP, parse_arm(name, 4), PROMPT, ITEM, 7, known or {})[1:4]


def test_what_an_arm_makes_of_a_prompt():
    assert prepared("full") == (PROMPT, (UNPRUNED, None, KVCache), 1.0)
    assert prepared("full+local")[1][2].keywords["heavy"] == 0.0
    assert prepared("random@2")[1][0].after(6) == [1, 2]
    assert prepared("random@cut")[1][0] == one_cut(SCHEDULE, 6)
    text, (schedule, scorer, _), keep = prepared("random")
    assert text is PROMPT and schedule == SCHEDULE
    assert keep == sum(SCHEDULE.counts(48, 6)) / 6 / 48
    x, pos = torch.zeros(1, 48, 48), torch.arange(48)[None]
    assert torch.equal(scorer(1, x, pos), random_scorer(7)(1, x, pos))


def test_truncation_and_compression_keep_the_mean_count_and_the_protected():
    k = round(sum(SCHEDULE.counts(48, 6)) / 6)
    first = torch.cat((PROMPT[:, :k - 5], PROMPT[:, -5:]), 1)
    for name, equal in (("truncate", True), ("compress", False)):
        text, arm, keep = prepared(name)
        assert arm == (UNPRUNED, None, KVCache) and keep == k / 48 and text.shape == (1, k)
        assert torch.equal(text[:, -5:], PROMPT[:, -5:]) and torch.equal(text, first) == equal

    def scorer(s, x, pos):      # stage 1 alone prefers late tokens; how far does not count
        return (pos if s == 1 else -pos).float() / 10 ** s
    assert torch.equal(shortened(MODEL, PROMPT, SCHEDULE, scorer), first)


@pytest.mark.parametrize("name", [
    "full", "random", "predictor", "compress", "truncate", "two-pass", "lookahead", "middle"])
def test_flops_of_an_arm(name):
    """Nearly those of all products: of attention's only the pairs that are seen count."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        reading = prepare(SETUP, parse_arm(name, 4), PROMPT, ITEM, 7, {})
        prefill(reading.model, reading.text, *reading.how[:2])
    whole = counter.get_total_flops()
    assert 0.8 * whole < reading.flops < whole


def test_an_oracle_reads_the_saliency_of_the_first_answer_once_a_row():
    tokens, pos = torch.tensor([ITEM.prompt + [3, 4, 5]]), torch.tensor([[0, 7, 40]])
    s = saliency(MODEL, tokens, 48, SCHEDULE.after(6), "norm_g")
    assert torch.equal(prepared("oracle:norm_g")[1][1](3, None, pos), s[2, pos])
    again = prepared("oracle:norm_g@2", {"oracle:norm_g": s + 1})
    assert torch.equal(again[1][1](3, None, pos), s[2, pos] + 1)


def test_a_draft_reads_a_prompt_once_and_is_paid_by_each_arm():
    scores, arm = torch.rand(1, 48), parse_arm("lookahead", 4)
    reading = prepare(SETUP, arm, PROMPT, ITEM, 7, {"lookahead": (scores, 60.0, 9)})
    assert torch.equal(reading.how[1](1, None, torch.arange(48)[None]), scores)
    assert 60 < reading.seconds < 61
    known = {}
    prepare(SETUP, arm, PROMPT, ITEM, 7, known)
    found, seconds, _ = known["lookahead"]
    assert torch.equal(found, lookahead(MODEL, PROMPT)) and seconds < 9


# ----------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("cache", [KVCache, h2o(1.0)])
def test_answers_are_read_on_the_same_caches(cache):
    """Each is as likely as in a pass of its own; H2O that keeps everything changes nothing."""
    answers = [Answer([3, 4, 5], 0), Answer([7], 0), Answer([9, 8, 7, 6], 2)]
    found, _ = read_answers(MODEL, PROMPT, answers, SCHEDULE, random_scorer(4), cache)
    for answer, (value, count, chosen) in zip(answers, found, strict=True):
        row = torch.cat((PROMPT, torch.tensor([answer.tokens])), 1)
        alone = nll(MODEL, row, 48, SCHEDULE, random_scorer(4))[answer.start:]
        assert value == pytest.approx(-alone.sum().item(), abs=1e-4)
        assert count == len(alone) and not chosen


def test_an_answer_does_not_depend_on_those_before_it():
    """Not where it evicts either; where nothing is lost, the test above has said so."""
    def read(some):
        return read_answers(MODEL, PROMPT, some, SCHEDULE, random_scorer(4), h2o(0.4))[0]
    answers = [Answer([9, 8, 7, 6], 2), Answer([3, 4, 5], 0), Answer([9, 8, 7, 6], 2)]
    assert read(answers) == [read([answer])[0] for answer in answers]


def test_an_answer_is_chosen_where_decode_would_say_it():
    kinds = (h2o(0.4), KVCache)
    said = [generate(MODEL, PROMPT, 8, cache=cache, eos=()).tokens for cache in kinds]
    assert said[0] != said[1] and said[0][0] == said[1][0]
    for cache, right in zip(kinds, ([True, False], [False, True])):
        found, _ = read_answers(MODEL, PROMPT, [Answer(each, 0) for each in said], cache=cache)
        assert [chosen for _, _, chosen in found] == right


def test_weights_that_are_not_finite_are_said_with_row_and_arm():
    model = tiny_model()
    model.blocks[0].down.weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"^row 3: full \(the logits are not finite"):
        measure(Setup(model, SCHEDULE), ITEM, ["full"], 2)


def test_an_answer_in_own_words_ends_at_eos():
    made = generate(MODEL, PROMPT, 6, eos=()).tokens
    said = str(made[:made.index(made[3])])
    setup = Setup(tiny_model(eos=(made[3],)), SCHEDULE, new_tokens=6,
                  tokenizer=SimpleNamespace(decode=str), score=lambda a, b: float(a == b))
    for texts, score in ((("no", said), 1.0), (("no",), 0.0)):
        found = measure(setup, ITEM._replace(texts=texts), ["full", "recent"], 0)
        assert (found["full"]["said"], found["full"]["score"]) == (said, score)
        assert all(arm["e2e_s"] > arm["prefill_s"] > 0 for arm in found.values())


# ----------------------------------------------------------------------------------------- metrics


def test_ratio_estimator():
    assert ratio([2.0, 6.0], [1, 3]) == (2.0, 0.0)
    assert ratio([1.0, 3.0], [1, 1]) == (2.0, 1.0)
    # the usual error of a share
    shares = [1.0] * 30 + [0.0] * 20
    assert ratio(shares, [1.0] * 50) == pytest.approx((0.6, math.sqrt(0.24 / 49)))


def row_of(sums, chosen=(), **more):
    """A measured row: {arm: the negative log-likelihood of an answer of 4 tokens}."""
    return {arm: {"answers": [[-value, 4, arm in chosen]], "keep": 0.5, "flops": 0.4,
                  "prefill_s": 1.0, **more}
            for arm, value in sums.items()}


def test_table_of_likelihoods(capsys):
    """Every row has its own level, but the same differences: they have no error."""
    done = [row_of({"full": 4 + i, "predictor": 6 + i, "recent": 7 + i, "random": 8 + i})
            for i in range(3)]
    table = quality.table(done, list(done[0]), "nll")
    level = pytest.approx(math.sqrt((1 + 0 + 1) * 3 / 2) / 12)
    for row, values in zip(table, [(1.25, None, None, -0.5), (1.75, 0.5, 0.5, None),
                                   (2.0, 0.75, 0.25, 0.25), (2.25, 1.0, None, 0.5)], strict=True):
        columns = ("value", "vs_full", "share_of_gap", "predictor_ahead")
        assert tuple(row.get(name) for name in columns) == values
        errors = [row[name] for name in row if name.endswith("_stderr")]
        assert errors == [0.0] * (3 - values.count(None)) and row["stderr"] == level
        assert (row["metric"], row["n"], row["mean_keep"]) == ("nll", 3, 0.5)
    quality.show(table[::-1])
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert [text.split()[0] for text in lines] == list(done[0])
    assert " ".join(lines[2].split()[1:]) == (
        "2.000 +- 0.144 50.0% 40.0% +0.750 +- 0.000 25.0% +- 0.0% +25.0% +- 0.0%")


def test_an_accuracy_has_a_difference_and_no_share():
    sums = {"full": 1, "random": 3}
    table = quality.table([row_of(sums, ["full"]), row_of(sums, ["random"])], list(sums), "needle")
    assert [row["metric"] for row in table] == ["nll", "nll", "acc", "acc"]
    assert [row["value"] for row in table[2:]] == [0.5, 0.5]
    assert (table[3]["vs_full"], table[3]["vs_full_stderr"]) == (0.0, 1.0)
    assert "share_of_gap" not in table[3]


def test_table_of_long_prompts():
    full = row_of({"full": 4}, score=1.0, prefill_s=3.0, e2e_s=8.0)
    done = [full | row_of({"recent": 8}, score=0.25, prefill_s=1.0, e2e_s=4.0)] * 2
    table = quality.table(done, ["full", "recent"], "long", "rouge_l")
    assert {row["metric"]: row["value"] for row in table if row["scorer"] == "recent"} == {
        "rouge_l": 0.25, "nll": 2.0, "prefill_speedup": 3.0, "e2e_speedup": 2.0}
    assert [row["metric"] for row in table if "vs_full" in row] == ["nll", "rouge_l"]


def test_needles_by_length_and_depth(capsys):
    done = [row_of({"full": 4 * i, "random": 40}) for i in range(4)]
    found = quality.cells(done, ["full", "random"], [100, 2000], [0, 50])
    places = [(100, 0), (100, 50), (2000, 0), (2000, 50)]
    assert found == [{"scorer": arm, "length": n, "depth": depth, "probability": value}
                     for i, (n, depth) in enumerate(places)
                     for arm, value in (("full", math.exp(-i)), ("random", math.exp(-10)))]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split() == ["2,000", "50%", "0.05", "0.00"]


# -------------------------------------------------------------------------------- runs that go on


def test_odd_rows_meet_the_arms_in_reverse(monkeypatch):
    monkeypatch.setattr(quality, "measure_arm", lambda setup, item, name, *rest: rest[0])
    assert list(measure(SETUP, ITEM, ["full", "random"], 2).items()) == [("full", 2), ("random", 2)]
    assert list(measure(SETUP, ITEM, ["full", "random"], 3)) == ["random", "full"]


def test_a_stopped_run_goes_on_and_measures_no_row_twice(tmp_path, monkeypatch):
    items, numbers = [Item(list(range(20 + i)), ITEM.answers) for i in range(4)], []

    def rows(name, n):
        store = Measured(tmp_path / name, "settings")
        found = quality.measure_rows(SETUP, items[:n], ["full", "random"], store)
        return [[arm["answers"] for arm in row.values()] for row in found]
    whole = rows("whole", 4)
    rows("stopped", 2)
    monkeypatch.setattr(quality, "measure",
                        lambda *given: numbers.append(given[-1]) or measure(*given))
    for _ in range(2):
        assert rows("stopped", 4) == whole and numbers == [2, 3]


@pytest.mark.beside
def test_the_command_goes_on_with_a_larger_limit(tmp_path):
    words = ("-m", "lab.quality", "--scorers", "full", "predictor", "random", "--json",
             "--predictors", TOY)
    here = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    for limit, more in ((1, ()), (3, ("--quiet",))):        # which changes nothing of the rows
        code, out, err = command(*words, "--limit", limit, *more, **here)
        assert code == 0, err
        full, predictor, random = json.loads(out)["rows"]
        assert full["n"] == limit and predictor["scorer"] == "predictor"
    assert "1 results are in" in err
    assert full["value"] < 0.1 and predictor["value"] < 0.5 < random["value"]
    code, out, err = command(*words, "--limit", 1, "--split", "validation", **here)
    assert code == 0 and json.loads(out)["rows"][0]["value"] != full["value"], err


@pytest.mark.beside
def test_each_checkpoint_has_its_own_numbers(tmp_path):
    """Two that differ in the last block alone, one after the other, and none from one row."""
    shutil.copytree(TOY, tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    state, _ = load_tensors(file)
    state["model.layers.11.self_attn.o_proj.weight"] *= 0.5
    save_tensors(file, state, {})
    found = []
    for ckpt in (TOY, tmp_path / "b"):
        code, out, err = command("-m", "lab.quality", "--ckpt", ckpt, "--predictors", TOY,
                                 "--limit", 1, "--scorers", "full", "--json", cwd=tmp_path,
                                 env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert code == 0 and "already" not in err, err
        assert "1 rows: fewer than ten tell little" in err and "+-" not in err.split("full")[-1]
        found += json.loads(out)["rows"]
    assert found[0]["value"] != found[1]["value"]
    assert found[0]["stderr"] is found[1]["stderr"] is None
    assert "were trained for other weights" in err


@pytest.mark.parametrize("task, metrics", [
    ("long", ["nll", "f1", "prefill_speedup", "e2e_speedup"]), ("text", ["nll"]),
    ("needle", ["nll", "acc"])])
def test_every_task_on_the_toy(tmp_path, monkeypatch, task, metrics):
    text, result = "The fog moved behind the green mirrors. " * 20, {}
    row = {"text": text, "context": text, "input": "What moved?", "answers": ["The fog"]}
    data = jsonl(tmp_path / "d.jsonl", [row, row])
    monkeypatch.setattr(options, "print_json", lambda args, model, told: result.update(told))
    arms = ["full", "predictor", "predictor@cut+h2o", "compress", "oracle:abs_dot", "lookahead:32",
            "two-pass", "middle"]
    shape = {"long": "--max-prompt 100 --max-response 9 --max-new-tokens 3",
             "text": "--max-prompt 100 --max-response 9", "needle": "--depths 0 100 --lengths 150"}
    words = f"quality.py --task {task} --data {data} {shape[task]}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*words.split(), "--scorers", *arms])
    quality.main()
    found = [(row["metric"], row["scorer"]) for row in result["rows"]]
    assert found == [(metric, arm) for metric in metrics for arm in arms]
    assert len(result.get("cells", ())) == (2 * len(arms) if task == "needle" else 0)


@pytest.mark.parametrize("words, message", [
    (("--scorers", "full", "nonsense"), "unknown scorer 'nonsense'"),
    (("--scorers", "full+h2o", "--h2o", "1.5"), "have to be shares"),
    (("--scorers", "full", "middle@5"), "middle has one cut in its own place, @5 does nothing"),
    (("--draft", "toy"), "--draft is for the scorer lookahead"),
    (("--task", "text", "--data", "long.jsonl", "--max-prompt", 2000, "--max-response", 50),
     "position 2048 is past this model's 2048 positions"),
])
def test_bad_input_ends_in_one_line_before_the_work(leaves, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quality, "measure", None)
    jsonl(tmp_path / "long.jsonl", [{"text": "The fog moved behind the green mirrors. " * 400}])
    assert message in leaves("lab/quality.py", *words)
