"""A small scattering transform of images: fixed wavelets, so that it learns nothing and costs no privacy.

Bruna and Mallat 2013, "Invariant Scattering Convolution Networks": local means of an image (order 0), of the modulus of
its wavelet transform (order 1), and of the modulus of the wavelet transform of that (order 2). Two scales, eight
angles: 1 + 16 + 64 = 81 channels, and of 28 x 28 pixels 7 x 7 places.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

SCALES, ANGLES = 2, 8
CHANNELS = 1 + SCALES * ANGLES + ANGLES**2
STEP = 2**SCALES  # pixels from one place to the next
PLACES = 7
SIDE = (PLACES + 2) * STEP  # the image with a border of STEP pixels, so that its edges do not meet


def gabor(scale: float, frequency: float, angle: float, slant: float) -> torch.Tensor:
    """A wave under a Gaussian of width `scale`, whose sum is 1 where the frequency is 0: [SIDE, SIDE], complex.

    Periodic, with its centre at the origin; `slant` is how much narrower the Gaussian is along the wave's front.
    """
    found = torch.zeros(SIDE, SIDE, dtype=torch.complex128)
    place = torch.arange(SIDE, dtype=torch.float64)
    for turn_y in range(-2, 3):
        for turn_x in range(-2, 3):
            y, x = place[:, None] + turn_y * SIDE, place[None, :] + turn_x * SIDE
            along = y * math.cos(angle) + x * math.sin(angle)
            across = x * math.cos(angle) - y * math.sin(angle)
            envelope = torch.exp(-(along**2 + (slant * across) ** 2) / (2 * scale**2))
            found += torch.polar(envelope, frequency * along)
    return found * slant / (2 * math.pi * scale**2)


def morlet(scale: int, angle: float) -> torch.Tensor:
    """A wavelet for details of 2^scale pixels: a Gabor wave less as much of its Gaussian as makes its sum 0."""
    width, frequency, slant = 0.8 * 2**scale, 0.75 * math.pi / 2**scale, 4 / ANGLES
    wave, envelope = gabor(width, frequency, angle, slant), gabor(width, 0.0, angle, slant)
    return wave - wave.sum() / envelope.sum() * envelope


def waves(scale: int) -> torch.Tensor:
    """The spectra of the wavelets of one scale: [ANGLES, SIDE, SIDE]."""
    filters = torch.stack([morlet(scale, math.pi * k / ANGLES) for k in range(ANGLES)])
    return torch.fft.fft2(filters).to(torch.complex64)


FINE, COARSE = waves(0), waves(1)


def modulus(images: torch.Tensor, filters: torch.Tensor, step: int) -> torch.Tensor:
    """The modulus of each image behind each filter (a spectrum), at every `step`-th pixel.

    [rows, paths * filters, side / step, side / step] of [rows, paths, side, side] and [filters, side, side]. To leave
    out pixels is to add up the frequencies that then look alike.
    """
    cut = (step, images.shape[-1] // step)
    parts = torch.fft.fft2(images).unflatten(3, cut).unflatten(2, cut)
    filters = (filters / step**2).unflatten(2, cut).unflatten(1, cut)
    return torch.fft.ifft2(torch.einsum("rpaybx,faybx->rpfyx", parts, filters).flatten(1, 2)).abs()


def local_means(images: torch.Tensor) -> torch.Tensor:
    """Means around each of 7 x 7 places, under a Gaussian: [rows, paths, 7, 7]."""
    pixels = torch.arange(0.0, SIDE, SIDE / images.shape[-1])
    places = STEP * torch.arange(1.0, PLACES + 1)
    weights = torch.softmax(-((places[:, None] - pixels) ** 2) / (2 * (0.8 * 2 ** (SCALES - 1)) ** 2), dim=1)
    return weights @ images @ weights.T


def scattered(images: torch.Tensor) -> torch.Tensor:
    """[rows, 81, 7, 7] of images of [rows, 1, 28, 28]; each row by itself."""
    image = pad(images, (STEP,) * 4, mode="reflect")
    fine = modulus(image, FINE, 1)
    paths = (image, fine, modulus(image, COARSE, 2), modulus(fine, COARSE, 2))
    return torch.cat([local_means(path) for path in paths], dim=1)
