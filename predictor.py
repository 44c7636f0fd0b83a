"""The saliency predictor and its losses (Section 3.3, Eq. 1, 2, 4, 5, 6).

Gradients are not there at inference, so at each stage a two-layer MLP reads a token's hidden state and scores it: two
logits, keep and drop. It learns the ranking that the gradient saliency gives. Nothing here knows the backbone.

Shapes: B rows, n tokens, D hidden state, S stages; scores, saliencies and masks are (B, n).
"""
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import blame
from model import DTYPES, need


def hidden_size(dim):
    """Width of the MLP: D/4 keeps all stages together under 1% of the backbone's FLOPs."""
    return max(32, dim // 4)


class Predictor(nn.Module):
    """The module of one stage: hidden states (B, n, D) -> keep and drop logits (B, n, 2), fp32.

    The states are normalised first (LayerNorm): some features of a Llama's residual stream are a hundred times
    larger than the rest, and grow with depth.
    """

    def __init__(self, dim, hidden=None):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden or hidden_size(dim))
        self.down = nn.Linear(hidden or hidden_size(dim), 2)

    def forward(self, x):
        h = self.norm(x.to(self.norm.weight.dtype))
        return self.down(F.gelu(self.up(h))).float()                 # Eq. 1


def score(logits):
    """One number per token: keep logit minus drop logit, (B, n, 2) -> (B, n)."""
    return logits[..., 0] - logits[..., 1]


def gumbel_mask(logits, tau=1.0, previous=None):
    """Sample keep (1) or drop (0) per token, (B, n, 2) -> (B, n); a token dropped before (`previous` 0) stays dropped.

    The value is hard; the gradient is that of the soft sample at temperature tau (straight-through).
    """
    noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-9, 1 - 1e-7)))
    soft = torch.softmax((logits + noise) / tau, dim=-1)[..., 0]     # Eq. 2
    return straight_through((soft > 0.5).to(soft.dtype), soft, previous)


def straight_through(hard, soft, previous=None):
    """The value of `hard` with the gradient of `soft`, times the earlier mask."""
    keep = hard + (soft - soft.detach())    # in this order exactly `hard`: the bracket is exactly 0
    return keep if previous is None else keep * previous


def mse_target(saliency, mask=None):
    """Saliency on the score's scale: its logarithm, standardised over the row's tokens (those in `mask`), cut at 3 deviations.

    The paper is silent about the scale; raw saliencies span orders of magnitude per block and per prompt.
    """
    s = saliency.float()
    m = torch.ones_like(s) if mask is None else mask.to(s.dtype)
    log = torch.log(s.clamp(min=1e-30))
    count = m.sum(-1, keepdim=True).clamp(min=1)
    mean = (log * m).sum(-1, keepdim=True) / count
    deviation = (((log - mean) ** 2 * m).sum(-1, keepdim=True) / count).sqrt()
    return ((log - mean) / deviation.clamp(min=1e-6)).clamp(-3, 3)


def mse_loss(score, saliency, mask=None):
    """Mean squared error between the score and the normalised saliency, over the tokens in `mask`; all (B, n)."""
    m = torch.ones_like(score) if mask is None else mask.to(score.dtype)
    return ((score - mse_target(saliency, mask)) ** 2 * m).sum() / m.sum().clamp(min=1)  # Eq. 4


