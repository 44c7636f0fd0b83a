"""Memory for time: what the backward pass needs of a long row is computed again, not kept."""
from torch.utils.checkpoint import checkpoint

LARGE = 1 << 20     # kept are rows whose states have so many values: 256 tokens of a 7B model;
LONG = 512          # where attention keeps its N x N weights, also of so many tokens at most


def is_long(n, dim, quadratic=True):
    """Whether a row of n tokens in a model of this hidden size keeps too much.

    quadratic: attention keeps N x N weights, as under a mask that learns.
    """
    return n * dim > LARGE or quadratic and n > LONG


def recomputed(block, x, rope, attend=None):
    """block(x, rope, attend), of which a long row, x (B, N, D), keeps only x for the backward pass.

    attend: the attention of the masked pass; None: the marking pass, whose attention keeps no
    weights.
    """
    rest = (rope,) if attend is None else (rope, attend)
    if is_long(*x.shape[1:], quadratic=attend is not None):
        return checkpoint(block, x, *rest, use_reentrant=False)
    return block(x, *rest)
