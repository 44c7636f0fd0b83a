"""prune.py: schedule, selection, drop, mask = drop, FLOPs, saved predictors.

Decode on ragged caches against a full recompute: tests/test_independent.py. Damaged files of
predictors: tests/test_runs.py.
"""
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from conftest import (ROOT, SCHEDULE, close, command, fresh_predictors, frozen_predictors,
                      tiny_model)
from model import Config
from predictor import NearPredictor, score
from prune import (UNPRUNED, Schedule, extend, flops, kv_bytes, load_predictors, nll,
                   predictor_scorer, prefill, select)
from support.config import SHAPES, read_config
from support.rows import Example
from support.runs import save_predictors
from test_exercises import spec_flops, spec_select
from test_published import config_of
from train import masked_pass

# ---------------------------------------------------------------------------------------- schedule


def test_paper_schedule_drops_65_percent():
    """Each block's count, of this and of other schedules: tests/test_exercises.py."""
    schedule = Schedule()
    assert schedule.after(32) == [4, 7, 10, 13, 16, 19, 22, 25, 28, 31]
    assert schedule.counts(1000, 32)[-1] == 349 == round(1000 * schedule.share(10))


def test_scaled_schedule_is_the_papers_at_32_blocks():
    assert Schedule.scaled(32) == Schedule()
    assert Schedule.scaled(30) == Schedule(4, 3, 9, 0.89)
    for blocks in (4, 12, 16, 24, 48, 80):
        schedule = Schedule.scaled(blocks)
        assert 0.3 < schedule.share(len(schedule.after(blocks))) < 0.4


@pytest.mark.parametrize("name, value", [
    ("first", 0), ("step", 0), ("stages", -1), ("keep", 0), ("keep", 1.1), ("local", 2),
    ("sink", -1)])
def test_bad_schedule(name, value):
    with pytest.raises(ValueError):
        Schedule(**{name: value})


# --------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize("bad, kept", [(math.nan, [7, 8]), (-math.inf, [7, 8]), (math.inf, [4, 5])])
def test_a_score_that_is_not_finite_never_pushes_out_a_protected_token(bad, kept):
    scores = torch.tensor([[0.0] * 4 + [bad] * 3 + [-1e30] * 3 + [0.0] * 2])
    found = select(scores, torch.arange(12)[None], 8, 12, Schedule()).tolist()
    assert found == [0, 1, 2, 3, *kept, 10, 11]


# --------------------------------------------------------------------------------------- exactness


def held(caches):
    """What caches hold: keys, values and positions of all blocks."""
    return [t[..., :c.n, :] for c in caches for t in (c.k, c.v, c.pos[..., None])]


@pytest.mark.parametrize("schedule, asked", [(Schedule(1, 1, 4, 1.0), True), (UNPRUNED, False)])
@pytest.mark.parametrize("window", [None, 17])
def test_keep_everything_is_the_unpruned_model_bit_for_bit(tokens, schedule, asked, window):
    """Prefill, caches, decode and likelihood; UNPRUNED asks no scorer."""
    model = tiny_model(window=window)
    arm = (schedule, predictor_scorer(frozen_predictors()) if asked else pytest.fail)
    logits, caches, trace = prefill(model, tokens[:, :48], *arm, room=12)
    full, full_caches, _ = prefill(model, tokens[:, :48], room=12)
    assert len(trace) == schedule.stages
    assert torch.equal(logits, full)
    more = [extend(model, tokens[:, 48:], 48, each) for each in (caches, full_caches)]
    assert torch.equal(*more)
    assert all(map(torch.equal, held(caches), held(full_caches)))
    assert torch.equal(nll(model, tokens, 48, *arm), nll(model, tokens, 48))
    whole = model(tokens)[:, 47:]
    assert close(torch.cat((full[:, None], more[1]), 1), whole, 1e-4)


