"""Eight exercises and three open puzzles on SDTP (arXiv 2504.04514): the student's file.

Replace each `raise NotImplementedError`. A docstring says all that is needed: the place in the paper, shapes, the rule, a line budget and an
example on four tokens, its results shown as lists rounded to four digits. Everything is fp32 on the CPU unless it says otherwise, angles of rotary
positions too; inputs must not be changed in place; results may be off by 1e-5. Import what Python and torch have. Lines are counted without the def,
docstring, comments and blank lines; two statements in one line are two.

    python -m pytest tests/test_exercises.py --impl student                # n/8, and a hint for each that fails
    python -m pytest tests/test_exercises.py --impl student -k select      # one of them
    python -m pytest tests/test_exercises.py --impl student --seed 7       # with other numbers
    python -m pytest tests/test_exercises.py --impl student --puzzles      # the puzzles' scores too
"""
import torch

from prune import Schedule


def rotate(q, pos, theta):
    """1. Rotary positions by explicit position (Section 3.4: a survivor keeps its place). At most 8 lines.

    q (B, H, n, d), d even; pos (B, n) int64, increasing in each row but with gaps where tokens were dropped, another set in each row;
    theta a float. Returns (B, H, n, d). Feature i, for i = 0 ... d/2 - 1, forms a pair with feature i + d/2. The pair of a token at position p is
    turned by the angle a = p * theta ** (-2 i / d):
        out[i]       = q[i] * cos(a) - q[i + d/2] * sin(a)
        out[i + d/2] = q[i + d/2] * cos(a) + q[i] * sin(a)

    Four tokens at positions 0, 1, 3, 4 (the one at 2 was dropped), each (1, 2, 0, 0); theta 100, so the pairs turn by p and by p / 10:
    >>> rotate(torch.tensor([[[[1.0, 2.0, 0.0, 0.0]] * 4]]), torch.tensor([[0, 1, 3, 4]]), 100.0)
    [[[[1, 2, 0, 0], [0.5403, 1.9900, 0.8415, 0.1997], [-0.9900, 1.9107, 0.1411, 0.5910], [-0.6536, 1.8421, -0.7568, 0.7788]]]]
    """
    raise NotImplementedError


def saliency(f, x, reduce):
    """2. Gradient saliency (Section 3.2, Eq. 3). At most 6 lines.

    f is a differentiable function from a state (n, D) to a scalar tensor T; x (n, D) is the state; reduce is a str. Returns (n,), without a graph.
    With g = dT/dx (n, D), the saliency of token i is
        reduce "abs_dot":  |g_i . x_i|, the absolute value of the sum over features: Eq. 3 taken literally
        reduce "norm_gx":  the Euclidean norm over features of the elementwise product g_i * x_i: where large terms of both signs cancel in the
                           sum, the norm still sees them
    The call comes under torch.no_grad(), as at inference: switch gradients on inside. x may come with an x.grad of earlier work, which must not
    get into the result.

    Four tokens, T = the sum of x squared, so g = 2 x:
    >>> saliency(lambda x: (x ** 2).sum(), torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 0.0], [1.0, -2.0]]), "norm_gx")
    [2.8284, 18, 0, 8.2462]
    >>> saliency(lambda x: x.sum(), torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 0.0], [1.0, -2.0]]), "abs_dot")
    [2, 3, 0, 1]
    """
    raise NotImplementedError


def ranking_loss(score, saliency, mask):
    """3. The pairwise ranking loss (Section 3.3, Eq. 6). At most 8 lines.

    score, saliency and mask are (B, n), the mask holds 0.0 and 1.0. Returns a scalar tensor, differentiable in score. The pairs are all i < j of
    the same row whose tokens both have mask 1. A pair's loss is
        log(1 + exp(-(score_i - score_j) * sign(saliency_i - saliency_j)))
    where sign(0) = 0: a pair of equal saliency counts log 2. The paper sums the pairs; here the result is one mean over all pairs of all
    rows, not a mean of row means. No pair at all: 0. Score differences of hundreds must come out finite.

    Four tokens, the third not in the mask, the first and the last equally salient. Pairs 0-1, 0-3, 1-3: (log(1 + e) + log 2 + log(1 + e^-2)) / 3
    >>> ranking_loss(torch.tensor([[1.0, 2.0, 9.0, 0.0]]), torch.tensor([[5.0, 3.0, 1.0, 5.0]]), torch.tensor([[1.0, 1.0, 0.0, 1.0]]))
    1.3778
    """
    raise NotImplementedError


