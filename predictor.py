"""The saliency predictor and its losses (Section 3.3, Eq. 1, 2, 4 and 6).

There are no gradients at inference, so at each stage a two-layer MLP reads a token's hidden state
and scores it: two logits, keep and drop. It learns the ranking that the gradient saliency gives.
Nothing here knows the backbone.

Shapes: B rows, n tokens, D hidden; pi (B, n, 2) is Eq. 1's; scores, saliencies, masks (B, n).
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from support.around import mean_around


def predictor_width(dim):
    """Width of the MLP: with D/4 all stages together stay under 1% of the backbone's FLOPs."""
    return max(32, dim // 4)


class Predictor(nn.Module):
    """The module of one stage: hidden states (B, n, D) -> keep and drop logits (B, n, 2), fp32.

    A LayerNorm, not in Eq. 1, comes first: some features of the states are a hundred times others.
    near, beyond the paper: it also reads the mean state of the 33 tokens around (`mean_around`).
    Half as wide, it costs the same.
    """

    def __init__(self, dim, width=None, near=False):
        super().__init__()
        width = width or predictor_width(dim) // (2 if near else 1)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, width)         # named as in the saved files
        self.down = nn.Linear(width, 2)
        self.near = nn.Linear(dim, width, bias=False) if near else None

    def forward(self, x, pos=None, there=None):     # (B, n), (B, n): see mean_around
        x = self.norm(x.to(self.norm.weight.dtype))     # the backbone may be in half precision
        hidden = self.up(x)
        if self.near:
            hidden = hidden + mean_around(self.near(x), pos, there)
        pi = self.down(F.gelu(hidden))  # Eq. 1
        return pi.float()


def score(pi):
    """One number per token, keep logit minus drop logit: (B, n, 2) -> (B, n)."""
    return pi[..., 0] - pi[..., 1]


def gumbel_mask(pi, tau=1.0, previous=None):
    """Sample keep (1) or drop (0) for each token: (B, n, 2) -> (B, n).

    The paper's mask; train.topk_mask is the default. The value is hard, the gradient that of the
    soft sample at temperature tau. A token that was dropped before (`previous` 0) stays dropped.
    """
    u = torch.rand_like(pi)
    u = u.clamp(1e-9, 1 - 1e-7)                 # both logarithms stay finite
    noise = -torch.log(-torch.log(u))
    soft = torch.softmax((pi + noise) / tau, dim=-1)  # Eq. 2
    keep = soft[..., 0]
    hard = (keep > 0.5).to(keep.dtype)
    return straight_through(hard, keep, previous)


def straight_through(hard, soft, previous=None):
    """The value of `hard` with the gradient of `soft`, times the earlier mask."""
    zero = soft - soft.detach()             # exactly 0, with a gradient
    mask = hard + zero
    if previous is not None:
        mask = mask * previous
    return mask


def masked_mean(values, m):
    """The mean over the tokens of each row that m, 0 or 1, selects: (B, n) -> (B, 1)."""
    count = m.sum(-1, keepdim=True)
    total = (values * m).sum(-1, keepdim=True)
    return total / count.clamp(min=1)


def as_mask(mask, values):
    """A mask in the type of the values; no mask: all ones."""
    if mask is None:
        return torch.ones_like(values)
    return mask.to(values.dtype)


def mse_target(saliency, mask=None):
    """Saliency on the score's scale: its logarithm, standardised over the row's tokens in `mask`.

    It is clamped to 3 deviations. The paper is silent; raw saliencies span orders of magnitude.
    """
    s = saliency.float()
    m = as_mask(mask, s)
    log = torch.log(s.clamp(min=1e-30))
    centred = log - masked_mean(log, m)
    variance = masked_mean(centred ** 2, m)
    deviation = variance.sqrt().clamp(min=1e-6)
    z = centred / deviation
    return z.clamp(-3, 3)


def mse_loss(scores, saliency, mask=None):
    """Mean squared error between score and standardised saliency, over the tokens in `mask`."""
    m = as_mask(mask, scores)
    error = scores - mse_target(saliency, mask)
    count = m.sum().clamp(min=1)
    return (error ** 2 * m).sum() / count  # Eq. 4


def ranking_loss(scores, saliency, mask=None, pairs="equal", chunk=1024):
    """Pairwise ranking loss: the mean over all pairs i < j of tokens in `mask` of the same row.

    The paper's sum grows with n squared, so the mean is taken. pairs: with "equal", the paper's,
    every pair has weight 1; with "saliency", the difference of its saliencies, so that a score
    learns the expected saliency rather than the rate of wins. Equal saliencies give no gradient.
    The pair matrix is made `chunk` rows at a time, and again in the backward pass: O(chunk * n).
    """
    n = scores.shape[1]
    m = as_mask(mask, scores)
    s = saliency.to(scores.dtype)
    if pairs == "saliency":         # in units of the row's mean
        mean = masked_mean(s, m)
        s = s / mean.clamp(min=1e-30)

    def chunk_of_pairs(scores, start):
        """The pairs whose first token is in start .. start + chunk -> summed loss, weight."""
        i = slice(start, start + chunk)
        j = slice(start, n)                     # (B, chunk, n - start): earlier j are no pairs
        difference = scores[:, i, None] - scores[:, None, j]
        above = s[:, i, None] - s[:, None, j]
        weight = m[:, i, None] * m[:, None, j]
        weight = weight.triu(1)                 # i < j, as both begin at start
        if pairs == "saliency":
            weight = weight * above.abs()
        loss = F.softplus(-difference * above.sign())  # Eq. 6
        total = (loss * weight).sum()
        return torch.stack((total, weight.sum()))

    sums = 0.0
    for start in range(0, n, chunk):
        sums = sums + checkpoint(chunk_of_pairs, scores, start, use_reentrant=False)
    total, weight = sums
    return total / weight.clamp(min=1e-9)
