"""lab/ablations.py: variants of the training side by side, what is kept, what the tables say."""
import json
from dataclasses import replace

import pytest

from conftest import SCHEDULE, close, command, frozen_predictors, needs, random_rows, tiny_model
from lab import ablations
from lab.ablations import BEST, TABLES, Study, compare
from lab.scorers import SCORERS, lookahead, make_scorer
from prune import Schedule, nll
from support.rows import digest

MODEL = tiny_model()
ROWS = random_rows(2)               # held out: prompts of 30 tokens, responses of 10
ARMS = {"norm": ("norm",), "recent": ("recent",)}


@pytest.fixture
def study(tmp_path):
    return Study(MODEL, tmp_path, epochs=1, quiet=True)


def watch(monkeypatch, name):
    """-> a list that grows with every call of a function of lab/ablations.py."""
    calls, real = [], getattr(ablations, name)

    def watched(*args):
        calls.append(args)
        return real(*args)
    monkeypatch.setattr(ablations, name, watched)
    return calls


def nll_sum(schedule, name, predictors=None):
    """Of both ROWS' responses, per token, by prune.nll alone."""
    total = sum(nll(MODEL, example.tokens[None], 30, schedule,
                    make_scorer(name, MODEL, schedule, predictors, number)).sum().item()
                for number, example in enumerate(ROWS))
    return total / 20


# --------------------------------------------------------------- what is trained, measured and kept


def test_every_variant_trains_other_predictors(study):
    recipes = {recipe for table in TABLES.values() for recipe in table.values()}
    trained = [study.train(random_rows(4), SCHEDULE, recipe) for recipe in recipes]
    assert len({digest(predictors) for predictors in trained}) == len(recipes) == 18


def test_variants_share_their_marking_and_are_trained_once(tmp_path, monkeypatch):
    made = watch(monkeypatch, "marking")
    rows, equal = random_rows(4), replace(BEST, pairs="equal")

    def train(folder, *recipes):
        study = Study(MODEL, tmp_path / folder, 1, True)
        return [digest(study.train(rows, SCHEDULE, recipe)) for recipe in recipes], len(made)
    (_, shared), after = train("shared", BEST, equal)
    assert after == 4
    assert train("alone", equal) == ([shared], 8)
    assert train("shared", equal) == ([shared], 8)
    assert train("shared", replace(equal, reduce="norm_g"))[1] == 12


@pytest.mark.parametrize("teacher", ["attention", "product"])
def test_another_teacher_is_the_attention_that_the_answer_gives(study, teacher):
    row, gradient = ROWS[0], study.markers["gradient"](MODEL, ROWS[0], SCHEDULE, BEST)
    given = lookahead(MODEL, row.tokens[None, :30], row.tokens[None, 30:])[0]
    found = study.markers[teacher](MODEL, row, SCHEDULE, BEST)
    assert found.states is gradient.states and len(found.saliency) == 4
    for one, s in zip(found.saliency, gradient.saliency):
        assert close(one, given * (s if teacher == "product" else 1), 1e-6)


def test_what_is_measured_is_kept_under_all_it_depends_on(study, tmp_path, monkeypatch):
    made = watch(monkeypatch, "measure_arm")
    usual = 0, ROWS[0], SCHEDULE, "predictor", frozen_predictors()
    assert study.measure(*usual) == study.measure(*usual)
    assert len(made) == 1
    for place, value in enumerate((1, ROWS[1], Schedule(1, 1, 4, 0.7), "neighbours",
                                   frozen_predictors(seed=4))):
        study.measure(*usual[:place], value, *usual[place + 1:])
        assert len(made) == place + 2
    other = tiny_model()
    other.blocks[-1].down.weight.data[0, 0] += 1
    for model in (other, tiny_model().bfloat16()):
        Study(model, tmp_path).measure(*usual)
    assert len(made) == 8


# -------------------------------------------------------------------------------------- the tables