def ranking_loss(score, saliency, mask=None, pairs="equal", chunk=1024):
    """Pairwise ranking loss, the mean over all pairs i < j of tokens in `mask` of each row; all (B, n).

    The paper's sum grows with n squared, so the mean is taken. pairs: "equal", the paper's, gives every pair the same
    weight; "saliency" weighs a pair by the difference of its saliencies, so that the best score orders tokens by their
    expected saliency and not by how often one beats another. Rows of the pair matrix are handled `chunk` at a time and
    recomputed in the backward pass, so memory is O(chunk * n). A pair of equal saliency adds no gradient.
    """
    n = score.shape[1]
    m = torch.ones_like(score) if mask is None else mask.to(score.dtype)
    s = saliency.to(score.dtype)
    if pairs == "saliency":         # each row on the scale of its own mean, so that no row outweighs the others
        s = s / ((s * m).sum(-1, keepdim=True) / m.sum(-1, keepdim=True).clamp(min=1)).clamp(min=1e-30)

    def rows(score, i):             # pairs whose first token is in rows i .. i + chunk -> their loss, their weight
        j = slice(i, n)             # earlier columns would only meet i > j
        difference = score[:, i:i + chunk, None] - score[:, None, j]
        above = s[:, i:i + chunk, None] - s[:, None, j]
        weight = (m[:, i:i + chunk, None] * m[:, None, j]).triu(1)
        if pairs == "saliency":
            weight = weight * above.abs()
        return torch.stack(((F.softplus(-difference * above.sign()) * weight).sum(), weight.sum()))  # Eq. 6

    if n <= chunk:
        total, weight = rows(score, 0)
    else:
        total, weight = sum(checkpoint(rows, score, i, use_reentrant=False) for i in range(0, n, chunk))
    return total / weight.clamp(min=1e-9)


# -------------------------------------------------------------------------------------------------------------- files


def fingerprint(config):
    """A short hash of the backbone's shape, so that predictors are not used on another model (weights are not compared)."""
    shape = {k: v for k, v in asdict(config).items() if k not in ("bos", "eos", "max_positions")}
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]


def save_tensors(path, tensors, metadata):
    """Write a safetensors file under a temporary name, then rename it: a crash leaves the previous file whole."""
    from safetensors.torch import save
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")                  # always the same: what a kill leaves is written over next time
    try:
        with temporary.open("wb") as f:
            f.write(save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata))
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:            # a full disk, a directory that cannot be written: the reason alone would not name the file
        raise OSError(f"{path}: not written ({e})") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path):
    """Read a safetensors file -> (tensors, metadata)."""
    from safetensors import SafetensorError, safe_open
    need(Path(path).is_file(), f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path}: damaged or truncated safetensors file ({e})") from None


def save_predictors(path, predictors, config, schedule, **notes):
    """Write the S modules of a model with `config`, trained for `schedule` (a prune.Schedule); notes are kept as metadata."""
    metadata = {"schedule": json.dumps(asdict(schedule)), "fingerprint": fingerprint(config), **{k: str(v) for k, v in notes.items()}}
    save_tensors(path, predictors.state_dict(), metadata)


def load_predictors(path, model, schedule=None):
    """Read predictors made for `model` -> (nn.ModuleList on its device and in its dtype, metadata: "schedule" a dict, "prior" a number).

    If a schedule is given, its stages must stand after the same blocks; another keep ratio is fine, a ranking serves any.
    """
    from prune import Schedule      # here, because prune imports this module
    tensors, metadata = load_tensors(path)
    need("schedule" in metadata and "fingerprint" in metadata, f"{path}: not a predictors file (no schedule in its metadata)")
    need(metadata["fingerprint"] == fingerprint(model.config), f"{path}: made for another model (config fingerprint {metadata['fingerprint']}, this model has {fingerprint(model.config)})")
    with blame(path, "the schedule in its metadata is damaged"):
        made = Schedule(**json.loads(metadata["schedule"]))
        metadata["schedule"], metadata["prior"] = asdict(made), float(metadata.get("prior", 0))
        need(made.stages and abs(metadata["prior"]) < 1e6, "no stage, or no prior")
    places, asked = ([s.first + s.step * i for i in range(s.stages)] for s in (made, schedule or made))
    need(asked == places, f"{path}: predictors stand after blocks {places}, the schedule asks for {asked}")
    with blame(path, f"its tensors are not those of {made.stages} predictors"):
        need(all(t.dtype in DTYPES.values() and t.isfinite().all() for t in tensors.values()), "a weight is not finite, or no floating point number")
        with torch.device("meta"):  # shapes without memory: a damaged one may be of any size
            predictors = nn.ModuleList(Predictor(model.config.dim, tensors["0.up.weight"].shape[0]) for _ in range(made.stages))
        predictors.load_state_dict(tensors, assign=True)
    return predictors.to(device=model.device, dtype=model.dtype).eval().requires_grad_(False), metadata
