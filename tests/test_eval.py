"""The evaluation tasks: how rows become prompts and answers, how answers are scored, and what the tables add up."""
import argparse
import json
import math

import pytest
import torch

import eval as evaluation
import study
import tasks
from common import Example
from conftest import ROOT
from model import Tokenizer
from prune import H2O, SCORERS, Schedule, flops, nll, norm_scorer, prefill, random_scorer
from tasks import Answer, Item

SCHEDULE = Schedule(1, 1, 4, 0.8)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer("toy")


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_harness_formats():
    context, choices, label = tasks.as_choice("copa", {"premise": "The man ran.", "question": "cause", "choice1": "He was late.", "choice2": "It rained.", "label": 0})
    assert (context, choices, label) == ("The man ran because", [("", " he was late."), ("", " it rained.")], 0)
    context, choices, label = tasks.as_choice("winogrande", {"sentence": "Ann asked Bea as _ was lost.", "option1": "Ann", "option2": "Bea", "answer": "2"})
    assert (context, choices, label) == ("Ann asked Bea as", [(" Ann", " was lost."), (" Bea", " was lost.")], 1)
    assert tasks.as_choice("piqa", {"goal": "Do", "sol1": "a", "sol2": "b", "label": 1}) == ("Question: Do\nAnswer:", [("", " a"), ("", " b")], 1)
    for label, gold in ((True, 1), ("true", 1), ("false", 0), (0, 0)):
        assert tasks.as_choice("boolq", {"passage": "P.", "question": "q", "label": label})[1:] == ([("", " no"), ("", " yes")], gold)
    assert tasks.as_choice("lambada", {"text": "the end of it"}) == ("the end of", [("", " it")], 0)


def test_few_shot_rows_are_never_scored(tokenizer, tmp_path):
    rows = [{"context": f"The {w} sells", "choices": [f"number {i}", "nothing"], "label": 0} for i, w in enumerate(["baker"] * 30)]
    items = tasks.choice_items(tokenizer, jsonl(tmp_path / "c.jsonl", rows), "choice", 100, 2, seed=0)
    assert len(items) == 20                                          # ten are set apart
    text = tokenizer.decode(items[3].prompt)
    assert text.count("sells") == 3 and items[3].gold == 0
    drawn = {int(part.split()[1]) for item in items for part in tokenizer.decode(item.prompt).split("number")[1:] for part in ["number" + part]}
    assert drawn <= set(range(20, 30)) and len(drawn) > 3
    again = tasks.choice_items(tokenizer, tmp_path / "c.jsonl", "choice", 5, 2, seed=0)
    assert again == items[:5]                                        # a larger limit changes no earlier row


def test_rows_that_do_not_fit_are_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="row 1: not a row of piqa"):
        tasks.choice_items(tokenizer, jsonl(tmp_path / "x.jsonl", [{"goal": "g"}] * 30), "piqa", 5, 0, 0)
    with pytest.raises(ValueError, match="row 2: not a row of choice"):
        tasks.choice_items(tokenizer, jsonl(tmp_path / "y.jsonl", [{"context": "a", "choices": ["b"], "label": k} for k in (0, 1)] * 20), "choice", 5, 0, 0)
    with pytest.raises(ValueError, match="too few"):
        tasks.choice_items(tokenizer, jsonl(tmp_path / "z.jsonl", [{"context": "a", "choices": ["b"], "label": 0}] * 9), "choice", 5, 0, 0)


@pytest.mark.parametrize("h2o", [None, H2O(1.0)])
def test_answers_are_read_on_the_same_caches(tiny, tokens, h2o):
    """Every answer's likelihood is that of a pass of its own; H2O that keeps everything, token by token, changes nothing."""
    prompt, answers = tokens[:1, :48], [Answer([3, 4, 5], 0, 1), Answer([7], 0, 1), Answer([9, 8, 7, 6], 2, 1)]
    found, seconds = evaluation.read_answers(tiny, prompt, answers, SCHEDULE, random_scorer(4), h2o)
    assert seconds > 0
    for answer, (value, count, greedy) in zip(answers, found):
        alone = nll(tiny, torch.cat((prompt, torch.tensor([answer.tokens])), 1), 48, SCHEDULE, random_scorer(4))[0, answer.start:]
        assert value == pytest.approx(-alone.sum().item(), abs=1e-4) and count == len(alone) and not greedy


def test_greedy_answer_is_recognised(tiny, tokens):
    said = evaluation.generate(tiny, tokens[:1], 3).tokens
    assert evaluation.read_answers(tiny, tokens[:1], [Answer(said, 0, 1)])[0][0][2]


def test_compression_keeps_the_mean_count_and_the_protected(tiny, tokens):
    scorer = evaluation.make_scorer("earliest", tiny, SCHEDULE)
    short = evaluation.compress(tiny, tokens[:1], SCHEDULE, scorer)
    k = round(sum(SCHEDULE.counts(60, 6)) / 6)
    assert short.tolist() == torch.cat((tokens[:1, :k - 6], tokens[:1, -6:]), 1).tolist()


