"""Memory for time: what the backward pass needs of a long row is computed again, not kept."""
from torch.utils.checkpoint import checkpoint

LONG = 512          # tokens; of shorter rows everything is kept


def recomputed(block, x, *rest):
    """block(x, *rest), of which a long row, x (B, N, D), keeps only x for the backward pass."""
    if x.shape[1] <= LONG:
        return block(x, *rest)
    return checkpoint(block, x, *rest, use_reentrant=False)
