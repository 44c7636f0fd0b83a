"""Nine exercises and three open puzzles on SDTP (arXiv 2504.04514): the student's file.

Replace each `raise NotImplementedError`. The docstring states all that the exercise needs: the
place in the paper, the shapes, the rule, a line budget and a small example. The results of an
example are shown as lists of numbers, rounded to four digits.

These rules hold for all exercises:
- There is one prompt at a time, and so no batch dimension.
- Tensors are fp32 on the CPU unless the docstring says otherwise. So are the angles of rotary
  positions.
- A result is what the docstring names: an int is no float, a tensor no list of tensors.
- Inputs must not be changed in place.
- Results may be off by 1e-5 (exercise 9: 1e-4).
- A call may take ten seconds. The right ones take some milliseconds.
- You may import what Python and torch have, but no module of the repository: `Schedule` is for
  the puzzle alone.
- The lines of a function and of the helpers that it calls are counted, and said. Each statement is
  a line, of more than 100 columns two or more. Its def, docstrings, comments and blank lines do not
  count. An answer over its budget passes, but its line says so.

Run them from the root of the repository:

    python -m pytest tests/test_exercises.py --impl student             # n/9, hints for what fails
    python -m pytest tests/test_exercises.py --impl student -k select   # one exercise
    python -m pytest tests/test_exercises.py --impl student --seed 7    # with other numbers
    python -m pytest tests/test_exercises.py --impl student --puzzles   # the puzzles' scores too,
                                                                        # in about a minute

A right answer is drawn: the picture shows what your own function returned.
"""
import torch

from prune import Schedule


def rotate(q, pos, theta):
    """1. Rotary positions by explicit position (Section 3.4). At most 7 lines.

    A token that survives a drop keeps its place.

    q (H, n, d), d even; pos (n,) int64; theta a float. Returns (H, n, d).
    The positions increase. They have gaps where tokens were dropped, and are the same in all heads.

    Feature i forms a pair with feature i + d/2, for i = 0 ... d/2 - 1. The pair of a token at
    position p is turned by the angle a = p * theta ** (-2 i / d):
        out[i]       = q[i] * cos(a) - q[i + d/2] * sin(a)
        out[i + d/2] = q[i + d/2] * cos(a) + q[i] * sin(a)

    Four tokens stand at positions 0, 1, 3, 4; the one at 2 was dropped. Each is (1, 2, 0, 0). With
    theta 100 the first pair turns by p, the second by p / 10:
    >>> q = torch.tensor([[[1.0, 2.0, 0.0, 0.0]] * 4])
    >>> rotate(q, torch.tensor([0, 1, 3, 4]), 100.0)
    [[[1, 2, 0, 0],
      [0.5403, 1.9900, 0.8415, 0.1997],
      [-0.9900, 1.9107, 0.1411, 0.5910],
      [-0.6536, 1.8421, -0.7568, 0.7788]]]
    """
    raise NotImplementedError


def saliency(f, x, reduce):
    """2. Gradient saliency (Section 3.2, Eq. 3). At most 6 lines.

    f is a differentiable function from a state (n, D) to a scalar tensor T; x (n, D) is the state;
    reduce is a str. Returns (n,), without a graph.

    The gradient is g = dT/dx (n, D). The saliency of token i is
        reduce "abs_dot":  |g_i . x_i|, the absolute value of the sum over features of g_i * x_i.
                           This is our reading of Eq. 3's product as one number per token.
        reduce "norm_gx":  the Euclidean norm over features of the elementwise product g_i * x_i.
                           Large terms of both signs cancel in the sum; the norm still sees them.

    The function is called under torch.no_grad(), as at inference: switch gradients on inside.
    x may come with an x.grad of earlier work. That must not get into the result, and both
    x.grad and x.requires_grad stay as they were.

    Four tokens. T is the sum of x squared, so g = 2 x; then T is the sum of x, so g = 1:
    >>> x = torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 0.0], [1.0, -2.0]])
    >>> saliency(lambda x: (x ** 2).sum(), x, "norm_gx")
    [2.8284, 18, 0, 8.2462]
    >>> saliency(lambda x: x.sum(), x, "abs_dot")
    [2, 3, 0, 1]
    """
    raise NotImplementedError