def test_words_f1_and_rouge():
    assert tasks.f1("The Globe, in London!", "globe in london") == 1.0
    assert tasks.f1("paris", "london") == 0.0 and tasks.f1("", "x") == 0.0
    assert tasks.f1("red red car", "red bus") == pytest.approx(2 / 5)
    assert tasks.rouge_l("one two three four", "one three five four") == pytest.approx(6 / 8)  # one three four


def test_arms():
    assert evaluation.parse_arm("predictor@5+h2o", 9, 0.4) == ("predictor", 5, H2O(0.4, 0.5))
    assert evaluation.parse_arm("oracle:norm_g", 9, 0.4) == ("oracle:norm_g", 9, None)
    assert evaluation.parse_arm("full+local", 9, 0.2) == ("full", 9, H2O(0.2, 0.0))
    for bad in ("nonsense", "oracle:none", "full+", "random@x", "compress@0"):
        with pytest.raises(ValueError, match="unknown scorer"):
            evaluation.parse_arm(bad, 9, 0.4)


def test_ratio_estimator():
    assert evaluation.ratio([2.0, 6.0], [1, 3]) == (2.0, 0.0)
    assert evaluation.ratio([1.0, 3.0], [1, 1]) == (2.0, 1.0)
    p = [1.0] * 30 + [0.0] * 20
    assert evaluation.ratio(p, [1.0] * 50) == pytest.approx((0.6, math.sqrt(0.24 / 49)))        # the usual error of a share


def fake(sums):
    return {arm: {"answers": [[-a, 4, False], [-b, 4, False]], "keep": 0.5} for arm, (a, b) in sums.items()}


def test_tables(capsys):
    items = [Item([1], [Answer([1], 0, 1), Answer([1], 0, 4)], 0)] * 2
    done = [fake({"full": (1, 2), "random": (3, 2)}), fake({"full": (3, 2), "random": (1, 2)})]
    rows = {(r["scorer"], r["metric"]): r for r in evaluation.table(done, ["full", "random"], "piqa", items, False)}
    assert rows["full", "acc"]["value"] == 0.5 and rows["full", "acc_norm"]["value"] == 0.0     # per byte the second choice is likelier
    assert rows["random", "acc"]["vs_full"] == 0.0 and rows["random", "acc"]["vs_full_stderr"] == 1.0
    done = [fake({"full": (4, 0), "recent": (6, 0), "random": (8, 0)})] * 3
    rows = {r["scorer"]: r for r in evaluation.table(done, ["full", "recent", "random"], "nll", items, False)}
    assert rows["full"]["value"] == 1.0 and rows["recent"]["share_of_gap"] == 0.5 and rows["recent"]["share_stderr"] == 0.0
    assert rows["recent"]["vs_full"] == 0.5 and "share_of_gap" in capsys.readouterr().out.replace(" ", "_")


def test_a_killed_run_goes_on_and_measures_no_row_twice(tiny, tmp_path, monkeypatch):
    items = [Item(list(range(20 + i)), [Answer([5, 6], 0, 1)], 0) for i in range(4)]
    log, arms = tmp_path / "rows.jsonl", ["full", "random"]
    whole = evaluation.measure_rows(tiny, items, tmp_path / "whole.jsonl", "settings", arms, SCHEDULE, None, 0.0)
    evaluation.measure_rows(tiny, items[:2], log, "settings", arms, SCHEDULE, None, 0.0)
    with log.open("a") as f:
        f.write('{"full": {"answers": [[-1')                         # a kill in the middle of a line
    measured = []
    monkeypatch.setattr(evaluation, "measure", lambda *a, real=evaluation.measure, **k: measured.append(a[-1]) or real(*a, **k))
    again = evaluation.measure_rows(tiny, items, log, "settings", arms, SCHEDULE, None, 0.0)
    assert measured == [2, 2, 3]                                     # the first is the warm-up
    assert [[r[a]["answers"] for a in arms] for r in again] == [[r[a]["answers"] for a in arms] for r in whole]
    assert len(log.read_text().splitlines()) == 5
    with pytest.raises(ValueError, match="belong to another command"):
        evaluation.measure_rows(tiny, items, log, "other settings", arms, SCHEDULE, None, 0.0)


def test_text_windows(tokenizer, tmp_path):
    path = jsonl(tmp_path / "t.jsonl", [{"text": "The fog moved behind the green mirrors."}] * 20)
    items = tasks.text_items(tokenizer, path, 30, 10, 3)
    ids, begin = sum((tokenizer.encode("The fog moved behind the green mirrors.\n", bos=False) for _ in range(20)), []), tokenizer.encode("")
    assert len(begin) == 1 and [item.prompt + item.answers[0].tokens for item in items] == [begin + ids[i:i + 39] for i in (0, 39, 78)]
    with pytest.raises(ValueError, match="one window needs 3999"):
        tasks.text_items(tokenizer, path, 3000, 1000, 3)


