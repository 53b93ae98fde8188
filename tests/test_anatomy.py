"""Areas and volumes against shapes whose size is known by hand."""

import numpy as np
import pytest

from diffecho_utils import DiffEchoError, anatomy, camus, data


def half_ellipse(length, width, side=256, atrium=True):
    """A ventricle that is half an ellipse of this length and width (pixels), its base at row 200."""
    rows, columns = np.mgrid[:side, :side]
    inside = ((rows - 200) / length) ** 2 + ((columns - 128) / (width / 2)) ** 2 <= 1
    mask = np.where(inside & (rows <= 200), 1, 0).astype(np.uint8)
    if atrium:
        mask[201:230, 128 - int(width / 2) : 128 + int(width / 2)] = 3
    return mask


def test_areas_as_shares_and_in_cm2():
    mask = np.zeros((100, 50), np.uint8)
    mask[:20, :10], mask[20:30, :10], mask[30:40, :5] = 1, 2, 3
    np.testing.assert_allclose(anatomy.areas(mask[None]), [[0.04, 0.02, 0.01]])
    np.testing.assert_allclose(anatomy.areas(mask[None], [(0.5, 2.0)]), [[2.0, 1.0, 0.5]])


@pytest.mark.parametrize("atrium", [True, False])
def test_volume_of_a_half_ellipsoid(atrium):
    """Half an ellipsoid of 160 x 0.5 mm length and 80 and 100 px diameters: pi/6 L a b, within 1 %."""
    a, b = half_ellipse(160, 80, atrium=atrium), half_ellipse(160, 100, atrium=atrium)
    spacing = (0.5, 0.5)
    volume = anatomy.biplane_volume(a, b, spacing, spacing)
    expected = np.pi / 6 * (160 * 0.5) * (80 * 0.5) * (100 * 0.5) / 1000
    assert volume == pytest.approx(expected, rel=0.03 if not atrium else 0.02)


def test_length_and_axis_with_unequal_spacing():
    base, apex = anatomy.long_axis(half_ellipse(150, 80), (0.25, 0.5))
    assert apex[1] == pytest.approx(50 * 0.5, abs=1) and base[1] == pytest.approx(200 * 0.5, abs=2)
    assert apex[0] == pytest.approx(128 * 0.25, abs=1)


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
    with_spacing = anatomy.patients_ef(data.load_frames(table, smoke.side))
    without = data.load_frames(table.assign(lateral_mm=np.nan, depth_mm=np.nan), smoke.side)
    ef = anatomy.patients_ef(without)
    assert ef["edv"].isna().all()
    np.testing.assert_allclose(ef["ef"], with_spacing["ef"], atol=1.0)


def test_label_map_without_ventricle_is_refused():
    with pytest.raises(DiffEchoError, match="no long axis"):
        anatomy.long_axis(np.zeros((8, 8), np.uint8))


def test_real_ejection_fractions_are_physiological(real_root):
    table = camus.select(camus.read_table(real_root), split="validation")
    ef = anatomy.patients_ef(data.load_frames(table, 128))["ef"]
    assert len(ef) == 50 and 40 < ef.mean() < 60 and ef.between(0, 90).all()