def ranking_loss(score, saliency):
    """3. The pairwise ranking loss (Section 3.3, Eq. 6). At most 7 lines.

    score and saliency are (n,). Returns a scalar tensor that is differentiable in score.

    The pairs are all i < j. A pair's loss is
        log(1 + exp(-(score_i - score_j) * sign(saliency_i - saliency_j)))
    where sign(0) = 0: a pair of equal saliency counts log 2.

    The paper sums the pairs. Here the result is their mean. Without any pair it is 0. Score
    differences of hundreds must come out finite.

    Three tokens, of which the first and the last are equally salient. The pairs are 0-1, 0-2 and
    1-2, so the loss is (log(1 + e) + log 2 + log(1 + e^2)) / 3:
    >>> ranking_loss(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([5.0, 3.0, 5.0]))
    1.3778
    """
    raise NotImplementedError


def select(score, pos, k, N, sink, local):
    """4. Which tokens survive a stage (Section 3.4). At most 8 lines.

    score (n,), finite; pos (n,) int64, the tokens' original positions, increasing; k, N and sink
    are ints, local is a float. The prompt had N tokens; n of them are left. Returns (k,) int64:
    indices into the n tokens, not positions, increasing.

    Three kinds of tokens are protected, that is, always kept:
        - those at positions below sink;
        - those at the last max(1, ceil(local * N - 1e-9)) positions of the prompt. This is a share
          of the whole prompt, not of the tokens that are left;
        - those at a position of N or more: a response that follows the prompt.
    Not every such position needs to have a token: what counts is pos, not the index.
    The best-scored of the others fill the rest up to k. Among equal scores the earlier token wins.

    k is never below the number of protected tokens. The 1e-9 keeps a product like
    0.07 * 100 = 7.000000000000001 from counting 8.

    Four tokens are left of a prompt of 6, at positions 0, 2, 3, 5. The first is a sink, the last
    is local. Of the other two the second has the higher score:
    >>> score, pos = torch.tensor([0.1, 0.2, 0.7, 0.0]), torch.tensor([0, 2, 3, 5])
    >>> select(score, pos, 3, 6, 1, 0.1)
    [0, 2, 3]
    """
    raise NotImplementedError


def masked_attention(q, k, v, keep):
    """5. Attention in which dropped tokens are hidden (Section 3.3). At most 10 lines.

    This is how training prunes, with the mask of DynamicViT.

    q, k, v (H, n, d); keep (n,) holds 1.0 for kept and 0.0 for dropped tokens. Returns (H, n, d),
    differentiable in keep, and in q and k too: a later block's depend on the mask of an earlier
    one.

    The logits are a_ij = q_i . k_j / sqrt(d). Query i sees key j only where j <= i (causal). The
    mask is m_ij = keep_j where j != i, and the constant 1 where j = i, so every query sees itself.
    With S_i the logarithm of the sum of exp(a_ij) over the keys that query i sees, those with
    j <= i and m_ij not 0 (no gradient through S), and x_ij = a_ij - S_i:
        e_ij  = exp(x_ij) * m_ij      for a key that is seen
                sigmoid(x_ij) * m_ij  for a hidden one with j <= i, and 0 for j > i
        out_i = sum_j e_ij v_j / sum_j e_ij

    So the mask multiplies the exponentials before they are normalised. A kept token's output is
    that of attention over the kept tokens alone, and yet a dropped key gets a gradient through its
    mask: what its being seen would change. A hidden key's logit may be hundreds above all others,
    where exp(x) overflows: let torch.where choose before the exponential, between x and
    torch.nn.functional.logsigmoid(x).

    Four tokens, H = d = 1. The second is dropped, all logits are 0: each query takes the mean of
    the keys that it sees:
    >>> zero, v = torch.zeros(1, 4, 1), torch.tensor([[[1.0], [2.0], [3.0], [8.0]]])
    >>> masked_attention(zero, zero, v, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    [[[1], [1.5], [2], [4]]]
    """
    raise NotImplementedError


def tokens_per_block(n, blocks, first, step, stages, keep, sink, local):
    """6. The schedule (Section 3.4). At most 8 lines.

    n, blocks, first, step, stages and sink are ints, keep and local are floats. Returns a list of
    `blocks` ints: how many of a prompt's n tokens enter block 1, 2, ...

    Blocks are counted from 1. Stage s = 1 ... stages stands after block first + step * (s - 1), so
    the next block is the first to see fewer tokens. A stage falls away if it would stand after the
    last block or later. After stage s there are left
        max(protected, round(keep ** s * n))
    with Python's round. This is a share of the prompt, not of what is left. Protected are
        protected = min(n, sink + max(1, ceil(local * n - 1e-9)))

    Ten tokens, six blocks, three stages after blocks 1, 3 and 5; keep is 0.5. By the share alone 5,
    2 (Python rounds 2.5 to the even number) and 1 would be left, but 2 are protected:
    >>> tokens_per_block(10, 6, 1, 2, 3, 0.5, 1, 0.1)
    [10, 5, 5, 2, 2, 2]
    """
    raise NotImplementedError