def test_rows_of_a_table_are_paired(study):
    table = compare(study, ROWS, SCHEDULE, ARMS, "some")
    full, random, norm, recent = table
    assert [row["scorer"] for row in table] == ["full", "random", "norm", "recent"]
    assert {(row["group"], row["metric"], row["n"], row["keep"]) for row in table} == {
        ("some", "nll", 2, 0.8)}
    assert full["value"] == pytest.approx(nll_sum(Schedule(stages=0), "norm"))
    assert norm["vs_first"] == norm["vs_first_stderr"] == 0.0
    assert recent["vs_first"] == pytest.approx(recent["share_of_gap"] - norm["share_of_gap"])
    assert recent["vs_first_stderr"] > 0 and "vs_first" not in random


def test_every_scorer_is_read_at_every_keep_ratio(study):
    predictors = frozen_predictors()
    found = ablations.tradeoff(study, ROWS, SCHEDULE, predictors)
    assert [row["keep"] for row in found[::len(SCORERS) + 1]] == [0.95, 0.92, 0.85, 0.8]
    assert {row["scorer"] for row in found} == {"full", *SCORERS}
    schedule = Schedule(1, 1, 4, 0.85)
    for row in found:
        if row["keep"] == 0.85 and row["scorer"] != "full":
            assert row["value"] == pytest.approx(nll_sum(schedule, row["scorer"], predictors))


@needs("matplotlib")
def test_figures_place_one_stage_after_every_block(study, monkeypatch):
    found = ablations.figures(study, random_rows(4), ROWS)
    *fourth, fifth = found
    assert [row["scorer"] for row in fourth] == [
        f"stage after block {b}, keep {keep}" for keep in (0.9, 0.8, 0.7) for b in range(1, 6)]
    for block, row in enumerate(fourth[:5], start=1):
        counts = Schedule(block, 1, 1, 0.9).counts(30, 6)
        assert row["mean_keep"] == pytest.approx(sum(counts) / 180)
    assert (fifth["scorer"], fifth["value"]) == ("1 stages", fourth[3]["value"])    # after block 4
    drawn = {}
    monkeypatch.setattr(ablations.show, "save", lambda figure, path: drawn.update({path: [
        line.lines[0].get_ydata().tolist() for line in figure.axes[0].containers]}))
    ablations.draw(found, "some")
    costs = [row["vs_full"] for row in found]
    assert drawn == {"some_figure4.png": [costs[:5], costs[5:10], costs[10:15]],
                     "some_figure5.png": [costs[15:]]}


# ------------------------------------------------------------------------------------- the command


@pytest.mark.beside
def test_the_command_goes_on_where_it_was(tmp_path):
    words = ("-m", "lab.ablations", "--table", "seeds", "--seeds", 0, 1, "--rows", 4, "--limit", 2,
             "--epochs", 1, "--stages", 2, "--work", tmp_path, "--json", "--quiet")
    code, out, err = command(*words)
    assert code == 0, err
    found = json.loads(out)
    rows, names = found["rows"], ["full", "random", *TABLES["seeds"]]
    assert [(row["group"], row["scorer"]) for row in rows] == [
        (group, name) for group in ("seed 0", "seed 1") for name in names]
    assert rows[1]["value"] == rows[4]["value"] and rows[2]["value"] != rows[5]["value"]
    assert (found["training_rows"], found["schedule"]["stages"]) == (4, 2)
    code, out, err = command(*words)
    assert code == 0 and json.loads(out) == found
    assert "8 results are in" in err and err.count("1 steps are done") == 2


@pytest.mark.parametrize("words, message", [
    (("--table", "figures", "--seeds", 1), "--seeds does nothing with --table figures"),
    (("--predictors", "x"), "--predictors does nothing with --table losses"),
    (("--table", "tradeoff", "--predictors", "none.safetensors"), "none.safetensors: no such file"),
    (("--ckpt", "random:llama-7b"), "random weights are for timings"),
])
def test_bad_input_ends_in_one_line(leaves, words, message):
    assert message in leaves("lab/ablations.py", *words)
