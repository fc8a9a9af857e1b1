"""The vector field f(z, t; c) of a piece, its vector-Jacobian product εᵀ∇f, and its divergence.

Every layer has time t, and the numbers c on which the density is conditioned, as further inputs.
Softplus stands between the layers. The last layer is initialized to zero, so f = 0 and the flow
starts as the identity (paper, section 6). The other layers have He's initialization if they are
dense. Convolutions see a centred softplus and are initialized with variance 1/fan_in. Torch's
default initialization shrinks activations by a factor of 0.3 per layer, so a young flow would stay
nearly linear.

For f = W₃ s(W₂ s(W₁ z)), the vjp is a chain of transposed layers,
εᵀ∇f = ((εᵀW₃ · s'(a₂)) W₂ · s'(a₁)) W₁ with s' = sigmoid. Backpropagation through it costs one
pass less than through autograd's vjp. If the layers are dense, the trace of the same product is
div f = s'(a₂)ᵀ (W₂ ∘ (W₁W₃)ᵀ) s'(a₁), which costs no more than one layer.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

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


def softplus_sigmoid(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return softplus(a) and its derivative."""
    if torch._C._are_functorch_transforms_active():  # private: torch.func has no public test
        return F.softplus(a), a.sigmoid()  # it transforms operators, not an autograd function
    return _SoftplusSigmoid.apply(a)


class Weights(NamedTuple):
    """The weights of a layer, laid out once for all evaluations of a solve."""

    bias: Tensor
    time: Tensor  # multiplied by t
    c: Tensor  # multiplied by c
    h: Tensor  # of the layer's input h
    transposed: Tensor  # that of h, for the vjp


def centred(weights: Weights) -> Weights:
    """Let a layer see h − log 2, with h = softplus(a): it is 0 at a = 0, and its mean is near 0.

    This changes the bias b to b − log 2 Σ w, so the layer represents the same functions. But the
    gradient for w is that of inputs whose mean is near 0, and training is faster.
    """
    shift = math.log(2) * weights.h.flatten(1).sum(1)
    return weights._replace(bias=weights.bias - shift.view_as(weights.bias))


class TimeConv2d(nn.Conv2d):
    """3×3 convolution of (t, c, h). Its input channels are 1, k and in_channels.

    Time and c are constant channels. Their convolutions are the same maps for every sample and
    time, which are multiplied by t and c and added like a bias.
    """

    def __init__(self, in_channels: int, out_channels: int, k: int = 0):
        super().__init__(1 + k + in_channels, out_channels, kernel_size=3, padding=1)
        self.k = k

    def prepare(self, size: Sequence[int]) -> Weights:
        """The weights for images of `size` (H, W)."""
        time, c, space = self.weight.split((1, self.k, self.in_channels - 1 - self.k), dim=1)
        ones = time.new_ones(1, 1, *size)
        maps = c.new_zeros(self.out_channels, self.k, *size)
        if self.k:
            maps = F.conv2d(ones, c.flatten(0, 1)[:, None], padding=1).view_as(maps)
        # The transposed convolution as a convolution: several times faster for few out_channels.
        transposed = space.transpose(0, 1).flip(2, 3)
        bias = self.bias[:, None, None]  # ty: ignore[not-subscriptable]
        return Weights(bias, F.conv2d(ones, time, padding=1), maps, space, transposed)

    def forward(self, weights: Weights, t: Tensor, h: Tensor, c: Tensor) -> Tensor:
        """t (), h (B, in_channels, H, W), c (B, k) → (B, out_channels, H, W)."""
        out = F.conv2d(h, weights.h, padding=1)
        out = out.add_(torch.addcmul(weights.bias, t, weights.time))
        return out + torch.einsum("bk,okhw->bohw", c, weights.c) if self.k else out

    def vjp(self, weights: Weights, g: Tensor) -> Tensor:
        """g (K, B, out_channels, H, W) → gᵀ ∂layer/∂h (K, B, in_channels, H, W)."""
        product = F.conv2d(g.flatten(0, 1), weights.transposed, padding=1)
        return product.unflatten(0, g.shape[:2])


class TimeLinear(nn.Linear):
    """Dense layer of (t, c, h). Its inputs are 1, k and in_features."""

    def __init__(self, in_features: int, out_features: int, k: int = 0):
        super().__init__(1 + k + in_features, out_features)
        self.k = k

    def prepare(self, size: Sequence[int]) -> Weights:
        """The weights; `size` is that of images, and empty."""
        time, c, space = self.weight.split((1, self.k, self.in_features - 1 - self.k), dim=1)
        return Weights(self.bias, time[:, 0], c, space, space.T)

    def forward(self, weights: Weights, t: Tensor, h: Tensor, c: Tensor) -> Tensor:
        """t (), h (B, in_features), c (B, k) → (B, out_features)."""
        out = F.linear(h, weights.h, torch.addcmul(weights.bias, t, weights.time))
        return out + F.linear(c, weights.c) if self.k else out

    def vjp(self, weights: Weights, g: Tensor) -> Tensor:
        """g (K, B, out_features) → gᵀ ∂layer/∂h (K, B, in_features)."""
        return F.linear(g, weights.transposed)


