"""The vector field f(z, t) of a piece and its vector-Jacobian product εᵀ∇f.

The layers have time as an extra input channel, and softplus between them. For a density of x given
c, the numbers c are further inputs of every layer, as time is. The last layer starts at
zero, so f = 0 and the flow starts as the identity (paper, section 6). The other layers start by
He's initialization if they are dense. Convolutions see a softplus that is centred, and start with
variance 1/fan_in. Of the starts that were tried, these learn fastest (docs/beyond.md). Torch's
default shrinks a signal to 0.3 of itself in each layer, and a young flow would stay nearly linear.

The product is a chain of transposed layers. For f = W₃ s(W₂ s(W₁ z)), it is
εᵀ∇f = ((εᵀW₃ · s'(a₂)) W₂ · s'(a₁)) W₁ with s' = sigmoid. Backpropagation through it costs one
pass less than through autograd's product.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _SoftplusSigmoid(torch.autograd.Function):
    """a → (softplus(a), sigmoid(a)). Saves only sigmoid(a) for backward.

    On CPUs, softplus(a) = relu(a) − log σ(|a|) with σ(|a|) = max(σ(a), 1 − σ(a)) has the same speed
    in every build of torch. F.softplus is several times slower where log1p is not vectorized
    (torch 2.14) and a little faster where it is (torch 2.15). On a GPU it is one kernel for five.
    """

    @staticmethod
    def forward(ctx, a):
        # Most evaluations do not use the slope: grad_sigmoid is then None, not a tensor of zeros.
        ctx.set_materialize_grads(False)
        sigmoid = a.sigmoid()
        ctx.save_for_backward(sigmoid)
        if a.device.type == "cpu":
            return a.relu().sub_(torch.maximum(sigmoid, 1 - sigmoid).log_()), sigmoid
        with torch.autocast(a.device.type, enabled=False):  # it would return float32
            return F.softplus(a), sigmoid

    @staticmethod
    def backward(ctx, grad_softplus, grad_sigmoid):
        (sigmoid,) = ctx.saved_tensors  # softplus' = sigmoid, sigmoid' = sigmoid (1 − sigmoid)
        if grad_sigmoid is None:
            return None if grad_softplus is None else grad_softplus * sigmoid
        grad = torch.ops.aten.sigmoid_backward(grad_sigmoid, sigmoid)
        return grad if grad_softplus is None else grad.addcmul_(grad_softplus, sigmoid)


def transforms_active() -> bool:
    """Whether torch.func transforms the code that runs."""
    return torch._C._are_functorch_transforms_active()


def _softplus_sigmoid(a: Tensor) -> tuple[Tensor, Tensor]:
    if transforms_active():  # they need operators that torch can transform
        return F.softplus(a), a.sigmoid()
    return _SoftplusSigmoid.apply(a)


def _softplus(a: Tensor) -> Tensor:
    if torch.is_grad_enabled() or a.device.type == "cpu":  # where F.softplus may be slow
        return _softplus_sigmoid(a)[0]
    return F.softplus(a)


class Weights(NamedTuple):
    """The weights of a layer, laid out once for all evaluations of a solve."""

    bias: Tensor
    time: Tensor  # what t is multiplied by
    context: Any  # what c is multiplied by; None if a convolution has no c
    h: Tensor
    transposed: Tensor  # that of h, for the product


def centred(weights: Weights) -> Weights:
    """Let a layer see h − log 2, with h = softplus(a): it is 0 at a = 0, and its mean is near 0.

    This changes the bias b to b − log 2 Σ w, so the layer represents the same functions. But the
    gradient for w is that of inputs whose mean is near 0, and training is faster.
    """
    shift = math.log(2) * weights.h.flatten(1).sum(1)
    return weights._replace(bias=weights.bias - shift.view_as(weights.bias))


class TimeConv2d(nn.Conv2d):
    """3×3 convolution of (t, c, h). Its input channels are 1, `context` and in_channels.

    Time and c are constant channels. Their convolutions are the same maps for every sample and
    time, to be multiplied by t and c, and are added like a bias.
    """

    def __init__(self, in_channels: int, out_channels: int, context: int = 0):
        super().__init__(1 + context + in_channels, out_channels, kernel_size=3, padding=1)
        self.context = context

    def prepare(self, size: Sequence[int]) -> Weights:
        """The weights for images of `size` (H, W)."""
        channels = self.in_channels - 1 - self.context
        time, given, space = self.weight.split((1, self.context, channels), dim=1)
        ones, maps = time.new_ones(1, 1, *size), None
        if self.context:  # a map of each output and number
            maps = F.conv2d(ones, given.flatten(0, 1)[:, None], padding=1)
            maps = maps.view(self.out_channels, self.context, *size)
        # The transposed convolution as a convolution: several times faster for few out_channels.
        transposed = space.transpose(0, 1).flip(2, 3)
        bias = self.bias[:, None, None]  # ty: ignore[not-subscriptable]
        return Weights(bias, F.conv2d(ones, time, padding=1), maps, space, transposed)

    def forward(self, weights: Weights, t: Tensor, h: Tensor, c: Tensor | None = None) -> Tensor:
        """t (), h (B, in_channels, H, W), c (B, context) → (B, out_channels, H, W)."""
        out = F.conv2d(h, weights.h, padding=1)
        out = out.add_(torch.addcmul(weights.bias, t, weights.time))
        return out if c is None else out + torch.einsum("bk,okhw->bohw", c, weights.context)

    def vjp(self, weights: Weights, g: Tensor) -> Tensor:
        """g (K, B, out_channels, H, W) → gᵀ ∂layer/∂h (K, B, in_channels, H, W)."""
        product = F.conv2d(g.flatten(0, 1), weights.transposed, padding=1)
        return product.unflatten(0, g.shape[:2])


class TimeLinear(nn.Linear):
    """Dense layer of (t, c, h). Its inputs are 1, `context` and in_features."""

    def __init__(self, in_features: int, out_features: int, context: int = 0):
        super().__init__(1 + context + in_features, out_features)
        self.context = context

    def prepare(self, size: Sequence[int]) -> Weights:
        """The weights; `size` is that of images, and empty."""
        features = self.in_features - 1 - self.context
        time, given, space = self.weight.split((1, self.context, features), dim=1)
        return Weights(self.bias, time[:, 0], given, space, space.T)

    def forward(self, weights: Weights, t: Tensor, h: Tensor, c: Tensor | None = None) -> Tensor:
        """t (), h (B, in_features), c (B, context) → (B, out_features)."""
        out = F.linear(h, weights.h, torch.addcmul(weights.bias, t, weights.time))
        return out if c is None else out + F.linear(c, weights.context)

    def vjp(self, weights: Weights, g: Tensor) -> Tensor:
        """g (K, B, out_features) → gᵀ ∂layer/∂h (K, B, in_features)."""
        return F.linear(g, weights.transposed)


LayerType = type[TimeConv2d] | type[TimeLinear]


class Field(nn.Module):
    """The network f(z, t), with softplus between its layers. It starts as exactly zero.

    Args:
        layer: TimeConv2d for images (the sizes are channels) or TimeLinear for vectors.
        sizes: sizes of z, of the hidden layers and of f.
        context: number of the numbers c on which the density is conditioned.
    """

    layers: Sequence[TimeConv2d | TimeLinear]

    def __init__(self, layer: LayerType, sizes: list[int], context: int = 0):
        super().__init__()
        self.centred = layer is TimeConv2d
        layers = [layer(*pair, context) for pair in itertools.pairwise(sizes)]
        self.layers = nn.ModuleList(layers)  # ty: ignore[invalid-assignment]
        for inner in layers[:-1]:
            nn.init.kaiming_normal_(inner.weight, nonlinearity="linear" if self.centred else "relu")
            nn.init.zeros_(inner.bias)  # ty: ignore[invalid-argument-type]
        for parameter in layers[-1].parameters():
            nn.init.zeros_(parameter)

    def prepare(self, z: Tensor) -> list[Weights]:
        """Lay out the weights of the layers for evaluations at states like z (B, *shape).

        A solve does it once. At each evaluation, it took a tenth of the time of small networks.
        """
        with torch.autocast(z.device.type, enabled=False):  # gradients are summed in full precision
            first, *others = [layer.prepare(z.shape[2:]) for layer in self.layers]
            return [first, *map(centred, others)] if self.centred else [first, *others]

    def forward(
        self, t: Tensor, z: Tensor, *c: Tensor, weights: list[Weights] | None = None
    ) -> Tensor:
        """t (), z (B, *shape), c (B, context) if any → f(z, t) (B, *shape), in the dtype of z."""
        *inner, (last, w_last) = zip(self.layers, weights or self.prepare(z), strict=True)
        h = z.to(w_last.h.dtype)
        given = [part.to(h.dtype) for part in c]
        for layer, w in inner:
            h = _softplus(layer(w, t, h, *given))
        return last(w_last, t, h, *given).to(z.dtype)

    def vjp(
        self, t: Tensor, z: Tensor, eps: Tensor, *c: Tensor, weights: list[Weights] | None = None
    ) -> tuple[Tensor, Tensor]:
        """t (), z (B, *shape), eps (K, B, *shape) → f(z, t) (B, *shape) and εᵀ∇f (K, B, *shape)."""
        *inner, (last, w_last) = zip(self.layers, weights or self.prepare(z), strict=True)
        h = z.to(w_last.h.dtype)
        given = [part.to(h.dtype) for part in c]
        slopes = []
        for layer, w in inner:
            h, slope = _softplus_sigmoid(layer(w, t, h, *given))
            slopes.append(slope)
        f = last(w_last, t, h, *given)
        g = last.vjp(w_last, eps.to(h.dtype))
        for (layer, w), slope in zip(reversed(inner), reversed(slopes), strict=True):
            g = layer.vjp(w, g * slope)
        return f.to(z.dtype), g.to(z.dtype)

    def compile(self) -> None:
        """Compile f and εᵀ∇f by torch.compile. Fields of one shape share the compiled code."""
        self.forward = torch.compile(self.forward, dynamic=False)
        self.vjp = torch.compile(self.vjp, dynamic=False)