@pytest.mark.parametrize("seed", range(25))
def test_prefill_does_what_counts_say_and_keeps_the_top_scored(tiny, tokens, seed):
    draw, asked = random.Random(seed), []
    schedule = Schedule(draw.randint(1, 6), draw.randint(1, 3), draw.randint(0, 6),
                        draw.uniform(0.2, 1.0), draw.randint(0, 9), draw.choice((0, 0.1, 0.37)))
    N = draw.choice((1, 2, 5, 11, 30, 60))

    def scorer(s, x, pos):
        """Any function is one; some scores are equal."""
        asked.append(s)
        assert x.shape == (*pos.shape, 48)
        return torch.tensor([[draw.randrange(5) for _ in pos[0]]])

    _, caches, trace = prefill(tiny, tokens[:, :N], schedule, scorer)
    assert [cache.n for cache in caches] == schedule.counts(N, 6)
    assert [stage.block for stage in trace] == schedule.after(6)
    assert asked == list(range(1, len(trace) + 1))
    for stage in trace:
        assert stage.seen.equal(caches[stage.block - 1].pos)
        assert stage.kept.equal(caches[stage.block].pos), "not renumbered"
        best = spec_select(stage.scores[0], stage.seen[0], stage.kept.shape[1], N, schedule.sink,
                           schedule.local)
        assert stage.kept[0].equal(stage.seen[0, best])


@pytest.mark.parametrize("changes", [{}, {"window": 17}, {"n_kv_heads": 4, "qk_norm": True}])
def test_mask_equals_drop_at_every_survivor(tokens, changes):
    """The same survivors, scores, last states, and in training the likelihood of the response."""
    model, states = tiny_model(**changes), []
    model.blocks[-1].register_forward_hook(lambda block, given, x: states.append(x))
    predictors = frozen_predictors()
    x, pis, masks = masked_pass(model, predictors, Example(tokens[0], 48), SCHEDULE)
    arm = SCHEDULE, predictor_scorer(predictors)
    _, caches, trace = prefill(model, tokens[:, :48], *arm, room=12)
    extend(model, tokens[:, 48:], 48, caches)
    assert len(trace) == len(pis) == 4
    for stage, mask, pi in zip(trace, masks[1:], pis):
        kept = mask[0].nonzero()[:, 0]
        assert kept.tolist() == [*stage.kept[0].tolist(), *range(48, 60)]
        assert close(stage.scores, score(pi)[:, stage.seen[0]], 1e-4)
    assert close(x[:, kept], torch.cat(states[1:], 1), 1e-4)
    masked = model.logits(x[:, 47:-1])[0].log_softmax(-1)
    pruned = nll(model, tokens, 48, *arm)
    assert close(-masked.gather(1, tokens[0, 48:, None])[:, 0], pruned, 1e-4)
    assert not close(pruned, nll(model, tokens, 48), 0.01), "65% fewer do change something here"


@pytest.mark.parametrize("shape, schedule, message", [
    ((1, 9), SCHEDULE, "a schedule needs a scorer"),
    ((1, 0), UNPRUNED, "the prompt is empty"),
    ((2, 9), UNPRUNED, "one prompt is read at a time, not 2"),
    ((1, 513), UNPRUNED, "position 512 is .* this model's 512 positions")])
def test_prompts_that_are_refused(tiny, shape, schedule, message):
    with pytest.raises(ValueError, match=message):
        prefill(tiny, torch.zeros(shape, dtype=torch.long), schedule)


# -------------------------------------------------------------------------------------- accounting

TABLE_2 = {4096: 72.51, 8192: 158.22, 16384: 369.22, 32768: 949.54, 65536: 2743.46,
           131072: 8864.49}


@pytest.mark.parametrize("n, tflops", TABLE_2.items())
def test_paper_baselines(n, tflops):
    found = flops(Config(**SHAPES["mistral-7b"]), [n] * 32, "paper") / 1e12
    assert abs(found / tflops - 1) < 1e-3


def test_exact_flops_equal_a_count_of_every_matrix_product():
    """With a schedule those of its predictors too."""
    c, counts = tiny_model().config, [10, 10, 7, 7, 4, 4]
    total = spec_flops(c, counts, "exact")
    assert flops(c, counts) == flops(c, counts, schedule=UNPRUNED) == total
    modules = sum(2 * n * (48 * 32 + 32 * 2) for n in (10, 7))
    schedule = Schedule(2, 2, 2, 0.7)
    assert flops(c, counts, schedule=schedule) == total + modules
    assert flops(c, counts, "exact", schedule, fresh_predictors()) == total + modules
    near = sum(2 * n * (48 * 16 + 48 * 16 + 16 * 2) for n in (10, 7))
    assert flops(c, counts, "exact", schedule, fresh_predictors(near=True)) == total + near
    with pytest.raises(ValueError, match="accounting is 'rough'"):
        flops(c, counts, "rough")