def select(score, pos, k, prompt_len, sink, local):
    """4. Which tokens survive a stage (Section 3.4). At most 8 lines.

    score (B, n); pos (B, n) int64, the tokens' original positions, increasing, the same number of protected tokens in each row; k, prompt_len and
    sink are ints, local a float. Returns (B, k) int64: indices into the n tokens, not positions, increasing in each row. Always kept are
        the tokens at positions below sink,
        the last max(1, ceil(local * prompt_len - 1e-9)) positions of the prompt of prompt_len tokens (of the whole prompt, not of the n left),
        every token at a position of prompt_len or more (a response that follows the prompt).
    The best-scored of the others fill the rest up to k; among equal scores the earlier token wins. k is never below the number of the protected.
    The 1e-9 keeps a product like 0.07 * 100 = 7.000000000000001 from counting 8. Scores are finite.

    Four tokens left of a prompt of 6, at positions 0, 2, 3, 5. The first is a sink, the last is local; of the other two the second has more:
    >>> select(torch.tensor([[0.1, 0.2, 0.7, 0.0]]), torch.tensor([[0, 2, 3, 5]]), 3, 6, 1, 0.1)
    [[0, 2, 3]]
    """
    raise NotImplementedError


def masked_attention(q, k, v, keep):
    """5. Attention in which dropped tokens are hidden (Section 3.3; DynamicViT's mask for training). At most 10 lines.

    q, k, v (B, H, n, d); keep (B, n) holds 1.0 for kept and 0.0 for dropped tokens. Returns (B, H, n, d), differentiable in keep. With the logits
    a_ij = q_i . k_j / sqrt(d), query i sees key j only where j <= i (causal). The mask m_ij is keep_j where j != i, and the constant 1 where
    j = i, so every query sees itself. With top_i the largest a_ij among the keys with j <= i and m_ij not 0 (no gradient through top):
        e_ij  = exp(min(a_ij - top_i, 0)) * m_ij  for j <= i, else 0
        out_i = sum_j e_ij v_j / sum_j e_ij
    so the mask multiplies the exponentials before they are normalised: a kept token's output is that of attention over the kept tokens alone,
    and yet a dropped key gets a gradient through its mask. A hidden key's logit may be hundreds above all the others: top and min see to that.

    Four tokens, H = d = 1, the second dropped, all logits 0: each query takes the mean of the keys that it sees:
    >>> zero, v = torch.zeros(1, 1, 4, 1), torch.tensor([[[[1.0], [2.0], [3.0], [8.0]]]])
    >>> masked_attention(zero, zero, v, torch.tensor([[1.0, 0.0, 1.0, 1.0]]))
    [[[[1], [1.5], [2], [4]]]]
    """
    raise NotImplementedError


def tokens_per_block(n, blocks, first, step, stages, keep, sink, local):
    """6. The schedule (Section 3.4). At most 8 lines.

    n, blocks, first, step, stages and sink are ints, keep and local floats. Returns a list of `blocks` ints: how many of a prompt's n tokens enter
    block 1, 2, ... Stage s = 1 ... stages stands after block first + step * (s - 1), blocks counted from 1: the next block is the first to see
    fewer tokens. A stage that stands after the last block, or beyond, falls away. After stage s there are left
        max(protected, round(keep ** s * n))
    with Python's round: a share of the prompt, not of what is left. protected = min(n, sink + max(1, ceil(local * n - 1e-9))).

    Four tokens, six blocks, three stages after blocks 1, 3 and 5, half kept by each: 4, then 2, 1 and 0.5 by the share, but 2 are protected:
    >>> tokens_per_block(4, 6, 1, 2, 3, 0.5, 1, 0.1)
    [4, 2, 2, 2, 2, 2]
    """
    raise NotImplementedError


def flops(c, counts, accounting):
    """7. What a prefill costs (Section 4.3, Table 2). At most 8 lines.

    counts is a list: how many tokens enter each block. c has the ints c.dim (D), c.n_heads (H), c.n_kv_heads (G), c.head_dim (d), c.ffn (F, the
    width of the SwiGLU) and c.vocab (V). accounting is a str. Returns an int.
    "exact": 2 FLOPs for one multiply-add; per block of n tokens the matrices q and o (D x H d each), k and v (D x G d each: grouped-query), gate, up and down (D x F each), each
        used once per token; in attention two products of length d (q . k, and the weighted sum of v) per query head and per pair of a query and a
        key not after it, so n (n + 1) / 2 pairs. At the end the head (D x V) on the last token alone. Norms, softmax, embedding count nothing.
    "paper": Table 2's own accounting, found by fitting its baselines, to be taken as it stands: per block 2 (4 D D + 3 D F) for each of its n tokens
        and 3 D for each of n * n pairs; once 4 V D for each of the counts[0] tokens of the prompt.
    Mistral-7B (D 4096, H 32, G 8, d 128, F 14336, V 32000, 32 blocks) then has 72.516 TFLOPs at 4096 tokens and 8864.81 at 131072, where the paper
    prints 72.51 and 8864.49.

    Four tokens enter the first block, two the second; D 4, H 2, G 1, d 2, F 3, V 5:
    >>> from types import SimpleNamespace
    >>> c = SimpleNamespace(dim=4, n_heads=2, n_kv_heads=1, head_dim=2, ffn=3, vocab=5)
    >>> flops(c, [4, 2], "exact"), flops(c, [4, 2], "paper")
    (1256, 1760)
    """
    raise NotImplementedError


