"""Matrix products of half types on processors that have no arithmetic for them.

There PyTorch emulates bfloat16 and float16 number by number: four times slower than fp32 forward,
hundreds of times backward. Here the weights stay in their half type, and a product is computed in
fp32 and rounded once, which is what a processor with bfloat16 does.
"""
import torch
import torch.nn.functional as F
from torch import nn

# With fewer tokens than this, turning the weights into fp32 costs more than the slow product.
MANY = 32


class Linear(nn.Linear):
    """nn.Linear, on every device and in every dtype, at the speed of fp32 or better."""

    def forward(self, x):
        # the type first: torch.compile makes a graph for each side of a question about sizes
        if self.weight.requires_grad or not emulated(x):
            return super().forward(x)
        if x.numel() < MANY * x.shape[-1] and not x.requires_grad:
            return super().forward(x)
        return Product.apply(x, self.weight, self.bias)


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
