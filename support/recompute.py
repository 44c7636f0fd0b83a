"""Memory for time: what the backward pass needs of a long row is computed again, not kept."""
from torch.utils.checkpoint import checkpoint

LONG = 512          # of rows of at most so many tokens everything is kept,
LARGE = 1 << 20     # if their states have at most so many values: 256 tokens of a 7B model


def is_long(n, dim):
    """Whether a row of n tokens in a model of this hidden size keeps too much."""
    return n > LONG or n * dim > LARGE


def recomputed(block, x, *rest):
    """block(x, *rest), of which a long row, x (B, N, D), keeps only x for the backward pass."""
    if is_long(*x.shape[1:]):
        return checkpoint(block, x, *rest, use_reentrant=False)
    return block(x, *rest)
