"""Half types and extreme values: what is summed, normalised and ranked stays finite, and what does not is said."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import heldout
import infer
import train as T
from conftest import ROOT, tiny_model
from model import RMSNorm, load, masked_attention, positions, visible
from predictor import Predictor, gumbel_mask, mse_loss, ranking_loss
from prune import Schedule, make_scorer, prefill, predictor_scorer
from saliency import REDUCE, mark, reduce_saliency

SCHEDULE, HALF = Schedule(1, 1, 4, 0.8), [torch.bfloat16, torch.float16]


def massive(dtype, top=3e4):
    """The tiny model with one feature of the residual stream at `top` after the first block, as real Llamas have."""
    model = tiny_model()
    model.embed.weight.data[:, 5] = top
    return model.to(dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_norms_and_softmax_of_large_half_values(dtype):
    generator = torch.Generator().manual_seed(0)
    x = 2e4 * torch.randn(1, 6, 64, generator=generator).clamp(-3, 3)
    norm = RMSNorm(64, 1e-5).requires_grad_(False)
    assert (norm.to(dtype)(x.to(dtype)).float() - norm.float()(x.to(dtype).float())).abs().max() < 0.02
    q, k, v = (s * torch.randn(1, 2, 9, 16, generator=generator) for s in (200, 200, 1))         # q . k of 600,000
    see, keep = visible(positions(torch.zeros(1, 9)), positions(torch.zeros(1, 9))), (torch.arange(9) % 3 > 0).float()[None]
    whole, half = (masked_attention(q.to(d), k.to(d), v.to(d), see, keep) for d in (torch.float32, dtype))
    assert torch.isfinite(half).all() and (half.float() - whole).abs().median() < 0.02
    q.requires_grad_(True)
    masked_attention(q, k, v, see, keep).square().sum().backward()
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("dtype", HALF)
def test_marking_losses_and_pruning_are_finite_beside_massive_activations(dtype, tokens):
    model = massive(dtype)
    states, grads, logits = mark(model, tokens, 48, [1, 2, 3, 4])
    assert max(x.abs().max() for x in states) > 2e4 and torch.isfinite(logits).all()
    for x, g in zip(states, grads):
        assert torch.isfinite(x).all() and torch.isfinite(g).all() and g.abs().sum() > 0
        assert all(torch.isfinite(s := reduce_saliency(g, x, reduce)).all() and s.max() > 0 for reduce in REDUCE)
    torch.manual_seed(0)
    predictors = nn.ModuleList(Predictor(48) for _ in range(4))
    args = T.arguments().parse_args(["--distill", "1", "--mask", "gumbel"])
    found, _ = T.losses(model, predictors, tokens, 48, SCHEDULE, args)
    sum(found.values()).backward()
    assert set(found) == {"cls", "mse", "rank", "distill"} and all(torch.isfinite(v) for v in found.values())
    assert all(torch.isfinite(p.grad).all() for p in predictors.parameters())
    for name in ("predictor", "prior", "norm", "attention", "recent"):
        scorer = make_scorer(name, model, SCHEDULE, predictors, prior=0.5)
        logits, _, trace = prefill(model, tokens[:, :48], SCHEDULE, scorer)
        assert torch.isfinite(logits).all() and all(torch.isfinite(stage.score).all() for stage in trace)


def test_the_losses_of_extreme_scores_and_saliencies():
    score = torch.tensor([[1e4, -1e4, 0.0, 1e-8, 3e38]], requires_grad=True)
    saliency = torch.tensor([[0.0, 1e-38, 1.0, 1e30, 3e37]])
    for pairs in ("equal", "saliency"):
        loss = ranking_loss(score[:, :4], saliency[:, :4], pairs=pairs)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(score.grad).all()
    assert torch.isfinite(mse_loss(score[:, :4], saliency[:, :4])) and torch.isfinite(ranking_loss(score[:, :1], saliency[:, :1]))
    mask = gumbel_mask(torch.tensor([[[5e4, -5e4], [-5e4, 5e4]]], dtype=torch.float32))
    assert mask.tolist() == [[1.0, 0.0]]


def test_logits_that_overflow_are_said_and_not_sampled(tokens):
    model = massive(torch.float16, top=6.5e4)
    model.embed.weight.data[:, 6] = float("inf")
    with pytest.raises(ValueError, match="not finite in torch.float16"):
        infer.generate(model, tokens[:1], 4, SCHEDULE, predictor_scorer(nn.ModuleList(Predictor(48).half() for _ in range(4))))


@pytest.mark.real
@pytest.mark.skipif(not (ROOT / "checkpoints" / "smollm2" / "model.safetensors").is_file(), reason="python checkpoints/smollm2.py makes it")
def test_a_real_model_ranks_its_tokens_alike_in_half_types():
    ids = torch.randint(5, 40000, (1, 200), generator=torch.Generator().manual_seed(3))
    whole = load("smollm2", torch.float32, "cpu")
    states, grads, _ = mark(whole, ids, 160, [4, 16, 28])
    for dtype in HALF:
        x, g, logits = mark(load("smollm2", dtype, "cpu"), ids, 160, [4, 16, 28])
        assert torch.isfinite(logits).all() and torch.isfinite(F.log_softmax(logits, -1)).all()
        for s in range(3):
            a, b = reduce_saliency(grads[s], states[s])[0, :160], reduce_saliency(g[s], x[s])[0, :160]
            assert torch.isfinite(b).all() and (b > 0).all() and heldout.spearman(a, b) > 0.98
