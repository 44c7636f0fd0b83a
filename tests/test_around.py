"""support/around.py: numbers blended with those of the tokens around, and marks made so."""
from dataclasses import replace

import pytest
import torch

from conftest import SCHEDULE
from support.around import blended
from support.data import Example, pad
from train import Recipe, marking


@pytest.mark.parametrize("share, window", [(0.5, 5), (1.0, 9), (0.7, 65)])
def test_every_token_by_hand(share, window):
    torch.manual_seed(0)
    values, counted = torch.rand(2, 40), torch.rand(2, 40) > 0.3
    found = blended(values, counted, share, window)
    for b in range(2):
        for i in range(40):
            span = slice(max(0, i - window // 2), i + window // 2 + 1)
            near = values[b, span][counted[b, span]]
            mixed = (1 - share) * values[b, i] + share * near.mean()
            right = mixed if counted[b, i] else values[b, i]
            assert abs(found[b, i] - right) < 1e-6


def test_alone_nothing_changes():
    values = torch.rand(2, 40)
    everyone = torch.ones(2, 40, dtype=torch.bool)
    assert torch.equal(blended(values, everyone, 0.0), values)
    assert torch.allclose(blended(values, everyone, 0.8, 1), values)


def test_marks_are_blended_within_the_tokens_that_compete(tiny, tokens):
    rows = [Example(tokens[0], 50), Example(tokens[1, :40], 30)]
    batch = pad(rows, "cpu")
    plain = marking(tiny, batch, SCHEDULE, Recipe())
    found = marking(tiny, batch, SCHEDULE, replace(Recipe(), around=0.5))
    alone = marking(tiny, pad(rows[1:], "cpu"), SCHEDULE, replace(Recipe(), around=0.5))
    for s, t, single in zip(plain.saliency, found.saliency, alone.saliency):
        assert torch.equal(s[:, :4], t[:, :4]), "the first tokens do not compete"
        assert torch.equal(s[0, 45:], t[0, 45:]), "nor do the prompt's last and the response"
        assert not torch.allclose(s[0, 4:45], t[0, 4:45])
        assert torch.allclose(t[1, :40], single[0], atol=1e-5, rtol=1e-3)
