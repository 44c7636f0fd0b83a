"""train.py: what each loss reaches, the masks, resuming after any stop, what must not go on.

State files that are damaged or of another run: tests/test_runs.py.
"""
import math
import os
import signal

import pytest
import torch

import train as T
from conftest import SCHEDULE, close, fresh_predictors, random_rows, tiny_model
from predictor import score
from prune import Schedule, load_predictors, protected
from support.files import load_tensors
from support.rows import Example, row_at
from train import Recipe, competing_marked, fit, marking, masked_pass, pruning, rate, train

TERMS = ("cls", "mse", "rank", "distill")
FREE = ~protected(torch.arange(48)[None], 48, SCHEDULE)[0]      # of a prompt of 48, 39 tokens


def both_passes(model, predictors, example, recipe):
    """Marking and pruning of an Example -> loss, numbers."""
    marks = marking(model, example, SCHEDULE, recipe)
    return pruning(model, predictors, example, marks, SCHEDULE, recipe)


@pytest.fixture
def example(tokens):
    return Example(tokens[0], 48)


# ------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("only", TERMS)
@pytest.mark.parametrize("mask", ["gumbel", "topk"])
def test_each_loss_alone_reaches_every_stage_and_never_the_backbone(tiny, example, only, mask):
    predictors = fresh_predictors()
    recipe = Recipe(**{name: float(name == only) for name in TERMS}, mask=mask)
    loss, numbers = both_passes(tiny, predictors, example, recipe)
    kept = numbers.pop("kept")
    assert numbers == {only: loss.item(), "loss": loss.item()}
    loss.backward()
    for name, w in predictors.named_parameters():
        assert w.grad.isfinite().all(), name
        # A constant added to all scores changes no ranking, so the ranking loss leaves the last
        # bias alone but for rounding.
        assert (w.grad != 0).any() or only == "rank" and name.endswith("down.bias"), name
    assert all(p.grad is None for p in tiny.parameters())
    assert kept == pytest.approx(SCHEDULE.kept(48, 4) / 48) if mask == "topk" else 0 < kept < 1


@pytest.mark.parametrize("states", ["pruned", "marked"])
def test_the_loss_is_the_weighted_sum_of_its_terms(tiny, example, states):
    weights = (0.5, 2.0, 3.0, 0.25)
    recipe = Recipe(*weights, pairs="saliency", states=states)
    loss, numbers = both_passes(tiny, fresh_predictors(), example, recipe)
    total = sum(weight * numbers[name] for weight, name in zip(weights, TERMS))
    assert loss.item() == pytest.approx(total, rel=1e-6)
    assert numbers["kept"] == pytest.approx(SCHEDULE.kept(48, 4) / 48)


@pytest.mark.parametrize("near", [False, True])
def test_marked_states_need_no_masked_pass(tiny, example, near, monkeypatch):
    monkeypatch.setattr(T, "masked_pass", None)
    predictors = fresh_predictors(near=near)
    recipe = Recipe(cls=0.0, states="marked", near=near)
    loss, numbers = both_passes(tiny, predictors, example, recipe)
    assert numbers.keys() == {"mse", "rank", "loss", "kept"}
    loss.backward()
    assert all((p.grad != 0).any() for p in predictors.parameters())


def test_near_predictors_read_only_the_survivors_that_a_stage_will_find(tiny, example):
    """On marked states these are the most salient."""
    predictors, marks = fresh_predictors(near=True), marking(tiny, example, SCHEDULE, Recipe())
    found = competing_marked(predictors, marks, FREE, SCHEDULE)
    for s, (scores, saliency) in enumerate(found):
        ours = marks.saliency[s].masked_fill(~FREE, math.inf)
        index = ours.topk(SCHEDULE.kept(48, s)).indices.sort().values
        alone = score(predictors[s](marks.states[s][:, index], index[None]))
        assert close(scores, alone[0, FREE[index]], 1e-6)
        assert torch.equal(saliency, marks.saliency[s][index[FREE[index]]])


