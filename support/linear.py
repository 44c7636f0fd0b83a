"""Matrix products on a CPU: few tokens on all cores, and half types without arithmetic for them.

An fp32 product of one token with a matrix runs on one core in PyTorch, so decode would read the
weights at the pace of one. Here each thread has a share of the matrix.

bfloat16 and float16 are emulated number by number where a processor lacks them: four times slower
than fp32 forward, hundreds of times backward. Here the weights stay in their half type, and a
product is computed in fp32 and rounded once, which is what a processor with bfloat16 does.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

# With fewer tokens than this, reading the weights costs more than the arithmetic.
MANY = 32
# A matrix of so many weights is worth more than one thread.
LARGE = 1 << 16


class Linear(nn.Linear):
    """nn.Linear, on every device and in every dtype, at the speed of fp32 or better."""

    def forward(self, x):
        # sizes last: torch.compile makes a graph for each side of a question about them
        if x.device.type != "cpu" or self.weight.requires_grad:
            return super().forward(x)
        if x.dtype == torch.float32:
            divide = self.weight.numel() >= LARGE and x.numel() < MANY * x.shape[-1]
            return divided(x, self.weight, self.bias) if divide else super().forward(x)
        if not emulated(x) or x.numel() < MANY * x.shape[-1] and not x.requires_grad:
            return super().forward(x)
        return Product.apply(x, self.weight, self.bias)


def divided(x, weight, bias):
    """F.linear of few tokens, the rows of the weight (out, in) divided among T threads."""
    T = math.gcd(torch.get_num_threads(), weight.shape[0])
    rows = weight.unflatten(0, (T, -1))                     # (T, out / T, in)
    tokens = x.flatten(0, -2).expand(T, -1, -1)             # (T, n, in)
    y = torch.bmm(tokens, rows.mT)                          # (T, n, out / T)
    y = y.transpose(0, 1).reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class Product(torch.autograd.Function):
    """F.linear of x (..., in), a frozen weight (out, in) and a bias or None, in fp32."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)       # as it is held, without a copy in fp32
        bias = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), bias).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        weight, = ctx.saved_tensors
        return (gradient.float() @ weight.float()).to(gradient.dtype), None, None


def emulated(x):
    """Whether this processor has no arithmetic for the type of x."""
    if x.device.type != "cpu":
        return False
    if x.dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return x.dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()
