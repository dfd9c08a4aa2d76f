"""Linear layers in training on a CPU: large float32 products go to oneDNN, where PyTorch sends them to MKL.

MKL loses where a size is no multiple of 8, as the 367 inputs of Criteo Kaggle's top MLP, and where one is as small as its 13 dense features.
On one core of an AMD EPYC (Zen 4) at batch 2048, ms of x W^t + b, dz W and dz^t x; 113 GF/s is the most that either reached:
    367 -> 512   MKL 8.2  9.2  9.1   oneDNN 7.5  6.9  7.8
    512 -> 256   MKL 5.5  5.4  5.4   oneDNN 5.2  4.8  5.3
    13 -> 512    MKL 0.37  -   1.38  oneDNN 0.37  -   0.31
Small products stay with PyTorch: oneDNN takes 0.01 ms to start, and whole steps at batch 128 gained nothing from it.
"""

import torch
from torch import Tensor, nn

# oneDNN from so many rows and so many multiplications on
LEAST_ROWS, LEAST_PRODUCTS = 512, 12_000_000


def apply_layers(layers: nn.Sequential, x: Tensor) -> Tensor:
    """What layers(x) is."""
    for layer in layers:
        # a quantized layer is of another type
        x = _Linear.apply(x, layer.weight, layer.bias) if type(layer) is nn.Linear and gains(x, layer.weight) else layer(x)
    return x


def gains(x: Tensor, weight: Tensor) -> bool:
    """oneDNN's operator takes float32 tensors in the host's memory. Inference and exports, whose sizes may be symbols, keep PyTorch's."""
    return (
        weight.requires_grad and torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
        and x.shape[0] >= LEAST_ROWS and x.shape[0] * weight.nelement() >= LEAST_PRODUCTS
        and not torch.is_autocast_enabled("cpu") and torch.backends.mkldnn.is_available()
    )  # fmt: skip


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, K], b [N, K] -> a b^t + bias [M, N]. The operator is the one that torch.compile uses for nn.Linear."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight.t().contiguous().t(), bias)  # 1 to 4 % less time, the copy included

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        of_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        num_outputs, num_inputs = weight.shape
        # the shorter side of W as the rows of the result: a third of the time for 13 inputs
        of_weight = product(x.t(), grad.t()).t() if num_inputs < num_outputs else product(grad.t(), x.t())
        return of_x, of_weight, grad.sum(0)