# ------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("mask", ["gumbel", "topk"])
def test_masks_are_hard_cumulative_and_spare_the_protected(tiny, example, mask):
    """And a token that was dropped before gets no gradient, and trains no stage."""
    marks = marking(tiny, example, SCHEDULE, Recipe())
    _, pis, masks = masked_pass(tiny, fresh_predictors(), example, SCHEDULE, mask)
    droppable = torch.cat((FREE, torch.zeros(12, dtype=torch.bool)))
    trained = T.competing_pruned(pis, masks, marks, FREE)
    for pi, before, after, (scores, saliency) in zip(pis, masks, masks[1:], trained):
        assert set(after.unique().tolist()) == {0.0, 1.0}
        assert (after <= before).all() and (after[:, ~droppable] == 1).all()
        gradient, = torch.autograd.grad(after.sum(), pi, retain_graph=True)
        competing = droppable & (before[0] == 1)
        assert torch.equal(gradient.abs().sum(-1)[0] > 0, competing)
        assert torch.equal(scores, score(pi)[0, competing]) and len(saliency) == len(scores)
    if mask == "topk":
        assert [int(m[0, :48].sum()) for m in masks] == SCHEDULE.counts(48, 6)[:5]


# --------------------------------------------------------------------------------------- the steps


def short_run(folder, steps=8, schedule=SCHEDULE, resume=False, save_every=120, stop=(),
              report=None, **fields):
    """Train for a few steps of two rows -> a finished Run."""
    recipe = Recipe(steps=steps, accum=2, **fields)
    return fit(tiny_model(), random_rows(6), schedule, recipe, folder / "predictors.safetensors",
               save_every=save_every, resume=resume, stop=stop, report=report, report_every=2)


