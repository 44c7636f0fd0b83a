"""Half types and extreme values: what is summed, normalised and ranked stays finite, or is said."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import infer
import train
from conftest import SCHEDULE, fresh_predictors, tiny_model
from lab.quality import read_answers
from lab.tasks import Answer
from model import Rope, causal_attention, masked_attention
from predictor import gumbel_mask, mse_loss, ranking_loss
from prune import nll, predictor_scorer, prefill
from saliency import REDUCE, run_block
from support.rows import Example
from support.weights import Linear

half_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def finite(*tensors):
    return all(t.isfinite().all() for t in tensors)


def massive(dtype, top=3e4):
    """The tiny model whose residual stream has one feature at `top`, as real Llamas have."""
    model = tiny_model()
    model.embed.weight.data[:, 5] = top
    return model.to(dtype)


@half_types
def test_the_softmax_of_large_half_values(dtype):
    q, k, v = torch.randn(3, 1, 2, 9, 16, generator=torch.Generator().manual_seed(0))
    q, k = 200 * q, (200 * k).requires_grad_()                      # q . k of 600,000
    rope = Rope(torch.arange(9)[None], None, None, None)
    mask = (torch.arange(9) % 3 > 0).float()[None]
    whole = masked_attention(q, k, v, rope, mask)
    half = masked_attention(q.to(dtype), k.to(dtype), v.to(dtype), rope, mask)
    assert finite(half) and (half.float() - whole).abs().median() < 0.02
    whole.square().sum().backward()
    assert finite(k.grad)


@half_types
def test_marking_training_and_pruning_are_finite_beside_massive_activations(dtype, tokens):
    model, predictors, example = massive(dtype), fresh_predictors(), Example(tokens[0], 48)
    for reduce in REDUCE:
        recipe = train.Recipe(distill=1.0, mask="gumbel", reduce=reduce)
        marks = train.marking(model, example, SCHEDULE, recipe)
        assert finite(*marks.saliency) and all(s.max() > 0 for s in marks.saliency)
        loss, terms = train.pruning(model, predictors, example, marks, SCHEDULE, recipe)
        loss.backward()
        assert terms.keys() == {"cls", "mse", "rank", "distill", "kept", "loss"}
        assert finite(marks.logits, loss, *(p.grad for p in predictors.parameters()))
    assert marks.states[0].max() > 2e4
    logits, _, trace = prefill(model, tokens, SCHEDULE, predictor_scorer(predictors))
    assert finite(logits, *(stage.scores for stage in trace))


@pytest.mark.parametrize("near", [False, True])
def test_a_state_that_is_not_finite_is_refused_by_the_name_of_its_stage(near, tiny, tokens):
    """A ranking of scores without a number would keep the first tokens, and say nothing."""
    def infinite(x):
        x[:, 20] = torch.inf
        return x

    scorer = predictor_scorer(fresh_predictors(near=near))
    at_stage_2 = SCHEDULE, lambda s, x, pos: scorer(s, infinite(x) if s == 2 else x, pos)
    for read in (lambda *arm: infer.generate(tiny, tokens, 4, *arm),
                 lambda *arm: nll(tiny, tokens, 48, *arm),
                 lambda *arm: read_answers(tiny, tokens, [Answer([3, 4], 0)], *arm)):
        with pytest.raises(ValueError, match="stage 2, after block 2: a score is not finite"):
            read(*at_stage_2)


def test_losses_of_extreme_scores_and_saliencies():
    scores = torch.tensor([1e4, -1e4, 0.0, 1e-8], requires_grad=True)
    saliency = torch.tensor([0.0, 1e-38, 1.0, 1e30])
    for loss in (mse_loss(scores, saliency), ranking_loss(scores, saliency),
                 ranking_loss(scores, saliency, "saliency")):
        assert finite(loss, *torch.autograd.grad(loss, scores))
    assert gumbel_mask(torch.tensor([[[5e4, -5e4], [-5e4, 5e4]]])).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threads, parts", [(1, 1), (2, 2), (3, 3), (5, 1)])
def test_a_product_of_few_tokens_is_divided_among_the_threads(threads, parts, bias, monkeypatch):
    """Three threads take 72 of 216 rows each; five do not divide them, so one takes all."""
    layer, used, bmm = Linear(320, 216, bias).requires_grad_(False), [], torch.bmm
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "bmm", lambda a, b: used.append(len(a)) or bmm(a, b))
    for shape in ([320], [1, 1, 320], [1, 31, 320], [2, 7, 320], [0, 320], [1, 0, 320], [32, 320]):
        x = torch.randn(*shape, 2)[..., 0]                          # not contiguous
        plain = F.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5)
    assert used == 4 * [parts], "not of no token, and not of many"


@pytest.mark.parametrize("dim, attend", [
    (2048, causal_attention), (48, partial(masked_attention, mask=torch.ones(1, 520)))])
def test_a_long_rows_pass_is_the_same_computed_again(dim, attend):
    """A block that is recomputed gives the gradient of kept values, bit for bit."""
    model, calls = tiny_model(n_blocks=1, dim=dim, max_positions=520), []
    block, rope = model.blocks[0], model.rope(torch.arange(520)[None], 520)
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 520, dim, requires_grad=True)
    kept, again = (torch.autograd.grad(y.square().sum(), x)[0]
                   for y in (block(x, rope, attend), run_block(block, x, rope, attend)))
    assert kept.equal(again) and len(calls) == 3
