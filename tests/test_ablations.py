"""Variants of the training side by side: what is shared, what is kept, and what the tables say."""
import json
from dataclasses import asdict, replace

import pytest
import torch

from conftest import SCHEDULE, command, predictors_for, random_rows
from lab import ablations
from lab.ablations import BEST, VARIANTS, Study, Variant, compare
from lab.schedules import SharedSchedule
from lab.scorers import SCORERS, norm_scorer, recent_scorer
from prune import Schedule, nll
from support.data import Example
from support.parsers import recipe_options, train_parser
from train import Loss, Recipe


@pytest.fixture
def rows(tokens):
    """Two Examples with prompts of 50 tokens and responses of 10."""
    return [Example(row, 50) for row in tokens]


@pytest.fixture
def study(tiny, tmp_path):
    return Study(tiny, tmp_path, epochs=1)


def count_marking(monkeypatch):
    """-> a list that grows with every marking pass that is made."""
    made = []

    def counting(model, batch, schedule, recipe):
        made.append(recipe)
        return real(model, batch, schedule, recipe)
    real = ablations.marking
    monkeypatch.setattr(ablations, "marking", counting)
    return made


# ---------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_told_as_options_of_the_training_command(name):
    recipe = VARIANTS[name]
    words = ablations.as_options(recipe).split()
    args = train_parser("", asdict(Recipe()) | asdict(Loss())).parse_args(words)
    weights, fields = recipe_options(args, 4)
    assert Recipe(weights=Loss(**weights), **fields) == recipe


def test_options_that_are_usual_are_not_told():
    assert ablations.as_options(Recipe()) == ""
    assert ablations.as_options(BEST) == " --cls 0 --mse 0 --pairs saliency --states marked"


def test_tables_name_variants_and_every_variant_is_in_one():
    named = [name for names in ablations.TABLES.values() for name in names]
    assert set(named) == set(VARIANTS)


# --------------------------------------------------------------- what is trained, measured and kept


def test_marks_are_shared_by_variants_that_need_the_same(study, monkeypatch):
    made, markers = count_marking(monkeypatch), {}
    data = random_rows(4)
    study.train(data, SCHEDULE, BEST, markers)
    assert len(made) == 4
    study.train(data, SCHEDULE, replace(BEST, pairs="equal"), markers)
    assert len(made) == 4
    study.train(data, SCHEDULE, replace(BEST, reduce="norm_g"), markers)
    assert len(made) == 8
    study.train(data, SCHEDULE, VARIANTS["with distillation"], markers)
    assert len(made) == 12          # the logits of the unpruned model are kept too
    study.train(data, Schedule(1, 1, 3, 0.8), BEST, markers)
    assert len(made) == 16


def test_sharing_marks_changes_no_predictor(tiny, tmp_path):
    data, second = random_rows(4), VARIANTS["SDTP: cross entropy + MSE + ranking"]
    shared, alone = (Study(tiny, tmp_path / name, epochs=2) for name in ("shared", "alone"))
    markers = {}
    shared.train(data, SCHEDULE, BEST, markers)
    trained = [study.train(data, SCHEDULE, second, markers) for study in (shared, alone)]
    for a, b in zip(*(predictors.parameters() for predictors in trained), strict=True):
        assert torch.equal(a, b) and not a.requires_grad


def test_what_is_trained_is_trained_once(study, monkeypatch):
    made, data = count_marking(monkeypatch), random_rows(4)
    first = study.train(data, SCHEDULE, BEST)
    again = study.train(data, SCHEDULE, BEST)
    assert len(made) == 4
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_measured_is_kept_under_what_it_depends_on(study, rows, tmp_path):
    calls = []

    def scorer(number):
        calls.append(number)
        return norm_scorer()

    def likelihoods(key="norm", schedule=SCHEDULE, data=rows):
        return study.likelihoods(data, Variant(key, scorer), schedule)
    first = likelihoods()
    assert likelihoods() == first and calls == [0, 1]
    for example, value in zip(rows, first, strict=True):
        alone = nll(study.model, example.tokens[None], 50, SCHEDULE, norm_scorer())
        assert value == alone.sum().item()
    shares = SharedSchedule(1, 1, 4, 0.8, shares=(0.9, 0.9, 0.4, 0.4))
    for other in ({"key": "another"}, {"schedule": Schedule(1, 1, 4, 0.7)}, {"schedule": shares},
                  {"data": rows[:1]}, {"key": predictors_for(study.model)}):
        before = len(calls)
        likelihoods(**other)
        assert len(calls) > before, other
    assert len(list(tmp_path.glob("nll-*.safetensors"))) == 6


