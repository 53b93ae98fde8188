"""Metrics against torchmetrics, closed forms and brute force."""

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from diffecho_utils import DiffEchoError, metrics, models


class Features(torch.nn.Module):
    """Hands features through, so that torchmetrics computes on the same numbers."""

    num_features = 6

    def forward(self, features):
        return features


@pytest.mark.parametrize("sizes", [(300, 500), (7, 8), (4, 400)])
def test_frechet_distance_agrees_with_torchmetrics(sizes):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(n, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=6) for n in sizes)
    fid = FrechetInceptionDistance(feature=Features(), normalize=False)
    fid.set_dtype(torch.float64)
    fid.update(torch.from_numpy(a), real=True)
    fid.update(torch.from_numpy(b), real=False)
    assert metrics.frechet_distance(a, b) == pytest.approx(fid.compute().item(), rel=1e-4, abs=1e-4)


def test_frechet_distance_closed_forms():
    rng = np.random.default_rng(1)
    a = rng.normal(size=(50, 200))  # fewer images than dimensions
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert metrics.frechet_distance(a, a + 0.5) == pytest.approx(200 * 0.25)
    one = rng.normal(size=(1000, 1))
    expected = (2 * one.std(ddof=1) - one.std(ddof=1)) ** 2 + one.mean() ** 2
    assert metrics.frechet_distance(one, 2 * one) == pytest.approx(expected)
    for bad in ((a[:1], a), (a, a[:, :5]), (a[0], a[0])):
        with pytest.raises(DiffEchoError, match="needs"):
            metrics.frechet_distance(*bad)


def test_extrapolation_removes_most_of_the_bias():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(300, 40)), rng.normal(size=(4000, 40))
    biased = metrics.frechet_distance(a, b)
    assert abs(metrics.frechet_at_infinity(a, b)) < 0.25 * biased


def test_bootstrap_resamples_whole_patients():
    groups = np.repeat(np.arange(20), 5)
    values = np.repeat(np.random.default_rng(0).normal(size=20), 5)
    by_patient = metrics.bootstrap_interval(lambda r: values[r].mean(), groups)
    by_frame = metrics.bootstrap_interval(lambda r: values[r].mean(), np.arange(100))
    assert by_patient[0] < values.mean() < by_patient[1]
    assert np.ptp(by_patient) > 1.6 * np.ptp(by_frame)


def test_interval_of_a_biased_statistic_is_around_its_estimate_and_not_too_narrow():
    rng = np.random.default_rng(3)
    b = rng.normal(size=(2000, 30))
    draws = [metrics.frechet_distance(rng.normal(size=(40, 30)), b) for _ in range(100)]
    a = rng.normal(size=(40, 30))
    low, high = metrics.bootstrap_interval(
        lambda rows: metrics.frechet_distance(a[rows], b), np.arange(40)
    )
    assert low < metrics.frechet_distance(a, b) < high
    assert low < np.mean(draws) < high
    assert 1 < (high - low) / (4 * np.std(draws)) < 5


def test_psnr_and_ms_ssim_by_hand(frames):
    images = frames.images[:4]
    noisy = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    expected = 10 * torch.log10(4 / (noisy - images).square().mean((1, 2, 3)))
    torch.testing.assert_close(metrics.psnr(noisy, images), expected, rtol=1e-4, atol=1e-3)
    assert torch.allclose(metrics.ms_ssim(images, images).float(), torch.ones(4))
    assert (metrics.ms_ssim(noisy, images) < 0.99).all()
    for side in (32, 64, 128, 176):
        picture = torch.rand(1, 1, side, side) * 2 - 1
        assert metrics.ms_ssim(picture, picture).item() == pytest.approx(1)


def test_spectrum_finds_a_wave():
    columns = torch.arange(128.0)
    wave = torch.sin(2 * torch.pi * 0.25 * columns).expand(2, 1, 128, 128)
    frequencies, power = metrics.radial_spectrum(wave)
    assert frequencies[power.argmax()] == pytest.approx(0.25, abs=0.01)


def test_high_frequencies_are_what_a_blur_removes():
    noise = torch.randn(3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(-1, 1, 64).expand(3, 1, 64, 64)
    expected = (1 - 1 / 25) ** 0.5  # the variance a 5 x 5 mean leaves of white noise is 1/25
    deviation = metrics.high_frequency_deviation(noise)
    torch.testing.assert_close(deviation, torch.full((3,), expected), atol=0.05, rtol=0)
    assert metrics.high_frequency_deviation(ramp).max() < 0.02


def test_region_means_by_hand():
    masks = torch.tensor([[[0, 0, 1], [1, 2, 2]], [[0, 0, 0], [3, 3, 1]]], dtype=torch.uint8)
    images = torch.tensor([[[0.0, 1, 2], [4, -1, 0]], [[0, 3, 0], [1, 0, -1]]])[:, None]
    expected = [[0.5, 3, -0.5, float("nan")], [1, -1, float("nan"), 0.5]]
    means = metrics.region_means(images, masks)
    torch.testing.assert_close(means, torch.tensor(expected), equal_nan=True)


def test_panel_separates_what_is_far_from_real_frames(frames, smoke):
    torch.manual_seed(0)
    vae = models.build_autoencoder(smoke).eval()
    classes, patients = frames.classes.numpy(), frames.table["patient"].to_numpy()
    real = metrics.features(vae, frames.images)
    assert real.shape == (40, 64)
    far = real + 1.0
    half = np.isin(patients, np.unique(patients)[:5])
    panel = metrics.distance_panel(
        far, classes, real[half], classes[half], real[~half], classes[~half], patients[~half]
    )
    assert panel.index.tolist() == ["2CH-ED", "2CH-ES", "4CH-ED", "4CH-ES", "all"]
    assert (panel["distance"] > panel["floor"]).all() and (panel["low"] <= panel["high"]).all()
    with pytest.raises(DiffEchoError, match=r"2CH-ED: a Frechet distance needs 4 .*'generated': 3"):
        metrics.distance_panel(
            far[:12], classes[:12], real, classes, real, classes, patients
        )  # fmt: skip
    assert panel["n"].tolist() == [10] * 4 + [40] and panel["floor_n"].tolist() == [5] * 4 + [20]


def test_nearest_by_hand():
    a, b = (
        torch.tensor([[0.0, 0.0], [3.0, 4.0]]),
        torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 2.0]]),
    )
    assert metrics.nearest(a, b) == pytest.approx([2 / 2**0.5, 0])
    assert metrics.nearest(a.view(2, 1, 2, 1), b.view(3, 1, 2, 1)) == pytest.approx([2 / 2**0.5, 0])