def prepared(recipe):
    """-> model, predictors, optimizer, rows."""
    predictors = fresh_predictors()
    optimizer = torch.optim.AdamW(predictors.parameters(), lr=recipe.lr)
    return tiny_model(), predictors, optimizer, random_rows(6), SCHEDULE, recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The Run of eight unbroken steps."""
    return short_run(tmp_path_factory.mktemp("whole"))


def same(run, whole):
    """Whether a run ended bit for bit as the unbroken one: log, predictors and optimiser."""
    files = [(load_tensors(a)[0], load_tensors(b)[0])
             for a, b in ((run.out, whole.out), (run.state, whole.state))]
    return run.log == whole.log and all(a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
                                        for a, b in files)


def test_training_lowers_the_ranking_loss_and_writes_loadable_predictors(tmp_path, tiny):
    run = short_run(tmp_path, 60, cls=0.0, mse=0.0, states="marked", lr=3e-3)
    losses = [entry["loss"] for entry in run.log]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    predictors, metadata = load_predictors(run.out, tiny, SCHEDULE)
    assert len(predictors) == 4
    assert metadata["reduce"] == "norm_gx" and metadata["steps"] == "60"


def test_a_step_is_the_mean_of_its_rows():
    """Losses, tokens and the gradient, which is clipped to length 1."""
    model, predictors, optimizer, rows, _, recipe = given = prepared(Recipe(steps=1, accum=3))
    numbers, loss = [], 0
    for number in range(3):
        example = rows[row_at(number, 6, 0)]
        each, told = both_passes(model, predictors, example, recipe)
        loss = loss + each / 3
        numbers.append(told)
    want = torch.autograd.grad(loss, list(predictors.parameters()))
    length = sum(g.square().sum() for g in want).sqrt().clamp(min=1)
    step, = train(*given)
    assert step.number == 1 and step.tokens == 3 * 40
    for name, value in step.losses.items():
        assert value == pytest.approx(sum(told[name] for told in numbers) / 3, rel=1e-5)
    assert step.losses["kept"] == pytest.approx(SCHEDULE.kept(30, 4) / 30)
    assert all(close(p.grad, g / length, 1e-5) for p, g in zip(predictors.parameters(), want))


def test_stages_past_the_last_block_get_no_predictors_and_reports_come(tmp_path):
    run = short_run(tmp_path, 5, Schedule(4, 1, 9, 0.8), report=lambda p: {"stages": len(p)})
    assert run.schedule == Schedule(4, 1, 2, 0.8)
    reports = {entry["step"]: entry["heldout"] for entry in run.log if "heldout" in entry}
    assert reports == dict.fromkeys((2, 4, 5), {"stages": 2})
    with pytest.raises(ValueError, match="no stage of .* stands before the last"):
        short_run(tmp_path, 1, Schedule(6, 1, 1, 0.8))


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.3, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 3, 25, 100])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth(steps, warmup):
    values = [rate(step, steps, warmup) for step in range(steps)]
    rising = round(warmup * steps)
    up, down = values[:rising], values[rising:]
    assert max(values) == 1.0                       # never above the peak, which is reached
    assert up == pytest.approx([(i + 1) / rising for i in range(rising)])
    assert down == pytest.approx([0.55 + 0.45 * math.cos(math.pi * i / len(down))
                                  for i in range(len(down))])


# ------------------------------------------------------------------------------------------ resume


class Killed(Exception):
    pass


MOMENTS = {"in a step": (T, "losses", 11), "in a save": (os, "replace", 11),
           "between two files": (os, "replace", 12)}


@pytest.mark.parametrize("moment, mask", [("in a step", "gumbel"),
                                          *((moment, "topk") for moment in MOMENTS)])
def test_resume_after_a_kill_equals_the_unbroken_run(whole, tmp_path, monkeypatch, moment, mask):
    """Killed in step 6, or while its predictors or its state are written."""
    whole = whole if mask == "topk" else short_run(tmp_path / "whole", mask=mask)
    module, name, call = MOMENTS[moment]
    original, calls = getattr(module, name), []

    def dies(*args):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(*args)

    monkeypatch.setattr(module, name, dies)
    with pytest.raises(Killed):
        short_run(tmp_path, save_every=-1, mask=mask)
    resumed = short_run(tmp_path, resume=True, mask=mask)
    assert resumed.done == 5 and same(resumed, whole)


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt, match="stopped and saved after step 1 of 8"):
        short_run(tmp_path, stop=[signal.SIGTERM])
    resumed = short_run(tmp_path, resume=True)
    assert resumed.done == 1 and same(resumed, whole)


# ------------------------------------------------------------------------------ what must not go on


@pytest.mark.parametrize("name", ["reduce_saliency", "topk_mask"])
def test_nan_stops_with_step_and_stage_and_no_file_changes(tmp_path, monkeypatch, name):
    """In a gradient of the marking pass, or in a prediction of the pruning pass."""
    run = short_run(tmp_path, 2)
    saved, original, seen = run.out.read_bytes(), getattr(T, name), []

    def damaged(x, *given):
        seen.append(1)                              # of four stages a row
        x.data.mul_(math.nan if len(seen) == 11 else 1)
        return original(x, *given)

    monkeypatch.setattr(T, name, damaged)
    with pytest.raises(ValueError, match="^step 2: .*stage 3: a score or saliency is not finite"):
        short_run(tmp_path, 4)
    assert run.out.read_bytes() == saved


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_predictors(monkeypatch):
    # 0, and its gradient is 0 times infinity
    monkeypatch.setattr(T, "ranking_loss", lambda scores, *_: (0 * scores).sqrt().sum())
    given = prepared(Recipe())
    before = [p.clone() for p in given[1].parameters()]
    with pytest.raises(ValueError, match="^step 1: .*the gradient is not finite"):
        next(train(*given))
    assert all(map(torch.equal, given[1].parameters(), before))


@pytest.mark.parametrize("words, message", [
    (("--lr", "nan"), "--lr and --tau are positive"),
    (("--rank", -1), "weights of losses are not negative"),
    (("--near",), "near predictors read the marked states alone"),
    (("--steps", 3, "--epochs", 2), "--steps and --epochs each say how long to train"),
])
def test_bad_input_ends_in_one_line(words, message, leaves, tmp_path):
    assert message in leaves("train.py", *words, "--out", tmp_path)


def test_a_saliency_is_blended_with_those_around_it(tiny, example):
    """Half of it is the mean of the 65 tokens around that may be dropped; the others stay."""
    recipe = Recipe(around=0.5)
    plain = marking(tiny, example, SCHEDULE, recipe).saliency
    mixed = T.blending(marking, window=7)(tiny, example, SCHEDULE, recipe).saliency
    free = FREE.nonzero()[:, 0].tolist()
    for before, after in zip(plain, mixed):
        want = before.clone()
        for i in free:
            near = [j for j in free if abs(i - j) <= 3]
            want[i] = (before[i] + before[near].mean()) / 2
        assert torch.allclose(after, want, rtol=1e-5, atol=0)