LayerType = type[TimeConv2d] | type[TimeLinear]


class Field(nn.Module):
    """The network f(z, t; c), with softplus between its layers. It is initialized to zero.

    Args:
        layer: TimeConv2d for images (the sizes are channels) or TimeLinear for vectors.
        sizes: sizes of z, of the hidden layers and of f.
        k: number of the numbers c on which the density is conditioned.
    """

    layers: Sequence[TimeConv2d | TimeLinear]

    def __init__(self, layer: LayerType, sizes: list[int], k: int = 0):
        super().__init__()
        self.centred = layer is TimeConv2d
        self.has_divergence = layer is TimeLinear and len(sizes) == 4
        layers = [layer(*pair, k) for pair in itertools.pairwise(sizes)]
        self.layers = nn.ModuleList(layers)  # ty: ignore[invalid-assignment]
        for inner in layers[:-1]:
            nn.init.kaiming_normal_(inner.weight, nonlinearity="linear" if self.centred else "relu")
            nn.init.zeros_(inner.bias)  # ty: ignore[invalid-argument-type]
        for parameter in layers[-1].parameters():
            nn.init.zeros_(parameter)

    def prepare(self, z: Tensor) -> list[Weights]:
        """Lay out the weights of the layers for evaluations at states like z (B, *shape).

        In each evaluation anew, this would take a tenth of the time of small networks.
        """
        with torch.autocast(z.device.type, enabled=False):  # gradients are summed in full precision
            first, *others = [layer.prepare(z.shape[2:]) for layer in self.layers]
            return [first, *map(centred, others)] if self.centred else [first, *others]

    def forward(
        self, t: Tensor, z: Tensor, c: Tensor, weights: list[Weights] | None = None
    ) -> Tensor:
        """t (), z (B, *shape), c (B, k) → f(z, t; c) (B, *shape), in the dtype of z."""
        return self._evaluate(t, z, c, weights or self.prepare(z))[0].to(z.dtype)

    def vjp(
        self, t: Tensor, z: Tensor, eps: Tensor, c: Tensor, weights: list[Weights] | None = None
    ) -> tuple[Tensor, Tensor]:
        """t (), z (B, *shape), eps (K, B, *shape), c (B, k) → f (B, *shape) and εᵀ∇f like eps."""
        weights = weights or self.prepare(z)
        f, slopes = self._evaluate(t, z, c, weights)
        return f.to(z.dtype), self._chain(eps, slopes, weights)

    def vjp_and_divergence(
        self, t: Tensor, z: Tensor, eps: Tensor, c: Tensor, weights: list[Weights] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `vjp`, and div f (B,), without a probe: for dense fields with two hidden layers."""
        weights = weights or self.prepare(z)
        f, slopes = self._evaluate(t, z, c, weights)
        first, second = slopes
        w1, w2, w3 = (w.h for w in weights)
        div = (second * F.linear(first, w2 * (w1 @ w3).T)).sum(1)
        return f.to(z.dtype), self._chain(eps, slopes, weights), div.to(z.dtype)

    def _evaluate(
        self, t: Tensor, z: Tensor, c: Tensor, weights: list[Weights]
    ) -> tuple[Tensor, list[Tensor]]:
        """f, and the slope s'(a) of each hidden layer, in the dtype of the weights."""
        *inner, (last, w_last) = zip(self.layers, weights, strict=True)
        h = z.to(w_last.h.dtype)
        c = c.to(w_last.h.dtype)
        slopes = []
        for layer, w in inner:
            h, slope = softplus_sigmoid(layer(w, t, h, c))
            slopes.append(slope)
        return last(w_last, t, h, c), slopes

    def _chain(self, eps: Tensor, slopes: list[Tensor], weights: list[Weights]) -> Tensor:
        """εᵀ∇f like eps (K, B, *shape), backwards through the layers."""
        *inner, last = zip(self.layers, weights, strict=True)
        g = last[0].vjp(last[1], eps.to(last[1].h.dtype))
        for (layer, w), slope in zip(reversed(inner), reversed(slopes), strict=True):
            g = layer.vjp(w, g * slope)
        return g.to(eps.dtype)