def decode(states, N, blocks, caches, theta):
    """8. Decode on ragged caches (Section 3.4). At most 18 lines, not counting `rotate`, which you may call.

    The prompt had N tokens. states (T, D), D even, are T new tokens, which follow it one by one: the t-th, t = 0, 1, ..., stands at position N + t,
    however few of the prompt's tokens a cache still holds. blocks is a list of L tuples (Wq, Wk, Wv, Wo) of matrices (D, D), one head, no norm and
    no SwiGLU to keep it short. caches is a list of L tuples (keys (m, D), values (m, D), positions (m,) int64), another m in each: the tokens that
    entered that block, their keys already turned to their own positions. A new token with state x goes through block after block:
        q, k, v = Wq @ x, Wk @ x, Wv @ x;  q and k are turned to the token's position as in exercise 1 (one head, d = D)
        k, v and the position join the end of the block's cache, and stay there for the tokens to come
        p = softmax over the tokens in that cache, the new one among them, of (q . key) / sqrt(D)
        x = x + Wo @ (sum of p * value)
    Returns the T states that leave the last block, (T, D), and the L caches, in the same form, each longer by T. The given caches stay as they are.

    Four tokens of the prompt, of which block 1 has cached all and block 2 the first and the last; Wq is 0, so p is uniform, and Wv and Wo are the
    identity: block 1 adds the mean of its five values, (2.2, 0.2), block 2 that of its three, (2.4, 0.4):
    >>> zero, one, keys = torch.zeros(2, 2), torch.eye(2), torch.ones(4, 2)
    >>> caches = [(keys, 2 * keys, torch.tensor([0, 1, 2, 3])), (keys[:2], keys[:2], torch.tensor([0, 3]))]
    >>> caches = [(k, v * torch.tensor([1.0, 0.0]), p) for k, v, p in caches]
    >>> x, (first, second) = decode(torch.tensor([[3.0, 1.0]]), 4, [(zero, one, one, one)] * 2, caches, 100.0)
    >>> x, first[2], second[2], second[1]
    ([[7.6000, 1.6000]], [0, 1, 2, 3, 4], [0, 3, 4], [[1, 0], [1, 0], [5.2000, 1.2000]])
    """
    raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------ open puzzles
#
# No right answer, only a score. All three prune the toy (checkpoints/toy: 12 blocks, D 128) on its twenty held-out rows, in which six
# sentences of about thirty-five say who sells what; NLL is per answer token, lower is better. Each has to run in a minute on one core.
# Another --seed draws twenty fresh prompts of the same kind: what was tuned on the first twenty shows itself there.


def puzzle_schedule():
    """a. The lowest NLL at half of the tokens. Returns a prune.Schedule.

    On average over the 12 blocks at most 50% of the prompt's tokens may enter a block; sink 4 and local 0.1 as in the paper. first, step, stages
    and keep are free, or `shares`: the share of the prompt that each stage keeps, never rising. The trained predictors score: a stage after
    block b takes those of block b (trained after 2 ... 11, and block 1 takes block 2's). Given here: a plain geometric schedule.
    """
    return Schedule(first=2, step=1, stages=10, keep=0.82)


def puzzle_predictors(predictors, model, rows):
    """b. The smallest predictors that still work: the score is the number of parameters.

    predictors: the 10 trained modules (B, n, D) -> (B, n, 2), one a stage, 44,500 numbers in all. model: the frozen toy. rows: the
    training rows, a list of Example (tokens (N,), prompt_len), if you want to fit something on them. Returns 10 modules of the same shape; one
    that stands in several places counts once. Their NLL with the toy's own schedule may be at most 0.1 above the trained ones'. A token's
    logits depend on its own state alone, and every number that was learnt is a parameter or a buffer. Given here: the predictors as they are.
    """
    return predictors


def puzzle_scorer(model):
    """c. A scorer that needs no training: lower NLL than the random choice and the norm of the hidden state.

    model: the frozen toy. Returns scorer(stage, x (B, n, D), pos (B, n)) -> (B, n), higher is kept; stages 0 ... 9 stand after blocks 2 ... 11.
    The scorer may look at all of x, and at the weights (model.blocks[i].q, .k, .attn_norm ...; model.config), but not run more than one block; no
    rows, no gradients, no trained predictors. Differences below 0.03 are noise: compare on several seeds.
    Given here: the norm.
    """
    return lambda stage, x, pos: torch.linalg.vector_norm(x, dim=-1)
