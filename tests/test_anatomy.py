"""Areas and volumes against shapes whose size is known by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

from diffecho_utils import DiffEchoError, anatomy, camus, data


def half_ellipse(length, width, side=256, atrium=True, tilt=0.0, shift=(0.0, 0.0)):
    """A ventricle that is half an ellipse of this length and width (pixels) within its wall.

    The mitral plane is centred at row and column `shift` from (0.78, 0.5) of the side, and turned by
    `tilt` degrees; below it hangs an atrium, half an ellipse too, as wide and half as long.
    """
    rows, columns = np.mgrid[:side, :side].astype(float)
    y, x = rows - 0.78 * side - shift[0], columns - 0.5 * side - shift[1]
    cos, sin = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    up, across = x * sin - y * cos, x * cos + y * sin
    mask = np.zeros((side, side), np.uint8)
    wall = 0.05 * side
    mask[np.hypot(up / (length + wall), across / (width / 2 + wall)) <= 1] = 2
    mask[np.hypot(up / length, across / (width / 2)) <= 1] = 1
    mask[up < 0] = 0
    if atrium:
        mask[(up < 0) & (np.hypot(up / (length / 2), across / (width / 2)) <= 1)] = 3
    return mask


def test_areas_as_shares_and_in_cm2():
    mask = np.zeros((100, 50), np.uint8)
    mask[:20, :10], mask[20:30, :10], mask[30:40, :5] = 1, 2, 3
    np.testing.assert_allclose(anatomy.areas(mask[None]), [[0.04, 0.02, 0.01]])
    np.testing.assert_allclose(anatomy.areas(mask[None], [(0.5, 2.0)]), [[2.0, 1.0, 0.5]])


@pytest.mark.parametrize("atrium", [True, False])
def test_volume_of_a_half_ellipsoid(atrium):
    """pi / 6 times length and both diameters, however it is turned and shifted: within 1 %."""
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(20):
        diameters = rng.uniform(70, 100, 2)
        views = [
            half_ellipse(160, d, 256, atrium, rng.uniform(-20, 20), rng.uniform(-0.5, 0.5, 2))
            for d in diameters
        ]
        volume = anatomy.biplane_volume(*views, (0.5, 0.5), (0.5, 0.5))
        errors.append(volume / (np.pi / 6 * 160 * diameters.prod() * 0.5**3 / 1000) - 1)
    assert np.abs(errors).max() < 0.01 and abs(np.mean(errors)) < 0.003


def test_volume_of_an_atrium():
    """Half an ellipsoid of 80 px length and 70 and 90 px diameters, 0.5 mm a pixel: within 1 %."""
    views = [half_ellipse(160, width) for width in (70, 90)]
    volume = anatomy.biplane_volume(*views, (0.5, 0.5), (0.5, 0.5), chamber="LA")
    assert volume == pytest.approx(np.pi / 6 * 80 * 70 * 90 * 0.5**3 / 1000, rel=0.01)


def test_one_height_leaves_the_shortening_out():
    """Half-ellipsoids that lose 20 % of their length and 30 % of each width: EF 60.8 % or 51 %."""
    rows, masks = [], []
    for view, phase in camus.CLASSES:
        rows.append(dict(patient="patient0001", view=view, phase=phase))
        shrunk = phase == "ES"
        masks.append(half_ellipse(160 * (1 - 0.2 * shrunk), 90 * (1 - 0.3 * shrunk)))
    table = pd.DataFrame(rows).assign(lateral_mm=0.5, depth_mm=0.5)
    frames = data.Frames(torch.zeros(4, 1, 256, 256), torch.from_numpy(np.stack(masks)), table)
    assert anatomy.patients_ef(frames)["ef"][0] == pytest.approx(100 * (1 - 0.8 * 0.49), abs=0.5)
    lower = anatomy.patients_ef(frames, one_height=True)
    assert lower["ef"][0] == pytest.approx(100 * (1 - 0.49), abs=0.5)
    assert lower["edv"][0] == pytest.approx(np.pi / 6 * 80 * 45**2 / 1000, rel=0.01)


def test_length_and_axis_with_unequal_spacing():
    base, apex = anatomy.long_axis(half_ellipse(150, 80), (0.25, 0.5))
    mitral = 0.78 * 256
    assert apex[1] == pytest.approx((mitral - 150) * 0.5, abs=0.5)
    assert base[1] == pytest.approx(mitral * 0.5, abs=0.5)
    assert base[0] == pytest.approx(128 * 0.25, abs=0.5) == apex[0]


def test_ejection_fraction_of_every_patient(frames, phantom_root):
    table = anatomy.patients_ef(frames)
    assert len(table) == 10 and (table["esv"] < table["edv"]).all()
    assert table["edv"].between(30, 350).all()
    known = camus.read_table(phantom_root).groupby("patient")["ef"].first()
    error = table.set_index("patient")["ef"] - known
    assert error.abs().mean() < 8, (
        "EF from the label maps is far from what the phantom was built with"
    )
    assert abs(error.mean()) < 1.5, "a base inside the cavity biases the EF of small pictures"


def test_without_spacing_the_ratio_remains(phantom_root, smoke):
    table = camus.read_table(phantom_root)
    with_spacing = anatomy.patients_ef(data.load_frames(table, smoke))
    without = data.load_frames(table.assign(lateral_mm=np.nan, depth_mm=np.nan), smoke)
    ef = anatomy.patients_ef(without)
    assert ef["edv"].isna().all()
    np.testing.assert_allclose(ef["ef"], with_spacing["ef"], atol=1.0)


def test_label_maps_without_a_long_axis_are_refused():
    empty = np.zeros((8, 8), np.uint8)
    with pytest.raises(DiffEchoError, match="without LV cavity .*no long axis"):
        anatomy.long_axis(empty)
    with pytest.raises(DiffEchoError, match="without LA .*no long axis"):
        anatomy.long_axis(half_ellipse(20, 20, 64, atrium=False), chamber="LA")
    closed = np.full((8, 8), 2, np.uint8)
    closed[3:5, 3:5] = 1
    with pytest.raises(DiffEchoError, match="no mitral plane"):
        anatomy.long_axis(closed)


def test_without_an_atrium_the_real_axes_stay(real_root):
    table = camus.select(camus.read_table(real_root), split="validation", patients=10)
    masks = data.load_frames(table, data.Geometry(128)).masks.numpy()
    bases = [(anatomy.long_axis(m)[0], anatomy.long_axis(np.where(m == 3, 0, m))[0]) for m in masks]
    assert max(np.linalg.norm(one - other) for one, other in bases) < 1


def test_real_ejection_fractions(real_root):
    """49 % of all 500 patients are published as at or below 45 %: with one height, and only so."""
    frames = data.load_frames(camus.read_table(real_root), data.Geometry(128))
    for one_height, share in ((False, 0.26), (True, 0.48)):
        ef = anatomy.patients_ef(frames, one_height)["ef"]
        assert len(ef) == 450 and ef.between(0, 90).all()
        assert (ef <= 45).mean() == pytest.approx(share, abs=0.02)


def test_stretching_is_not_what_shifts_the_ejection_fraction(real_root):
    """Single-plane EF of 40 patients: native frames in mm against the same, stretched to a square."""
    native = camus.read_table(real_root / "native_4ch")
    table = camus.select(camus.read_table(real_root), view="4CH")
    stretched = table[table["patient"].isin(native["patient"])].reset_index(drop=True)
    ef = []
    for rows in (native, stretched):
        frames = data.load_frames(rows, data.Geometry(224))
        spacing = frames.table[["lateral_mm", "depth_mm"]].fillna(1.0).to_numpy()
        volumes = [
            anatomy.biplane_volume(mask, mask, s, s)
            for mask, s in zip(frames.masks.numpy(), spacing, strict=True)
        ]
        edv, esv = np.reshape(volumes, (-1, 2)).T
        ef.append(anatomy.ejection_fraction(edv, esv))
        if rows is native:
            assert 90 < np.median(edv) < 150, "mL, 4CH"
    assert len(ef[0]) == 40 and abs(np.mean(ef[1] - ef[0])) < 0.3 and np.std(ef[1] - ef[0]) < 1


def test_real_atria_are_larger_at_end_systole(real_root):
    table = camus.read_table(real_root / "native_4ch")
    frames = data.load_frames(table, data.Geometry(224))
    spacing = frames.table[["lateral_mm", "depth_mm"]].to_numpy()
    volume = [
        anatomy.biplane_volume(mask, mask, s, s, chamber="LA")
        for mask, s in zip(frames.masks.numpy(), spacing, strict=True)
    ]
    median = table.assign(volume=volume).groupby("phase")["volume"].median()
    assert median["ED"] < median["ES"] and 40 < median["ES"] < 80, "mL"