def test_rows_of_a_table_are_paired(study, rows, capsys):
    variants = {"norm": [Variant("norm", lambda number: norm_scorer())],
                "recent": [Variant("recent", lambda number: recent_scorer())]}
    table = compare(study, rows, SCHEDULE, variants, "some")
    full, random, norm, recent = table
    assert [row["scorer"] for row in table] == ["full", "random", "norm", "recent"]
    assert {row["group"] for row in table} == {"some"}
    assert {row["metric"] for row in table} == {"nll"} and {row["n"] for row in table} == {2}
    assert full["mean_keep"] == 1.0
    counts = SCHEDULE.counts(50, 6)
    assert norm["mean_keep"] == pytest.approx(sum(counts) / 300)
    assert norm["vs_full"] == pytest.approx(norm["value"] - full["value"])
    gap = random["value"] - full["value"]
    assert norm["share_of_gap"] == pytest.approx((random["value"] - norm["value"]) / gap)
    assert norm["vs_first"] == norm["vs_first_stderr"] == 0.0
    assert recent["vs_first"] == pytest.approx(recent["share_of_gap"] - norm["share_of_gap"])
    assert "share_of_gap" not in random and "vs_first" not in random
    lines = capsys.readouterr().out.splitlines()
    assert [text.split("NLL")[0].strip() for text in lines] == [
        "some: full", "some: random", "some: norm", "some: recent"]


def test_trials_of_several_seeds_are_averaged(study, rows):
    data, names = random_rows(4), ("ranking by saliency difference",)
    found = ablations.trained_variants(study, data, rows, SCHEDULE, names, [0, 1])
    alone = [ablations.trained_variants(study, data, rows, SCHEDULE, names, [seed])[2]
             for seed in (0, 1)]
    both = found[2]
    assert alone[0]["value"] != alone[1]["value"]
    assert both["value"] == pytest.approx((alone[0]["value"] + alone[1]["value"]) / 2)
    assert both["trials"] == pytest.approx([row["share_of_gap"] for row in alone])
    assert both["share_of_gap"] == pytest.approx(sum(both["trials"]) / 2)
    assert "trials" not in alone[0]


# -------------------------------------------------------------------------------- figures and open


def test_every_scorer_is_read_at_every_keep_ratio(study, rows):
    predictors = predictors_for(study.model)
    found = ablations.tradeoff(study, rows, SCHEDULE, predictors, 0.3)
    assert [row["keep"] for row in found[::len(SCORERS) + 1]] == [0.95, 0.92, 0.8, 0.85, 0.8]
    assert {row["scorer"] for row in found} == {"full", *SCORERS}
    one = next(row for row in found if (row["scorer"], row["keep"]) == ("norm", 0.85))
    schedule = Schedule(1, 1, 4, 0.85)
    total = sum(nll(study.model, e.tokens[None], 50, schedule, norm_scorer()).sum().item()
                for e in rows)
    assert one["value"] == pytest.approx(total / 20)
    assert one["mean_keep"] == pytest.approx(sum(schedule.counts(50, 6)) / 300)


def test_figures_place_one_stage_after_every_block(study, rows):
    found = ablations.figures(study, random_rows(4), rows)
    assert [row["scorer"] for row in found] == [
        *(f"stage after block {b}, keep {keep}" for keep in (0.9, 0.8, 0.7) for b in range(1, 6)),
        "1 stages"]
    assert [row["group"] for row in found] == ["figure 4"] * 15 + ["figure 5"]
    for block, row in enumerate(found[:5], start=1):
        counts = Schedule(block, 1, 1, 0.9).counts(50, 6)
        assert row["mean_keep"] == pytest.approx(sum(counts) / 300)
    assert found[3]["value"] == found[-1]["value"]      # one stage after block 4


