"""predictor.py: the module, the mask, and the losses (Eq. 1, 2, 4, 5, 6) against plain loops."""
import math
from itertools import combinations

import pytest
import torch

from predictor import Predictor, gumbel_mask, mse_loss, mse_target, ranking_loss, score


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_module_shape_and_score():
    predictor = Predictor(48)
    logits = predictor(rand(2, 7, 48))
    assert logits.shape == (2, 7, 2)
    assert logits.dtype == torch.float32
    keep, drop = logits.unbind(-1)
    assert torch.equal(score(logits), keep - drop)


# ------------------------------------------------------------------------------------ ranking loss


def pair_loss(difference, above):
    """Of a pair whose scores and whose saliencies differ by so much."""
    sign = (above > 0) - (above < 0)
    return math.log(1 + math.exp(-difference * sign))


def ranking_by_loops(pi, saliency, mask):
    losses = []
    for p, s, m in zip(pi, saliency, mask):
        present = [i for i in range(len(p)) if m[i]]
        for i, j in combinations(present, 2):
            losses.append(pair_loss(p[i] - p[j], s[i] - s[j]))
    return sum(losses) / len(losses)


def scores_and_saliency(rows):
    """Random scores and saliencies of 13 tokens, (rows, 13) fp64."""
    pi = rand(rows, 13)
    saliency = rand(rows, 13, seed=1).abs()
    return pi.double(), saliency.double()


@pytest.mark.parametrize("chunk", [1024, 5, 1])
def test_ranking_loss_equals_a_double_loop(chunk):
    pi, saliency = scores_and_saliency(2)
    pi.requires_grad_()
    saliency[0, 3] = saliency[0, 4]         # a tie
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(2, 13, generator=generator) > 0.3
    loss = ranking_loss(pi, saliency, mask, chunk=chunk)
    want = ranking_by_loops(pi.tolist(), saliency.tolist(), mask.tolist())
    assert abs(loss.item() - want) < 1e-9
    loss.backward()
    assert (pi.grad[~mask] == 0).all()
    for i in (0, 7):
        step = torch.zeros_like(saliency)
        step[0, i] = 1e-6
        up = ranking_loss(pi.detach() + step, saliency, mask)
        down = ranking_loss(pi.detach() - step, saliency, mask)
        slope = (up - down) / 2e-6
        assert abs(slope - pi.grad[0, i]) < 1e-7


@pytest.mark.parametrize("chunk", [1024, 5])
def test_weighted_pairs_count_by_their_difference(chunk):
    pi, saliency = scores_and_saliency(1)
    p, s = pi[0].tolist(), saliency[0].tolist()
    total = weight = 0.0
    for i, j in combinations(range(13), 2):
        above = s[i] - s[j]
        total += abs(above) * pair_loss(p[i] - p[j], above)
        weight += abs(above)
    for scale in (1, 1000):
        loss = ranking_loss(pi, scale * saliency, pairs="saliency", chunk=chunk)
        assert abs(loss.item() - total / weight) < 1e-9


@pytest.mark.parametrize("pairs, first_wins", [("saliency", True), ("equal", False)])
def test_weighted_pairs_order_by_the_mean_and_equal_pairs_by_the_majority(pairs, first_wins):
    """Two tokens, three rows: the second is slightly ahead twice, the first far ahead once."""
    saliency = torch.tensor([[1.0, 1.1], [1.0, 1.1], [9.0, 1.0]])
    pi = torch.zeros(1, 2, requires_grad=True)
    ranking_loss(pi.expand(3, 2), saliency, pairs=pairs).backward()
    assert (pi.grad[0, 0] < 0) == first_wins        # descent raises the first token's score


def test_ranking_loss_prefers_the_right_order():
    s = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    right, wrong = ranking_loss(s, s), ranking_loss(-s, s)
    assert right < math.log(2) < wrong
    one = s[:, :1]
    assert ranking_loss(one, one) == 0, "one token has no pair"


# --------------------------------------------------------------------------------------------- MSE


def test_mse_target_is_standardised_over_the_masked_tokens():
    s = rand(3, 200).exp()
    mask = torch.rand(3, 200) > 0.2
    target = mse_target(s, mask)
    for row in range(3):
        z = target[row, mask[row]]
        assert abs(z.mean()) < 0.02
        assert abs(z.std() - 1) < 0.05
    assert torch.allclose(target, mse_target(1000 * s, mask), atol=1e-4), "the scale is no matter"
    assert mse_loss(target, s, mask) == 0
    assert torch.isfinite(mse_target(torch.zeros(1, 5))).all()


# -------------------------------------------------------------------------------------------- mask


def test_gumbel_mask_is_hard_and_its_gradient_soft():
    torch.manual_seed(0)
    logits = rand(4, 5000, 2).requires_grad_()
    mask = gumbel_mask(logits, tau=0.7)
    assert set(mask.detach().unique().tolist()) == {0.0, 1.0}
    p = torch.softmax(logits, -1)[..., 0]
    # a token is kept with its softmax probability (Gumbel-max)
    assert abs(mask.mean() - p.mean()) < 0.01
    mask.sum().backward()
    assert torch.isfinite(logits.grad).all()
    rises = logits.grad[..., 0] > 0
    assert rises.float().mean() > 0.99


def test_a_dropped_token_stays_dropped():
    previous = (torch.rand(2, 50) > 0.5).float()
    for seed in range(5):
        torch.manual_seed(seed)
        mask = gumbel_mask(rand(2, 50, 2), previous=previous)
        assert (mask * (1 - previous)).sum() == 0
