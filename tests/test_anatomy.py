"""Areas and volumes against shapes whose size is known by hand."""

import numpy as np
import pandas as pd
import pytest

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
    table = pd.DataFrame(camus.CLASSES, columns=["view", "phase"])
    table = table.assign(patient="patient0001", lateral_mm=0.5, depth_mm=0.5)
    late = table["phase"] == "ES"
    masks = np.stack([half_ellipse(160 * (1 - 0.2 * es), 90 * (1 - 0.3 * es)) for es in late])
    ef = anatomy.patients_ef(masks, table)["ef"][0]
    assert ef == pytest.approx(100 * (1 - 0.8 * 0.49), abs=0.5)
    lower = anatomy.patients_ef(masks, table, one_height=True)
    assert lower["ef"][0] == pytest.approx(100 * (1 - 0.49), abs=0.5)
    assert lower["edv"][0] == pytest.approx(np.pi / 6 * 80 * 45**2 / 1000, rel=0.01)


def test_length_and_axis_with_unequal_spacing():
    base, apex = anatomy.long_axis(half_ellipse(150, 80), (0.25, 0.5))
    mitral = 0.78 * 256
    assert apex[1] == pytest.approx((mitral - 150) * 0.5, abs=0.5)
    assert base[1] == pytest.approx(mitral * 0.5, abs=0.5)
    assert base[0] == pytest.approx(128 * 0.25, abs=0.5) == apex[0]


def test_ejection_fraction_of_every_patient(frames):
    table = anatomy.patients_ef(frames.masks, frames.table)
    assert len(table) == 10 and (table["esv"] < table["edv"]).all()
    assert table["edv"].between(30, 350).all()
    known = frames.table.groupby("patient")["ef"].first()
    error = table.set_index("patient")["ef"] - known
    assert error.abs().mean() < 8, (
        "EF from the label maps is far from what the phantom was built with"
    )
    assert abs(error.mean()) < 1.5, "a base inside the cavity biases the EF of small pictures"
    lost, fourth = frames.masks.clone(), frames.table["patient"] == table["patient"][3]
    lost[np.flatnonzero(fourth)] = 0
    read = anatomy.patients_ef(lost, frames.table)
    assert read["ef"].isna().tolist() == [i == 3 for i in range(10)]
    pd.testing.assert_frame_equal(read.drop(3), table.drop(3))
    part = (frames.table["phase"] == "ED") | ~fourth  # three patients in four have all frames
    some = anatomy.patients_ef(frames.masks[np.flatnonzero(part)], frames.table[part])
    pd.testing.assert_frame_equal(some, table.drop(3).reset_index(drop=True))


def test_without_spacing_the_ratio_remains(phantom_root, frames, smoke):
    with_spacing = anatomy.patients_ef(frames.masks, frames.table)
    table = camus.read_table(phantom_root).assign(lateral_mm=np.nan, depth_mm=np.nan)
    without = data.load_frames(table, smoke)
    ef = anatomy.patients_ef(without.masks, without.table)
    assert ef["edv"].isna().all()
    np.testing.assert_allclose(ef["ef"], with_spacing["ef"], atol=1.0)


def test_label_maps_without_a_long_axis_are_refused():
    closed = np.full((8, 8), 2, np.uint8)
    closed[3:5, 3:5] = 1
    for mask, chamber, message in (
        (np.zeros((8, 8), np.uint8), "LV cavity", "without LV cavity .*no long axis"),
        (half_ellipse(20, 20, 64, atrium=False), "LA", "without LA .*no long axis"),
        (closed, "LV cavity", "no mitral plane"),
    ):
        with pytest.raises(DiffEchoError, match=message):
            anatomy.long_axis(mask, chamber=chamber)


def test_without_an_atrium_the_real_axes_stay(real_root):
    table = camus.select(camus.read_table(real_root), split="validation", patients=10)
    masks = data.load_frames(table, data.Geometry(128)).masks.numpy()
    bases = [(anatomy.long_axis(m)[0], anatomy.long_axis(np.where(m == 3, 0, m))[0]) for m in masks]
    assert max(np.linalg.norm(one - other) for one, other in bases) < 1


def test_real_ejection_fractions(real_root):
    """49 % of all 500 patients are published as at or below 45 %: with one height, and only so."""
    frames = data.load_frames(camus.read_table(real_root), data.Geometry(128))
    for one_height, share in ((False, 0.26), (True, 0.48)):
        ef = anatomy.patients_ef(frames.masks, frames.table, one_height)["ef"]
        assert len(ef) == 450 and ef.between(0, 90).all()
        assert (ef <= 45).mean() == pytest.approx(share, abs=0.02)


def single_plane(frames, chamber="LV cavity"):
    """Volume of each frame by its own view alone."""
    sizes = frames.table[["lateral_mm", "depth_mm"]].fillna(1.0).to_numpy()
    pairs = zip(frames.masks.numpy(), sizes, strict=True)
    return np.array([anatomy.biplane_volume(m, m, s, s, chamber=chamber) for m, s in pairs])


def test_native_frames_give_volumes_and_what_stretched_ones_give(real_root):
    """40 patients, 4CH, in mm against the same stretched to a square; atria are larger at end-systole."""
    native = camus.read_table(real_root / "native_4ch")
    stretched = camus.select(camus.read_table(real_root), view="4CH")
    stretched = stretched[stretched["patient"].isin(native["patient"])].reset_index(drop=True)
    both = [data.load_frames(rows, data.Geometry(224)) for rows in (native, stretched)]
    (edv, esv), other = (single_plane(frames).reshape(-1, 2).T for frames in both)
    assert 90 < np.median(edv) < 150, "mL, 4CH"
    gap = anatomy.ejection_fraction(*other) - anatomy.ejection_fraction(edv, esv)
    assert len(gap) == 40 and abs(gap.mean()) < 0.3 and gap.std() < 1
    atria = native.assign(volume=single_plane(both[0], "LA")).groupby("phase")["volume"].median()
    assert atria["ED"] < atria["ES"] and 40 < atria["ES"] < 80, "mL"