def test_shares_in_proportion_spend_the_budget():
    salient = torch.tensor([0.5, 0.3, 0.4, 0.1])
    shares = ablations.in_proportion(salient, 2.0)
    assert sum(shares) == pytest.approx(2.0) and shares == sorted(shares, reverse=True)
    assert shares[1] == shares[2]                       # never rising
    assert shares[0] / shares[1] == pytest.approx(5 / 3)
    assert ablations.in_proportion(salient, 3.5)[0] == 1.0
    assert min(ablations.in_proportion(torch.tensor([0.5, 0.0]), 0.5)) == pytest.approx(0.02)


def test_shares_on_a_line_have_the_same_mean():
    shares = ablations.falling_line(4, 2.0)
    assert sum(shares) == pytest.approx(2.0)
    steps = [a - b for a, b in zip([1.0, *shares], shares)]
    assert steps == pytest.approx([0.2] * 4)


def test_a_budget_is_divided_in_three_ways(study, rows):
    predictors = predictors_for(study.model)
    found = ablations.allocations(study, random_rows(3), rows, SCHEDULE, predictors)
    names = [row["scorer"] for row in found if row["scorer"] not in ("full", "random")]
    assert names == ["geometric, predictors", "geometric, oracle",
                     "from Figure 2, predictors", "from Figure 2, oracle",
                     "linear, predictors", "linear, oracle"]
    assert found[2]["shares"] == [0.8, 0.64, 0.512, 0.41]
    budgets = [sum(row["shares"]) for row in found]
    assert budgets == pytest.approx([sum(found[0]["shares"])] * 12, abs=0.003)


# ------------------------------------------------------------------------------------- the command


def run(*words):
    """The rows of the command's table."""
    code, out, err = command("-m", "lab.ablations", *words, "--json")
    assert code == 0, err
    return json.loads(out)["rows"]


@pytest.mark.beside
def test_a_table_is_trained_measured_and_kept(tmp_path):
    words = ("--table", "targets", "--rows", 4, "--limit", 2, "--epochs", 1, "--work", tmp_path)
    rows = run(*words)
    names = ["full", "random", *ablations.TABLES["targets"]]
    assert [row["scorer"] for row in rows] == names and all(row["n"] == 2 for row in rows)

    def times():
        return sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors"))
    kept = times()
    assert len(list(tmp_path.glob("nll-*"))) == 7
    assert run(*words) == rows and times() == kept


def test_open_questions_on_the_toy(tmp_path):
    text = tmp_path / "text.jsonl"
    row = {"text": "The fog moved behind the green mirrors. Clara sells cups. " * 30}
    text.write_text((json.dumps(row) + "\n") * 6)
    rows = run("--table", "open", "--rows", 4, "--limit", 1, "--epochs", 1, "--stages", 2,
               "--text", text, "--work", tmp_path / "work")
    groups = [row["group"] for row in rows]
    assert list(dict.fromkeys(groups)) == ["keep ratio", "allocation", "question", "training data"]
    assert [groups.count(group) for group in dict.fromkeys(groups)] == [20, 12, 12, 8]


@pytest.mark.parametrize("words, message", [
    (("--table", "targets", "--text", "x"), "does nothing with --text: it is for open"),
    (("--table", "open", "--png", "x"), "does nothing with --png: it is for figures"),
    (("--table", "figures", "--seeds", 1), "does nothing with --seeds: it is for losses, seeds, "),
    (("--predictors", "x"), "trains its own predictors: leave out --predictors"),
    (("--table", "tradeoff", "--predictors", "none.safetensors"), "no such file"),
    (("--ckpt", "random:llama-1"), "random weights are for timings"),
])
def test_bad_input_ends_in_one_line(leaves, words, message):
    ended = leaves("lab/ablations.py", *words)
    assert isinstance(ended, str) and message in ended
    assert len(ended.splitlines()) == 1 and ended.startswith("ablations.py: ")
