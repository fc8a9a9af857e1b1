"""Image files to uint8 tensors of one shape, by Pillow."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from rnode.errors import InputError, one_line, require


class Format(NamedTuple):
    """What images become: uint8 (channels, height, width) with 2^bits grey levels."""

    channels: int
    size: int | Sequence[int]  # a side, or [height, width]
    crop: int | None = None  # side of the centre that is cut out before scaling
    bits: int = 8
    pad: int | None = None  # side to which zeros are added all around

    @property
    def sides(self) -> list[int]:
        return [self.size] * 2 if isinstance(self.size, int) else list(self.size)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, *(self.sides if self.pad is None else [self.pad] * 2))

    def check(self) -> "Format":
        require(self.channels in (1, 3), f"channels={self.channels}: must be 1 (grey) or 3 (RGB)")
        fits = self.pad is None or self.pad >= max(self.sides)
        require(fits, f"pad={self.pad}: must be at least {max(self.sides)}, the size")
        return self


def decode(path: Path, form: Format) -> tuple[np.ndarray, str] | InputError:
    """Return an image, uint8 of form.shape, and a digest of the file's bytes; or what is wrong."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            pixels = tv.pil_to_tensor(in_mode(ImageOps.exif_transpose(image), form.channels))
    except UnidentifiedImageError:  # its words name an object of ours
        return InputError(f"{path}: is not a whole image (in no format that Pillow reads)")
    except Exception as error:  # whatever Pillow makes of the bytes of a file
        return InputError(f"{path}: is not a whole image ({one_line(error)[:200]})")
    return fit_to(pixels, form).numpy(), hashlib.sha256(data).hexdigest()


def in_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image to 8 bits of grey or RGB; transparent pixels lie on black."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith("I"):  # 16 bits, of which Pillow would clip all above 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert(mode)


def fit_to(pixels: Tensor, form: Format) -> Tensor:
    """Crop, scale, pad and quantize an image (channels, H, W)."""
    if form.crop is not None:
        pixels = tv.center_crop(pixels, [form.crop] * 2)
    height, width = form.sides
    if pixels.shape[1:] != (height, width):
        scale = max(height / pixels.shape[1], width / pixels.shape[2])
        scaled = [
            max(s, round(n * scale)) for s, n in zip(form.sides, pixels.shape[1:], strict=True)
        ]
        pixels = tv.center_crop(tv.resize(pixels, scaled, antialias=True), form.sides)
    if form.pad is not None:
        above, left = (form.pad - height) // 2, (form.pad - width) // 2
        beyond = [left, above, form.pad - width - left, form.pad - height - above]
        pixels = tv.pad(pixels, beyond)
    return pixels >> (8 - form.bits)
