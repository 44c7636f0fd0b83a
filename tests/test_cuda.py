"""The way on a GPU, rehearsed without one: no tensor on another device, no wait for the device.

A fake tensor knows its shape, type and device, and holds nothing. So an operation on tensors of two
devices fails, and so does whatever asks for a value, for which a GPU would have to be waited for.
It needs a CUDA build of torch, and no GPU. Not rehearsed: backward passes, clocks.
"""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import saliency
from conftest import SCHEDULE, fresh_predictors, tiny_model
from lab.caches import h2o
from lab.scorers import SCORERS, make_scorer, oracle_scorer
from model import KVCache
from prune import UNPRUNED, extend, prefill
from train import masked_pass
from support.rows import Example

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="a CPU build of torch")


@pytest.fixture
def faked():
    """faked(module) -> the same with bfloat16 parameters on a GPU that is not there."""
    def move(module):
        for part in module.modules():
            for name, p in list(part.named_parameters(recurse=False)):
                empty = torch.empty(p.shape, dtype=torch.bfloat16, device="cuda")
                setattr(part, name, torch.nn.Parameter(empty, requires_grad=False))
        return module

    with FakeTensorMode():
        yield move


def prompt(n):
    return torch.empty(1, n, dtype=torch.long, device="cuda")


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("changes", [{}, {"window": 11, "qk_norm": True, "tied": True}], ids=str)
def test_prefill_and_decode_never_wait(faked, name, near, changes):
    model = faked(tiny_model(**changes))
    scorer = make_scorer(name, model, SCHEDULE, faked(fresh_predictors(near=near)))
    for arm in ((UNPRUNED, None), (SCHEDULE, scorer)):
        logits, caches, _ = prefill(model, prompt(40), *arm, room=9)
        assert logits.device.type == "cuda" and logits.dtype == torch.float32
        for start, n in ((40, 1), (41, 1), (42, 5)):
            logits = extend(model, prompt(n), start, caches)
        assert logits.shape == (1, 5, 90)


def test_h2o_and_the_oracle_never_wait(faked):
    model, marks = faked(tiny_model()), torch.empty(4, 40, device="cuda")
    for kind in (h2o(0.4), h2o(0.4, 0.0), KVCache):
        _, caches, _ = prefill(model, prompt(40), SCHEDULE, oracle_scorer(marks), 3, kind)
        extend(model, prompt(1), 40, caches)


def test_the_forward_passes_of_training_never_wait(faked, monkeypatch):
    model, predictors = faked(tiny_model()), faked(fresh_predictors())
    monkeypatch.setattr(saliency.torch.autograd, "grad", lambda T, states: states)
    states, _, logits = saliency.mark(model, prompt(40), 30, [1, 2, 3, 4])
    assert len(states) == 4 and logits.shape == (1, 10, 90)
    for mask in ("topk", "gumbel"):
        x, pis, masks = masked_pass(model, predictors, Example(prompt(40)[0], 30), SCHEDULE, mask)
        assert x.device.type == "cuda" and len(pis) == 4 and len(masks) == 5