def test_long_contexts_lose_their_middle(tokenizer, tmp_path):
    context = " ".join(f"Clara sells cups. Peter sells hats. The fog moved {w}." for w in ("behind", "near") * 20)
    path = jsonl(tmp_path / "l.jsonl", [{"input": "What does Clara sell?", "context": context, "answers": ["cups", "hats"]}])
    args = evaluation.argparse.Namespace(max_prompt=100, min_prompt=1, max_response=8, question="last", limit=5)
    item, = tasks.long_items(tokenizer, path, args, "plain")
    text = tokenizer.decode(item.prompt)
    assert len(item.prompt) <= 100 and text.endswith("what does Clara sell?".replace("what", "What")) and item.texts == ("cups", "hats")
    assert tokenizer.decode(item.answers[0].tokens).strip() == "cups"
    with pytest.raises(ValueError, match="row 1: expected text"):
        tasks.long_items(tokenizer, jsonl(tmp_path / "m.jsonl", [{"input": "q", "context": "c", "answers": []}]), args, "plain")


def test_every_arm_on_the_toy(tokenizer):
    from infer import load_pruning
    none = dict.fromkeys(("tp", "predictors", "device", "dtype", "first", "step", "stages", "keep", "sink", "local"))
    model, schedule, predictors, _ = load_pruning(evaluation.argparse.Namespace(ckpt="toy", **none))
    row = json.loads((ROOT / "checkpoints" / "toy" / "train.jsonl").read_text().splitlines()[-1])
    example = tasks.encode_row(tokenizer, row)
    item = Item(example.tokens[:example.prompt_len].tolist(), [Answer(example.tokens[example.prompt_len:].tolist(), 0, 1)], 0, (row["response"],))
    arms = ["full", "full+h2o", "full+local", "predictor", "prior", "predictor@3", "predictor+h2o", "compress", "random", "oracle:norm_gx"]
    found = evaluation.measure(model, item, arms, schedule, predictors, 0.5, 0, new=12, tokenizer=tokenizer)
    assert found["full"]["score"] == found["predictor"]["score"] == 1.0 and found["full"]["answers"][0][2]
    assert found["full"]["keep"] == 1.0 and found["predictor"]["keep"] < found["predictor@3"]["keep"] < 1.0
    assert found["compress"]["keep"] == pytest.approx(found["predictor"]["keep"], abs=0.01)
    assert all(f["prefill_s"] > 0 and f["e2e_s"] > f["prefill_s"] for f in found.values())
    assert flops(model.config, [1] * 12) > 0 and prefill(model, torch.tensor([item.prompt]))[1][0].n == len(item.prompt)


def test_study_trains_measures_and_goes_on(tmp_path):
    from test_infer import command
    words = ("study.py", "--table", "targets", "--rows", 4, "--limit", 2, "--epochs", 1, "--work", tmp_path, "--json")
    code, out, err = command(*words)
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [r["scorer"] for r in rows][:2] == ["full", "random"] and len(rows) == 7 and all(r["n"] == 2 for r in rows)
    kept = sorted(p.stat().st_mtime_ns for p in tmp_path.glob("nll-*"))
    code, out, err = command(*words)
    assert code == 0 and json.loads(out.splitlines()[-1])["rows"] == rows, err
    assert sorted(p.stat().st_mtime_ns for p in tmp_path.glob("nll-*")) == kept and len(kept) == 7


def test_every_scorer_is_read_at_every_keep_ratio(tiny, tokens, tmp_path):
    args = argparse.Namespace(work=tmp_path, backbone="tiny")
    predictors = torch.nn.ModuleList(torch.nn.Linear(48, 2) for _ in range(4)).requires_grad_(False)
    rows = [Example(t, 50) for t in tokens]
    found = study.tradeoff(tiny, rows, SCHEDULE, predictors, 0.3, args)
    assert [r["keep"] for r in found[::9]] == [0.95, 0.92, 0.8, 0.85, 0.8] and {r["scorer"] for r in found} == {"full", *SCORERS}
    one = next(r for r in found if (r["scorer"], r["keep"]) == ("norm", 0.85))
    schedule = Schedule(1, 1, 4, 0.85)
    assert one["value"] == pytest.approx(sum(nll(tiny, e.tokens[None], 50, schedule, norm_scorer()).sum().item() for e in rows) / 20)
    assert one["mean_keep"] == pytest.approx(sum(schedule.counts(50, 6)) / 300)


def test_eval_command_goes_on_with_a_larger_limit(tmp_path):
    from test_infer import command
    words = ("eval.py", "--scorers", "full", "random", "--rows-file", tmp_path / "rows.jsonl", "--json")
    for limit in (1, 3):
        code, out, err = command(*words, "--limit", limit)
        assert code == 0 and json.loads(out.splitlines()[-1])["rows"][0]["n"] == limit, err
    assert "1 rows are in" in out and len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4
