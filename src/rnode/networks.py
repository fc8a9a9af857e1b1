"""The vector field f(t, z) of a piece, and its vector-Jacobian product εᵀ∇f.

Both come from one network: layers with time as an extra input channel, softplus between them, the last layer zero at the
start so that f = 0 and the flow begins as the identity (paper, section 6).

The product is written out as the network's own second pass, a chain of transposed layers: for
f = W₃ s(W₂ s(W₁ z)), εᵀ∇f = ((εᵀW₃ · s'(a₂)) W₂ · s'(a₁)) W₁, with s' = sigmoid. Backpropagation through it costs one
pass less than through autograd's, and evaluation needs no autograd at all.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _SoftplusSigmoid(torch.autograd.Function):
    """a → (softplus(a), sigmoid(a)), keeping sigmoid(a) alone for the backward pass. Differentiable once.

    softplus(a) = relu(a) − log σ(|a|), with σ(|a|) = max(σ(a), 1 − σ(a)), costs the same in every build of torch on CPUs;
    F.softplus is a little faster where its log1p is vectorized (torch 2.15), several times slower where not (2.14).
    """

    @staticmethod
    def forward(ctx, a):
        ctx.set_materialize_grads(False)  # most evaluations use no slope: their grad_sigmoid is None, not a tensor of zeros
        sigmoid = a.sigmoid()
        ctx.save_for_backward(sigmoid)
        return a.relu().sub_(torch.maximum(sigmoid, 1 - sigmoid).log_()), sigmoid

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_softplus, grad_sigmoid):
        (sigmoid,) = ctx.saved_tensors  # softplus' = sigmoid, sigmoid' = sigmoid (1 − sigmoid)
        if grad_sigmoid is None:
            return None if grad_softplus is None else grad_softplus * sigmoid
        grad = torch.addcmul(grad_sigmoid, grad_sigmoid, sigmoid, value=-1)
        return (grad if grad_softplus is None else grad.add_(grad_softplus)).mul_(sigmoid)


def _laid_out(h: Tensor) -> Tensor:
    """Images (B, C, H, W) in channels_last order where no gradient is wanted: convolutions are faster in it then (a training
    step is not, in bfloat16 it is a third slower)."""
    return h if torch.is_grad_enabled() or h.dim() != 4 else h.clone(memory_format=torch.channels_last)


def _softplus(a: Tensor) -> Tensor:
    return _SoftplusSigmoid.apply(a)[0] if torch.is_grad_enabled() else F.softplus(a)


class TimeConv2d(nn.Conv2d):
    """3×3 convolution of (t, h): time is the first of its in_channels + 1 input channels, constant over the image.

    The time channel is the same for every sample, so its convolution is computed once and added like a bias.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels + 1, out_channels, kernel_size=3, padding=1)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """t (), h (B, in_channels, H, W) → (B, out_channels, H, W)."""
        ones = h.new_ones(1, 1, *h.shape[2:])
        time, space = self.weight[:, :1], self.weight[:, 1:]
        return F.conv2d(h, space, self.bias, padding=1).add_(t * F.conv2d(ones, time, padding=1))

    def vjp(self, g: Tensor) -> Tensor:
        """g (K, B, out_channels, H, W) → gᵀ ∂layer/∂h (K, B, in_channels, H, W)."""
        # The transposed convolution, as a convolution: several times faster where out_channels are few.
        kernel = self.weight[:, 1:].transpose(0, 1).flip(2, 3)
        return F.conv2d(g.flatten(0, 1), kernel, padding=1).unflatten(0, g.shape[:2])


class TimeLinear(nn.Linear):
    """Dense layer of (t, h): time is the first of its in_features + 1 inputs."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features + 1, out_features)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """t (), h (B, in_features) → (B, out_features)."""
        return F.linear(h, self.weight[:, 1:], self.bias + t * self.weight[:, 0])

    def vjp(self, g: Tensor) -> Tensor:
        """g (K, B, out_features) → gᵀ ∂layer/∂h (K, B, in_features)."""
        return g @ self.weight[:, 1:]


class Field(nn.Module):
    """f(t, z): `layer(size[0], size[1])`, softplus, `layer(size[1], size[2])`, … ; exactly zero at the start.

    `layer` is TimeConv2d for images (sizes are channels) or TimeLinear for vectors.
    """

    def __init__(self, layer: type[TimeConv2d] | type[TimeLinear], sizes: list[int]):
        super().__init__()
        self.layers = nn.ModuleList(layer(*pair) for pair in itertools.pairwise(sizes))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """t (), z (B, *shape) → f(z, t) (B, *shape), in z's dtype whatever the weights'."""
        *inner, last = self.layers
        h = _laid_out(z.to(last.weight.dtype))
        for layer in inner:
            h = _softplus(layer(t, h))
        return last(t, h).to(z.dtype)

    def vjp(self, t: Tensor, z: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """t (), z (B, *shape), eps (K, B, *shape) → f(z, t) (B, *shape) and εᵀ∇f for each probe (K, B, *shape)."""
        *inner, last = self.layers
        h = _laid_out(z.to(last.weight.dtype))
        slopes = []
        for layer in inner:
            h, slope = _SoftplusSigmoid.apply(layer(t, h))
            slopes.append(slope)
        g = last.vjp(_laid_out(eps.to(h.dtype).flatten(0, 1)).unflatten(0, eps.shape[:2]))
        for layer, slope in zip(reversed(inner), reversed(slopes), strict=True):
            g = layer.vjp(g * slope)
        return last(t, h).to(z.dtype), g.to(z.dtype)

    def compile(self) -> None:
        """Let torch.compile do f and εᵀ∇f from now on. Fields of one shape share what is compiled: weights are arguments."""
        self.forward, self.vjp = (torch.compile(function, dynamic=False) for function in (self.forward, self.vjp))