@pytest.mark.parametrize("shape", ["llama-7b", "mistral-7b", "llama-3-8b"])
def test_ten_stages_save_a_third_to_a_half_and_cost_under_a_percent(shape):
    c, schedule = Config(**SHAPES[shape]), Schedule()
    for n in TABLE_2:
        full, counts = flops(c, [n] * 32), schedule.counts(n, 32)
        pruned = flops(c, counts, schedule=schedule)
        assert 0.33 < 1 - pruned / full < 0.50
        assert pruned - flops(c, counts) < 0.01 * full
    assert kv_bytes(c, [4096, 100]) == 4196 * 2 * c.n_kv_heads * 128 * 2


def test_the_command_tells_table_2():
    code, out, err = command("prune.py", "--shape", "mistral-7b", "--lengths", 4096, "--json")
    told = json.loads(out)          # alone on stdout, and the text is not lost
    assert code == 0 and err and "prune.py --shape mistral-7b" in told["command"]
    assert told["pruned"] == 1 - 0.9 ** 10
    assert told["rows"][0]["counts"] == Schedule().counts(4096, 32)
    assert abs(told["rows"][0]["paper"][0] / 72.51e12 - 1) < 1e-3


# ------------------------------------------------------------------------------- saved predictors


@pytest.mark.parametrize("folder, files, published", [
    ("toy", 1, None), ("smollm2", 2, "SmolLM2-135M"), ("qwen2.5-coder-0.5b", 1, "Qwen2.5-0.5B")])
def test_committed_predictors_load(folder, files, published, tmp_path):
    told = ROOT / "checkpoints" / folder / "config.json"
    if published:
        told = tmp_path / "config.json"
        # as convert.py writes it: a GGUF file of Qwen's has the head a second time
        tied = {"tie_word_embeddings": folder == "smollm2"}
        told.write_text(json.dumps({**config_of(published), **tied}))
    config = Config(**read_config(told))
    model = SimpleNamespace(config=config, blocks=range(config.n_blocks), dtype=torch.bfloat16,
                            device="cpu")
    found = list((ROOT / "checkpoints" / folder).glob("p*.safetensors"))
    assert len(found) == files
    for file in found:
        predictors, metadata = load_predictors(file, model)
        assert len(predictors) == metadata["schedule"]["stages"]
        assert all(p.dtype == torch.bfloat16 for p in predictors.parameters())


@pytest.fixture
def saved(tiny, tmp_path):
    """Near predictors of the tiny model in a file, after blocks 1, 2, 3 and 4."""
    predictors = fresh_predictors(near=True)
    save_predictors(tmp_path / "predictors.safetensors", predictors, tiny.config, SCHEDULE,
                    template="plain", steps=7)
    return tmp_path, predictors


def test_near_predictors_and_fewer_stages_are_read_back(saved, tiny, tokens):
    folder, trained = saved
    low = replace(SCHEDULE, stages=2, keep=0.5)                                 # SDTP-low
    for schedule, chosen in ((None, (0, 1, 2, 3)), (SCHEDULE, (0, 1, 2, 3)), (low, (0, 1)),
                             (replace(low, first=2, step=2), (1, 3))):          # blocks 2 and 4
        predictors = [trained[i] for i in chosen]
        again, metadata = load_predictors(folder, tiny, schedule)
        assert Schedule(**metadata["schedule"]) == SCHEDULE
        assert (metadata["template"], metadata["steps"]) == ("plain", "7")
        assert all(isinstance(p, NearPredictor) for p in again)
        ours, theirs = (prefill(tiny, tokens, schedule or SCHEDULE, predictor_scorer(each))[0]
                        for each in (predictors, again))
        assert torch.equal(ours, theirs)


def test_predictors_of_another_model_or_other_stages_are_refused(saved, tiny):
    folder, _ = saved
    for places in ((2, 3, 2), (1, 1, 5)):
        with pytest.raises(ValueError, match=r"after blocks \[1, 2, 3, 4\], the schedule asks"):
            load_predictors(folder, tiny, Schedule(*places))
    other = tiny_model(n_heads=2, n_kv_heads=2, head_dim=24)
    with pytest.raises(ValueError, match="made for another model"):
        load_predictors(folder, other)
