"""lab/batch.py: prompts of different lengths in one batch, each row as if it were alone."""
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conftest import SCHEDULE, command, predictors_for, tiny_model
from infer import generate
from lab import batch
from lab.batch import generate_batch, until
from lab.scorers import attention_scorer, norm_scorer, with_prior
from model import PAD
from prune import predictor_scorer, prefill


def full(model):
    return None, None


def norm(model):
    return SCHEDULE, norm_scorer()


def attention(model):
    return SCHEDULE, attention_scorer(model, SCHEDULE)


def prior(model):
    return SCHEDULE, with_prior(predictor_scorer(predictors_for(model)), 0.3)


def near(model):
    return SCHEDULE, predictor_scorer(predictors_for(model, near=True))


@pytest.fixture
def prompts(tokens):
    """Four prompts of 48, 31, 6 and 1 tokens."""
    first, second = tokens.tolist()
    return [first[:48], second[:31], second[5:11], first[10:11]]


def pad(prompts):
    rows = [torch.tensor(prompt) for prompt in prompts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("arm", [full, norm, attention, prior, near])
def test_a_batch_is_read_as_its_rows_alone(prompts, arm, window):
    model = tiny_model(window=window)
    arm = arm(model)
    lengths = [len(prompt) for prompt in prompts]
    logits, caches, trace = prefill(model, pad(prompts), *arm, lengths=lengths)
    for b, prompt in enumerate(prompts):
        alone, own, stages = prefill(model, torch.tensor([prompt]), *arm)
        assert torch.allclose(logits[b], alone[0], atol=1e-5)
        assert len(trace) == len(stages)
        for stage, single in zip(trace, stages):
            kept = stage.kept[b]
            assert torch.equal(kept[kept < PAD], single.kept[0])
        for cache, single in zip(caches, own):
            pos = cache.pos[b]
            assert torch.equal(pos[pos < PAD], single.pos[0])
            assert torch.allclose(cache.k[b, :, :single.n], single.k[0], atol=1e-5)


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("arm", [full, norm, attention, prior, near])
def test_a_batch_goes_on_as_its_rows_alone(prompts, arm, window):
    model = tiny_model(window=window)
    arm = arm(model)
    new = generate_batch(model, prompts, 7, *arm, eos=())
    alone = [generate(model, torch.tensor([prompt]), 7, *arm, eos=()).tokens for prompt in prompts]
    assert new == alone
    stop = new[1][3]
    cut = [row[:row.index(stop) + 1] if stop in row else row for row in new]
    assert generate_batch(model, prompts, 7, *arm, eos=(stop,)) == cut


def test_the_choice_of_a_token_is_the_callers(tiny, prompts):
    made = generate_batch(tiny, prompts, 3, eos=(), pick=lambda logits: logits.argmin(-1, True))
    assert len(made) == 4
    for prompt, row in zip(prompts, made):
        unlikeliest = tiny(torch.tensor([prompt]))[0, -1].argmin().item()
        assert row[0] == unlikeliest


def test_a_bad_batch_is_refused(tiny, tokens):
    for lengths in ([48, 30], [60, 0], [60]):
        with pytest.raises(ValueError, match="lengths"):
            prefill(tiny, tokens, lengths=lengths)
    for prompts, new in (([], 3), ([[1], []], 3), ([[1]], 0)):
        with pytest.raises(ValueError, match="no empty one|at least 1"):
            generate_batch(tiny, prompts, new)
    last_queries = attention_scorer(tiny, SCHEDULE, 16)
    with pytest.raises(ValueError, match="one length"):
        prefill(tiny, tokens, SCHEDULE, last_queries, lengths=[60, 20])


def test_a_prompt_that_is_too_long_is_named_before_any_is_read(monkeypatch, prompts):
    model = tiny_model(max_positions=50)
    assert len(generate_batch(model, prompts, 3, eos=())) == 4
    monkeypatch.setattr(batch, "prefill", None)
    with pytest.raises(ValueError, match="^prompt 2 of 4: with 48 prompt tokens and 4 new ones "
                                         "position 50 is beyond this model's 50 positions"):
        generate_batch(model, [prompts[1], prompts[0], *prompts[2:]], 4)


def test_the_end_of_a_text_is_one_token_or_several(tiny, prompts):
    made = generate_batch(tiny, prompts, 5, eos=())
    stop = made[0][1]
    wanted = [until(row, (stop,)) for row in made]
    for eos in (stop, [stop], torch.tensor([stop])):
        assert generate_batch(tiny, prompts, 5, eos=eos) == wanted
    with pytest.raises(ValueError, match="expected a token id, or several"):
        generate_batch(tiny, prompts, 5, eos="2")
    for new in (-1, 2.0, "3"):
        with pytest.raises(ValueError, match="expected a whole number, at least 1"):
            generate_batch(tiny, prompts, new)


def test_damage_that_only_decode_meets_is_named(tiny, prompts):
    """The first new token of one row meets it; where that ends the row, nothing does."""
    prompts = prompts[2:]
    made = generate_batch(tiny, prompts, 4, eos=())
    first = made[1][0]
    assert first not in sum(prompts, []) + made[0]
    tiny.embed.weight.data[first] = math.nan
    with pytest.raises(ValueError, match="the logits are not finite in torch.float32"):
        generate_batch(tiny, prompts, 4, eos=())
    assert generate_batch(tiny, prompts, 4, eos=first) == [made[0], [first]]


def test_arms_are_timed_there_and_back_over_as_many_tokens(tiny, prompts, monkeypatch):
    """Whatever they say: the texts come from the first two passes, the times from four others."""
    arms, prompts = {"full": full(tiny), "sdtp": norm(tiny)}, prompts[:1] * 2
    alone = {name: generate_batch(tiny, prompts, 6, *arm, eos=()) for name, arm in arms.items()}
    end = alone["full"][0][1]
    assert end not in alone["sdtp"][0]
    model, made = tiny_model(eos=(end,)), []

    def noting(model, prompts, new, *arm, **options):
        rows = generate_batch(model, prompts, new, *arm, **options)
        made.append(("sdtp" if arm[0] else "full", max(map(len, rows))))
        return rows

    monkeypatch.setattr(batch, "generate_batch", noting)
    rows = [{"response": "x"}] * 2
    told = batch.answer(model, SimpleNamespace(decode=str), rows, prompts, 6, arms)
    assert made == [("full", 2), ("sdtp", 6), ("full", 6), ("sdtp", 6), ("sdtp", 6), ("full", 6)]
    assert [arm["arm"] for arm in told] == ["full", "sdtp"]
    assert [arm["new_tokens"] for arm in told] == [6, 6]
    assert told[0]["texts"] == [str(row[:1]) for row in alone["full"]]


def test_a_text_ends_with_the_first_eos():
    assert until([3, 1, 2, 1], (1, 2)) == [3, 1]
    assert until([3, 1], ()) == [3, 1]


@pytest.mark.beside
def test_the_command_answers_the_toys_rows():
    code, out, err = command("-m", "lab.batch", "--batch", 4, "--max-new-tokens", 8, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert "4 rows in one batch" in err
    assert [told["arm"] for told in found["batch"]] == ["full", "sdtp"]
    for told in found["batch"]:
        assert len(told["texts"]) == 4
        right = sum(f"{text!r}   right {text!r}" in err for text in told["texts"])
        assert right >= 3, err
