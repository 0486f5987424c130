"""The scattering transform of examples/fashion: fixed, and as the literature has it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

SCATTERING = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "fashion" / "scattering.py"))
PIXELS = torch.arange(28.0)

# Of `image`, channel by channel, the mean over the 7 x 7 places: kymatio 0.3.0, Scattering2D(J=2, shape=(28, 28)), its
# angles in the order of ours. It leaves out what halving the image folds over in a coarse wavelet, hence the tolerance.
KYMATIO = {
    0: 0.117896, 1: 0.004520, 3: 0.027457, 7: 0.005083, 9: 0.009452, 12: 0.050866,
    16: 0.009297, 17: 0.000408, 30: 0.000714, 50: 0.001683, 80: 0.000543,
}  # fmt: skip


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    """A smooth blob with stripes, from 0 to 1."""
    y, x = PIXELS[:, None], PIXELS[None, :]
    blob = torch.exp(-((y - 15) ** 2 + (x - 12) ** 2) / 60)
    return (blob * (1 + torch.sin(1.3 * x + 0.6 * y)) / 2)[None, None]


def scattered(images: torch.Tensor) -> torch.Tensor:
    return SCATTERING["scattered"](images)


def test_an_image_becomes_81_channels_of_7_by_7(image):
    assert scattered(image).shape == (1, 81, 7, 7)


def test_wavelets_answer_to_differences_alone(image):
    for wavelets in (SCATTERING["FINE"], SCATTERING["COARSE"]):
        assert wavelets[:, 0, 0].abs().max() < 1e-6
        assert wavelets.abs().amax((1, 2)).min() > 0.5
    flat = scattered(torch.full((1, 1, 28, 28), 0.7))
    assert torch.allclose(flat[:, 0], torch.full((7, 7), 0.7))
    assert flat[:, 1:].abs().max() < 1e-6


def test_no_two_images_are_farther_apart_afterwards_at_one_value_a_place(image):
    others = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    before = (others - image).square().sum((1, 2, 3))
    after = 4**2 * (scattered(others) - scattered(image)).square().sum((1, 2, 3))
    assert (after <= before).all()


def test_a_pixel_more_to_the_right_changes_the_image_far_more_than_what_is_said_of_it(image):
    moved = image.roll(1, dims=3)
    change = (moved - image).norm() / image.norm()
    of_moduli = (scattered(moved) - scattered(image))[:, 1:].norm() / scattered(image)[:, 1:].norm()
    assert of_moduli < 0.5 * change


def test_each_image_is_transformed_by_itself(image):
    others = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    together = scattered(torch.cat([others, image]))
    assert torch.allclose(together[3:], scattered(image), atol=1e-6)


def test_channels_are_those_of_kymatio(image):
    found = scattered(image).mean((0, 2, 3))
    for channel, value in KYMATIO.items():
        assert float(found[channel]) == pytest.approx(value, rel=0.01)