def flops(c, counts, accounting):
    """7. What a prefill costs (Section 4.3, Table 2). At most 8 lines.

    counts is a list of ints: how many tokens enter each block. accounting is a str. Returns an int,
    not a float.
    c has the ints c.dim (D), c.n_heads (H), c.n_kv_heads (G), c.head_dim (d), c.ffn (F, the width
    of the SwiGLU) and c.vocab (V).

    "exact" counts 2 FLOPs for one multiply-add:
        - In a block of n tokens each matrix is used once per token: q and o (D x H d each), k and
          v (D x G d each: grouped-query), gate, up and down (D x F each).
        - Attention has two products of length d, q . k and the weighted sum of v, per query head
          and per pair of a query and a key not after it: n (n + 1) / 2 pairs.
        - The head (D x V) is used once, on the last token.
        - Norms, softmax and embedding count nothing.
    "paper" is Table 2's own accounting, found by fitting its baselines. Take it as it stands:
        - A block of n tokens has 2 (4 D D + 3 D F) for each token and 3 D for each of n * n pairs.
        - Each of the counts[0] tokens of the prompt adds 4 V D, once.
    By it Mistral-7B (D 4096, H 32, G 8, d 128, F 14336, V 32000, 32 blocks) has 72.516 TFLOPs at
    4096 tokens and 8864.81 at 131072. The paper prints 72.51 and 8864.49.

    Four tokens enter the first block, two the second; D 4, H 2, G 1, d 2, F 3, V 5:
    >>> from types import SimpleNamespace
    >>> c = SimpleNamespace(dim=4, n_heads=2, n_kv_heads=1, head_dim=2, ffn=3, vocab=5)
    >>> flops(c, [4, 2], "exact"), flops(c, [4, 2], "paper")
    (1256, 1760)
    """
    raise NotImplementedError


def decode(states, N, blocks, caches, theta):
    """8. Decode on ragged caches (Section 3.4). At most 15 lines.

    `rotate` of exercise 1 does not count: you may call it.

    The prompt had N tokens. states (T, D), D even, are T new tokens that follow it one by one. The
    t-th, t = 0, 1, ..., stands at position N + t, however few of the prompt's tokens a cache still
    holds.
    blocks is a list of L tuples (Wq, Wk, Wv, Wo) of matrices (D, D): one head, no norm and no
    SwiGLU, to keep it short.
    caches is a list of L tuples (keys (m, D), values (m, D), positions (m,) int64), another m in
    each. They are the tokens that entered that block. Their keys are turned to their own positions
    already.

    A new token with state x goes through block after block:
        q, k, v = Wq @ x, Wk @ x, Wv @ x
        q and k are turned to the token's position as in exercise 1 (one head, d = D)
        k, v and the position join the end of the block's cache, and stay for the tokens to come
        p = softmax of (q . key) / sqrt(D) over the tokens in that cache, the new one among them
        x = x + Wo @ (sum of p * value)
    Returns a tuple: the T states that leave the last block, a tensor (T, D), and the L caches, in
    the same form (a list of L tuples), each longer by T. The given caches stay as they are.

    The prompt has four tokens. Block 1 has cached all of them, block 2 the first and the last. Wq
    is 0, so p is uniform; Wv and Wo are the identity. Block 1 adds the mean of its five values,
    (2.2, 0.2), block 2 that of its three, (2.4, 0.4):
    >>> zero, one, keys = torch.zeros(2, 2), torch.eye(2), torch.ones(4, 2)
    >>> twos, ones = torch.tensor([[2.0, 0.0]] * 4), torch.tensor([[1.0, 0.0]] * 2)
    >>> cache_1 = keys, twos, torch.tensor([0, 1, 2, 3])
    >>> cache_2 = keys[:2], ones, torch.tensor([0, 3])
    >>> new, blocks = torch.tensor([[3.0, 1.0]]), [(zero, one, one, one)] * 2
    >>> x, (first, second) = decode(new, 4, blocks, [cache_1, cache_2], 100.0)
    >>> x
    [[7.6000, 1.6000]]
    >>> first[2], second[2]
    ([0, 1, 2, 3, 4], [0, 3, 4])
    >>> second[1]
    [[1, 0], [1, 0], [5.2000, 1.2000]]
    """
    raise NotImplementedError


