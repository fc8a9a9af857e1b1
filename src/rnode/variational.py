"""Variational dequantization (Ho et al., 2019): noise that a network shapes to each image."""

from torch import Tensor, nn

from rnode.transforms import Logit

MARGIN = 1e-6  # of the noise from 0 and 1


class VariationalDequantization(nn.Module):
    """The first layer of a flow: uniform noise v of dequantized images becomes u ~ q(u | x).

    With a and b of each pixel, from a convolutional network of the grey levels x,
    logit(u) = a + exp(b) · logit(v). It starts as the identity, at uniform noise. Its
    log-determinant −log q(u | x) is a part of l, so −log p(x) has the same bound as before:
    E_q[log p(x + u) − log q(u | x)] ≤ log p(x).

    Args:
        channels: channels of an image.
        levels: grey levels, as of `rnode.ImageTransform`.
        alpha: α of the logit, as of `rnode.ImageTransform`.
        hidden: channels of the inner layers of the network.
    """

    def __init__(self, channels: int, levels: int, alpha: float, hidden: int = 16):
        super().__init__()
        self.levels = levels
        self.logit = Logit(alpha)
        first, inner = (nn.Conv2d(size, hidden, 3, padding=1) for size in (channels, hidden))
        last = nn.Conv2d(hidden, 2 * channels, 3, padding=1)
        self.network = nn.Sequential(first, nn.Softplus(), inner, nn.Softplus(), last)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y (B, *shape) of uniform noise → y (B, *shape) of u, and its log-determinant (B,)."""
        x, v, a, b = self._split(y)
        w = v.logit()
        u = (a + b.exp() * w).sigmoid().clamp(MARGIN, 1 - MARGIN)
        log_det = b + u.log() + (1 - u).log() - v.log() - (1 - v).log()  # log du/dv
        (_, before), (y, after) = (self.logit((x + part) / self.levels) for part in (v, u))
        return y, log_det.flatten(1).sum(1) + after - before

    def inverse(self, y: Tensor, factored: list[Tensor]) -> Tensor:
        """y of u → y of uniform noise, (B, *shape)."""
        x, u, a, b = self._split(y)
        v = ((u.logit() - a) * (-b).exp()).sigmoid().clamp(MARGIN, 1 - MARGIN)
        return self.logit((x + v) / self.levels)[0]

    def _split(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The grey levels x, the noise, and a and b, (B, *shape) each."""
        scaled = self.logit.inverse(y) * self.levels
        x = scaled.detach().floor().clamp(0, self.levels - 1)
        centred = (2 * x / (self.levels - 1) - 1).to(next(self.parameters()).dtype)
        a, b = self.network(centred).to(y.dtype).chunk(2, dim=1)
        return x, (scaled - x).clamp(MARGIN, 1 - MARGIN), a, b
