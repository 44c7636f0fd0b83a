"""The saliency predictor and its losses (Section 3.3, Eq. 1, 2, 4 and 6).

There are no gradients at inference, so at each stage a two-layer MLP reads a token's hidden state
and scores it: two logits, keep and drop. It learns the ranking that the gradient saliency gives.
This file does not know the backbone, or which tokens have been dropped.

Shapes: n tokens, D hidden; a module's pi is (1, n, 2), a loss reads scores and saliencies (n,).
"""
import torch
import torch.nn.functional as F
from torch import nn


def predictor_width(dim):
    """Width of the MLP: with D/4 all stages together stay under 1% of the backbone's FLOPs."""
    return max(32, dim // 4)


class Predictor(nn.Module):
    """The module of one stage: hidden states (1, n, D) -> keep and drop logits (1, n, 2), fp32.

    A LayerNorm, not in Eq. 1, comes first: some features of the states are a hundred times others.
    """

    def __init__(self, dim, width=None):
        super().__init__()
        width = width or predictor_width(dim)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, width)         # named as in the saved files
        self.down = nn.Linear(width, 2)

    def forward(self, x, pos=None):
        """pos (1, n), the tokens' positions, is for NearPredictor alone."""
        x = self.norm(x.to(self.norm.weight.dtype))     # the backbone may be in half precision
        pi = self.down(F.gelu(self.up(x)))  # Eq. 1
        return pi.float()


class NearPredictor(Predictor):
    """Not in the paper: also reads the mean state of the tokens at most 16 positions away.

    What answers a question stands in one place, so a token's neighbours tell of it. Half as wide,
    it costs the same.
    """

    def __init__(self, dim, width=None):
        width = width or predictor_width(dim) // 2
        super().__init__(dim, width)
        self.near = nn.Linear(dim, width, bias=False)

    def forward(self, x, pos):
        x = self.norm(x.to(self.norm.weight.dtype))
        hidden = self.up(x) + mean_around(self.near(x), pos)
        return self.down(F.gelu(hidden)).float()


def mean_around(x, pos, reach=16):
    """The mean of x (1, n, C) over the tokens at most `reach` positions away, at pos (1, n).

    Two values of a running sum, in fp64, give a window's: it is O(n), and as exact as x.
    """
    pos = pos[0].contiguous()
    first = torch.searchsorted(pos, pos - reach)
    past = torch.searchsorted(pos, pos + reach, right=True)
    running = F.pad(x.double().cumsum(1), (0, 0, 1, 0))             # (1, n + 1, C)
    sums = running[:, past] - running[:, first]
    return (sums / (past - first)[:, None]).to(x.dtype)


def score(pi):
    """One number per token, keep logit minus drop logit: (..., 2) -> (...)."""
    return pi[..., 0] - pi[..., 1]


def gumbel_mask(pi, tau=1.0, previous=None):
    """Sample keep (1) or drop (0) for each token: (1, n, 2) -> (1, n).

    The paper's mask; train.topk_mask is the default. The value is hard, the gradient that of the
    soft sample at temperature tau. A token that was dropped before (`previous` 0) stays dropped.
    """
    u = torch.rand_like(pi).clamp(1e-9, 1 - 1e-7)       # both logarithms stay finite
    noise = -torch.log(-torch.log(u))
    soft = torch.softmax((pi + noise) / tau, dim=-1)  # Eq. 2
    keep = soft[..., 0]
    return straight_through((keep > 0.5).to(keep.dtype), keep, previous)


def straight_through(hard, soft, previous=None):
    """The value of `hard` with the gradient of `soft`, times the earlier mask."""
    mask = hard + (soft - soft.detach())        # what is added is exactly 0, with a gradient
    return mask if previous is None else mask * previous


def mse_target(saliency):
    """Saliencies (n,) on the score's scale: their logarithms, standardised over these tokens.

    They are clamped to 3 deviations. Eq. 4 has them as they are; they span orders of magnitude.
    """
    log = torch.log(saliency.float().clamp(min=1e-30))
    centred = log - log.mean()
    deviation = centred.square().mean().sqrt().clamp(min=1e-6)
    return (centred / deviation).clamp(-3, 3)


def mse_loss(scores, saliency):
    """Mean squared error between scores (n,) and standardised saliency (n,); without tokens 0."""
    error = scores - mse_target(saliency)
    return error.square().sum() / max(1, len(scores))  # Eq. 4


def ranking_loss(scores, saliency, pairs="equal"):
    """Pairwise ranking loss of scores (n,): the mean over all pairs i < j.

    The paper's sum grows with n squared, so the mean is taken; without a pair it is 0. Equal
    saliencies give no gradient. pairs: with "equal", the paper's, every pair has weight 1. Not in
    the paper: "saliency" weighs a pair by the difference of its saliencies, so that a score learns
    the expected saliency rather than the rate of wins.
    """
    n = len(scores)
    i, j = torch.triu_indices(n, n, 1, device=scores.device)        # every pair i < j
    above = saliency[i] - saliency[j]
    loss = F.softplus(-(scores[i] - scores[j]) * above.sign())  # Eq. 6
    weight = above.abs() if pairs == "saliency" else torch.ones_like(loss)
    return (loss * weight).sum() / weight.sum().clamp(min=1e-30)
