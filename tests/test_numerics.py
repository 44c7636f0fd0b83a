"""Half types and extreme values: what is summed, normalised and ranked stays finite, or is said."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import infer
import train as T
from conftest import ROOT, tiny_model
from lab.heldout import spearman
from lab.scorers import make_scorer
from model import RMSNorm, Rope, load, masked_attention, positions
from predictor import Predictor, gumbel_mask, mse_loss, ranking_loss
from prune import Schedule, predictor_scorer, prefill
from saliency import REDUCE, mark, reduce_saliency, saliency
from support import recompute
from support.data import Batch
from support.linear import Linear, Product, divided

SCHEDULE = Schedule(1, 1, 4, 0.8)
HALF = [torch.bfloat16, torch.float16]
SMOLLM2 = ROOT / "checkpoints" / "smollm2" / "model.safetensors"


def finite(*tensors):
    return all(torch.isfinite(t).all() for t in tensors)


def massive(dtype, top=3e4):
    """The tiny model whose residual stream has one feature at `top`, as real Llamas have."""
    model = tiny_model()
    model.embed.weight.data[:, 5] = top
    return model.to(dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_norms_of_large_half_values(dtype):
    generator = torch.Generator().manual_seed(0)
    x = 2e4 * torch.randn(1, 6, 64, generator=generator).clamp(-3, 3)
    x = x.to(dtype)
    norm = RMSNorm(64, 1e-5).requires_grad_(False)
    half = norm.to(dtype)(x).float()
    whole = norm.float()(x.float())
    assert (half - whole).abs().max() < 0.02


@pytest.mark.parametrize("dtype", HALF)
def test_the_softmax_of_large_half_values(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 16, generator=generator)
    q, k = 200 * q, 200 * k                                          # q . k of 600,000
    rope = Rope(positions(torch.zeros(1, 9)), None, None, None)
    mask = (torch.arange(9) % 3 > 0).float()[None]
    whole = masked_attention(q, k, v, rope, mask)
    half = masked_attention(q.to(dtype), k.to(dtype), v.to(dtype), rope, mask)
    assert finite(half)
    assert (half.float() - whole).abs().median() < 0.02
    q.requires_grad_(True)
    masked_attention(q, k, v, rope, mask).square().sum().backward()
    assert finite(q.grad)


@pytest.mark.parametrize("dtype", HALF)
def test_marking_is_finite_beside_massive_activations(dtype, tokens):
    states, grads, logits = mark(massive(dtype), tokens, 48, [1, 2, 3, 4])
    assert max(x.abs().max() for x in states) > 2e4
    assert finite(logits)
    for x, g in zip(states, grads):
        assert finite(x, g) and g.abs().sum() > 0
        for reduce in REDUCE:
            saliency = reduce_saliency(g, x, reduce)
            assert finite(saliency) and saliency.max() > 0


@pytest.mark.parametrize("dtype", HALF)
def test_losses_and_pruning_are_finite_beside_massive_activations(dtype, tokens):
    model = massive(dtype)
    torch.manual_seed(0)
    predictors = nn.ModuleList(Predictor(48) for _ in range(4))
    recipe = T.Recipe(weights=T.Loss(distill=1.0), mask="gumbel")
    batch = Batch(tokens, [48, 48], [60, 60])
    marks = T.marking(model, batch, SCHEDULE, recipe)
    loss, terms, _ = T.pruning(model, predictors, batch, marks, SCHEDULE, recipe)
    loss.backward()
    assert set(terms) == {"cls", "mse", "rank", "distill"}
    assert finite(*map(torch.tensor, terms.values()))
    assert finite(*(p.grad for p in predictors.parameters()))
    for name in ("predictor", "prior", "norm", "attention", "recent"):
        scorer = make_scorer(name, model, SCHEDULE, predictors, prior=0.5)
        logits, _, trace = prefill(model, tokens[:, :48], SCHEDULE, scorer)
        assert finite(logits, *(stage.score for stage in trace)), name


@pytest.mark.parametrize("pairs", ["equal", "saliency"])
def test_the_ranking_loss_of_extreme_scores_and_saliencies(pairs):
    score = torch.tensor([[1e4, -1e4, 0.0, 1e-8]], requires_grad=True)
    saliency = torch.tensor([[0.0, 1e-38, 1.0, 1e30]])
    loss = ranking_loss(score, saliency, pairs=pairs)
    loss.backward()
    assert finite(loss, score.grad)


def test_the_other_losses_of_extreme_scores_and_saliencies():
    score = torch.tensor([[1e4, -1e4, 0.0, 1e-8]])
    saliency = torch.tensor([[0.0, 1e-38, 1.0, 1e30]])
    assert finite(mse_loss(score, saliency))
    assert finite(ranking_loss(score[:, :1], saliency[:, :1]))      # no pair at all
    mask = gumbel_mask(torch.tensor([[[5e4, -5e4], [-5e4, 5e4]]]))
    assert mask.tolist() == [[1.0, 0.0]]


def test_logits_that_overflow_are_said_and_not_sampled(tokens):
    model = massive(torch.float16, top=6.5e4)
    model.embed.weight.data[:, 6] = float("inf")
    predictors = nn.ModuleList(Predictor(48).half() for _ in range(4))
    with pytest.raises(ValueError, match="not finite in torch.float16"):
        infer.generate(model, tokens[:1], 4, SCHEDULE, predictor_scorer(predictors))


@pytest.mark.real
@pytest.mark.skipif(not SMOLLM2.is_file(), reason="python checkpoints/smollm2.py makes it")
def test_a_real_model_ranks_its_tokens_alike_in_half_types():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 40000, (1, 200), generator=generator)
    stages = [4, 16, 28]
    states, grads, _ = mark(load("smollm2", torch.float32, "cpu"), ids, 160, stages)
    whole = [reduce_saliency(g, x)[0, :160] for g, x in zip(grads, states)]
    for dtype in HALF:
        states, grads, logits = mark(load("smollm2", dtype, "cpu"), ids, 160, stages)
        assert finite(logits, F.log_softmax(logits, -1))
        for g, x, expected in zip(grads, states, whole):
            found = reduce_saliency(g, x)[0, :160]
            assert finite(found) and (found > 0).all()
            assert spearman(expected, found) > 0.98


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_a_product_of_half_types_is_that_of_fp32_rounded_once(dtype, bias):
    """Forward and backward, whatever arithmetic this processor has."""
    torch.manual_seed(0)
    linear = Linear(48, 24, bias=bias).to(dtype).requires_grad_(False)
    x = torch.randn(2, 40, 48).to(dtype).requires_grad_()
    y = Product.apply(x, linear.weight, linear.bias)
    b = linear.bias.float() if bias else None
    assert y.equal(F.linear(x.float(), linear.weight.float(), b).to(dtype))
    g = torch.randn(y.shape).to(dtype)
    found, = torch.autograd.grad(y, x, g)
    assert found.equal((g.float() @ linear.weight.float()).to(dtype))
    near = torch.finfo(dtype).eps * 8
    plain = F.linear(x, linear.weight, linear.bias)
    torch.testing.assert_close(linear(x), plain, rtol=near, atol=near)
    few = x[:1, :3].detach()
    torch.testing.assert_close(linear(few), plain[:1, :3], rtol=near, atol=near)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threads, tokens", [(1, 1), (2, 1), (3, 1), (5, 1), (2, 7), (3, 31)])
def test_a_product_of_few_tokens_is_divided_among_the_threads(threads, tokens, bias, monkeypatch):
    """Three threads take 8 of 24 rows each; five do not divide them, so one takes all."""
    torch.manual_seed(0)
    linear = Linear(48, 24, bias=bias).requires_grad_(False)
    x = torch.randn(2, 40, 48)[:1, :tokens].transpose(0, 1)     # not contiguous
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr("support.linear.LARGE", 48 * 24)
    plain = F.linear(x, linear.weight, linear.bias)
    parts = []
    monkeypatch.setattr(torch, "bmm", lambda a, b: parts.append(len(a)) or a @ b)
    for y in (divided(x, linear.weight, linear.bias), linear(x)):
        assert y.shape == plain.shape
        torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-6)
    assert parts == 2 * [1 if threads == 5 else threads]
    linear(torch.randn(1, 32, 48))
    assert len(parts) == 2, "many tokens go through one product, which has all threads"
    monkeypatch.setattr("support.linear.LARGE", 48 * 24 + 1)
    linear(x)
    assert len(parts) == 2, "a small matrix is not worth it"


def test_a_long_rows_marking_pass_is_the_same_computed_again(monkeypatch):
    """Where blocks are recomputed, gradients are bit for bit those of kept values."""
    model = load("toy", dtype=torch.float32, device="cpu")
    tokens = torch.arange(60)[None] % model.config.vocab
    kept = saliency(model, tokens, 50, [2, 5, 9])
    monkeypatch.setattr(recompute, "LARGE", 8)
    assert kept.equal(saliency(model, tokens, 50, [2, 5, 9]))
