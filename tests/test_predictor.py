"""predictor.py: the modules, the mask and the losses (Eq. 1, 2, 4, 6) against second writings.

NearPredictor against a loop: tests/test_independent.py.
"""
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from conftest import close
from predictor import Predictor, gumbel_mask, mse_loss, mse_target, ranking_loss, score


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_score_is_the_keep_logit_minus_the_drop_logit_in_fp32():
    pi = Predictor(48).bfloat16()(rand(1, 7, 48))
    assert pi.shape == (1, 7, 2) and pi.dtype == torch.float32
    assert torch.equal(score(pi), pi[..., 0] - pi[..., 1])


# ------------------------------------------------------------------------------------ ranking loss


def ranking_by_loops(scores, saliency, pairs):
    total = weights = 0.0
    for i, j in combinations(range(len(scores)), 2):
        above = saliency[i] - saliency[j]
        weight = abs(above) if pairs == "saliency" else 1.0
        total += weight * (1 + ((scores[j] - scores[i]) * above.sign()).exp()).log()
        weights += weight
    return total / weights


@pytest.mark.parametrize("pairs", ["equal", "saliency"])
def test_ranking_loss_equals_a_double_loop(pairs):
    scores, saliency = rand(13).double().requires_grad_(), rand(13, seed=1).abs().double()
    saliency[3] = saliency[4]               # a tie
    loss, want = (f(scores, saliency, pairs) for f in (ranking_loss, ranking_by_loops))
    assert close(loss, want, 1e-9)
    assert close(*(torch.autograd.grad(each, scores)[0] for each in (loss, want)), 1e-9)
    assert close(loss, ranking_loss(scores, 1000 * saliency, pairs), 1e-9)
    for few in (scores[:1], 0 * saliency[:1]), (scores, 0 * saliency):      # no pair, only ties
        assert ranking_loss(*few, pairs).isfinite()


# ------------------------------------------------------------------------------------ MSE and mask


def test_mse_is_taken_to_standardised_logarithms():
    saliency, scores = rand(200).exp(), rand(200, seed=1)
    saliency[7] = 0.0                       # its logarithm is clamped
    logs = saliency.double().clamp(min=1e-30).log()
    target = ((logs - logs.mean()) / logs.std(correction=0)).clamp(-3, 3).float()
    assert close(mse_target(saliency), target, 1e-4)
    error = F.mse_loss(scores, target).item()
    assert mse_loss(scores, saliency).item() == pytest.approx(error, rel=1e-4)
    assert mse_loss(scores[:0], saliency[:0]) == 0


def test_gumbel_mask_keeps_a_token_with_its_probability_and_its_gradient_is_soft():
    """Hard, cumulative, no gradient of what was dropped before: tests/test_train.py."""
    torch.manual_seed(0)
    pi = rand(1, 20000, 2).requires_grad_()
    mask = gumbel_mask(pi, 0.7)
    assert abs(mask.mean() - pi.softmax(-1)[..., 0].mean()) < 0.01          # Gumbel-max
    mask.sum().backward()
    assert pi.grad.isfinite().all() and (pi.grad[..., 0] > 0).float().mean() > 0.99