def prefill(x, blocks, scorer, schedule, theta):
    """9. Prune while reading (Section 3.4). At most 16 lines.

    This is where exercises 6, 4 and 1 meet: call `tokens_per_block`, `select` and `rotate`, which
    do not count. When it is right, it reads the toy's story, and six questions are answered from
    the caches that it returns.

    x (N, D) are the states of a prompt's N tokens, at positions 0 ... N - 1.
    schedule is a tuple of exercise 6's (first, step, stages, keep, sink, local).
    scorer(s, x, pos) gives the scores (n,) of n tokens with states x (n, D) and positions pos (n,)
    int64 at stage s = 1, 2, ...
    blocks is a list of L blocks, with one state for each token that is still there:
        q, k, v = block.project(x)      q (H, n, d), k and v (G, n, d), not turned yet
        q and k are turned to their tokens' positions, as in exercise 1
        k (turned), v (not) and the positions are the block's cache, (k, v, pos)
        y (H, n, d) is attention: query i sees the keys j <= i, with the softmax of q . k / sqrt(d);
        head h of q reads head h // (H // G) of k and v. torch.nn.functional's
        scaled_dot_product_attention does it all, with is_causal and enable_gqa.
        x = block.finish(x, y)          (n, D)

    Stage s stands after block first + step * (s - 1). It scores the states that leave this block.
    How many tokens stay is how many enter the next block by exercise 6; exercise 4 chooses them.
    The others leave x for good, and so the later caches. A stage where nothing is to be dropped
    has its number s all the same.

    Returns a tuple: the state (D,) of the prompt's last token as it leaves the last block, and the
    L caches, a list of tuples.

    Four tokens, two blocks with a stage between them; half stay, of which the first is a sink and
    the last is local. The blocks add a token's value, which is its state, once:
    >>> from types import SimpleNamespace
    >>> same = lambda x: (torch.zeros(1, len(x), 2), torch.zeros(1, len(x), 2), x[None])
    >>> blocks = [SimpleNamespace(project=same, finish=lambda x, y: x + y[0])] * 2
    >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [2.0, 4.0]])
    >>> scorer = lambda s, x, pos: x[:, 0]
    >>> last, (one, two) = prefill(x, blocks, scorer, (1, 1, 1, 0.5, 1, 0.1), 9.0)
    >>> last, two[1]
    ([7, 7.5000], [[[2, 0], [4, 5]]])
    >>> one[2], two[2]
    ([0, 1, 2, 3], [0, 3])
    """
    raise NotImplementedError


# ----------------------------------------------------------------------------------- open puzzles
#
# There is no right answer, only a score. All three prune the toy (checkpoints/toy: 12 blocks,
# D 128) on its twenty held-out rows. In each row six sentences of 131 say who sells what. The NLL
# is per answer token; lower is better. Each puzzle has to run in a minute on one core; as given
# here all three together take less than a minute. Another --seed draws twenty fresh prompts of the
# same kind: what was tuned on the first twenty shows itself there.


def puzzle_schedule():
    """a. The lowest NLL at half of the tokens. Returns a prune.Schedule.

    On average over the 12 blocks at most 50% of the prompt's tokens may enter a block. sink is 4
    and local is 0.1, as in the paper. You choose first, step, stages and keep.

    The trained predictors score. They were trained for stages after blocks 2 ... 11, and a stage
    takes the one of its own block; a stage after block 1 takes that of block 2.

    Given here: a plain geometric schedule.
    """
    return Schedule(first=2, step=1, stages=10, keep=0.82)


def puzzle_predictors(predictors, model, rows):
    """b. The smallest predictors that still work: the score is the number of parameters.

    predictors are the 10 trained modules (1, n, D) -> (1, n, 2), one a stage, with 44,500 numbers
    in all. model is the frozen toy. rows are the training rows, a list of Example (tokens (N,),
    prompt_len), if you want to fit something on them.

    Returns 10 modules of the same shape; one that stands in several places counts once. Their NLL
    with the toy's own schedule may be at most 0.1 above the trained ones'. A token's logits depend
    on its own state alone, and every number that was learnt is a parameter or a buffer.

    Given here: the predictors as they are.
    """
    return predictors


def puzzle_scorer(model):
    """c. A scorer without training that beats the random choice and the norm of the hidden state.

    model is the frozen toy. Returns scorer(s, x (1, n, D), pos (1, n)) -> (1, n); the tokens of
    the highest scores are kept. Stages s = 1 ... 10 stand after blocks 2 ... 11.

    The scorer may look at all of x and at the weights (model.blocks[i].q, .k, .attn_norm ...;
    model.config), and run one block at most. It gets no rows, no gradients and no trained
    predictors. The score is the NLL. Differences below 0.03 are noise: compare on several seeds.

    Given here: the norm.
    """
    return lambda s, x, pos: torch.linalg.vector_norm(x, dim=-1)
