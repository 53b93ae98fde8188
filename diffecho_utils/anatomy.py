"""Measurements from label maps: areas, volumes by the method of disks, ejection fraction.

Chapter 01. Volumes follow the biplane method of disks (modified Simpson) of the ASE/EACVI
recommendations (Lang et al. 2015): 20 disks along the ventricle's long axis, each an ellipse whose
two diameters come from the two- and the four-chamber view.
"""

import numpy as np
import pandas as pd

from diffecho_utils import DiffEchoError
from diffecho_utils.camus import LABELS

DISKS = 20


def areas(masks, spacing=None):
    """Area of LV cavity, myocardium and LA in each label map: (N, H, W) uint8 -> (N, 3) float64.

    As shares of the picture, or in cm2 with `spacing`, an (N, 2) array of (lateral, depth) mm.
    """
    masks = np.asarray(masks)
    labels = [LABELS[name] for name in ("LV cavity", "myocardium", "LA")]
    counts = np.stack([(masks == label).sum((1, 2)) for label in labels], axis=1).astype(float)
    if spacing is None:
        return counts / masks[0].size
    return counts * np.prod(np.asarray(spacing, dtype=float), axis=1)[:, None] / 100


def long_axis(mask, spacing=(1.0, 1.0)):
    """The ventricle's long axis: (base, apex), each (lateral, depth) in mm, pixels without spacing.

    Base: middle of the mitral plane, taken as the cavity's border with the atrium (without an
    atrium label: the lower edge of the cavity's deepest tenth). Apex: the cavity's point farthest
    from it. Raises DiffEchoError where the label map (H, W) has no LV cavity.
    """
    mask = np.asarray(mask)
    cavity = mask == LABELS["LV cavity"]
    if not cavity.any():
        raise DiffEchoError(
            "label map without LV cavity (label 1): no long axis; leave the frame out"
        )
    atrium = mask == LABELS["LA"]
    sides = [cavity & _dilate(atrium, 3), atrium & _dilate(cavity, 3)]
    if not sides[0].any():
        deep = np.arange(len(mask))[:, None] >= np.quantile(np.nonzero(cavity)[0], 0.9)
        sides = [cavity & deep & ~np.roll(cavity, -1, axis=0)]  # pixels with no cavity below
    # Midway between both sides: the cavity's side alone lies inside the cavity and shortens the
    # axis by a fixed number of pixels, which lowers the EF, the more the smaller the picture.
    base = np.mean([_points(side, spacing).mean(0) for side in sides], axis=0)
    points = _points(cavity, spacing)
    apex = points[np.argmax(((points - base) ** 2).sum(1))]
    return base, apex


def disk_diameters(mask, spacing=(1.0, 1.0), disks=DISKS):
    """(diameters, length): the cavity's width across each of `disks` equal slices of its long axis.

    diameters: (disks,) mm from base to apex (a slice's area over its thickness); length: mm.
    """
    base, apex = long_axis(mask, spacing)
    length = float(np.linalg.norm(apex - base))
    if length == 0:
        raise DiffEchoError("the LV cavity is a single point: no long axis; leave the frame out")
    points = _points(np.asarray(mask) == LABELS["LV cavity"], spacing)
    along = (points - base) @ (apex - base) / length**2
    slices = np.clip((along * disks).astype(int), 0, disks - 1)
    pixel = spacing[0] * spacing[1]
    return np.bincount(slices, minlength=disks) * pixel / (length / disks), length


def biplane_volume(mask_2ch, mask_4ch, spacing_2ch=(1.0, 1.0), spacing_4ch=(1.0, 1.0)):
    """LV volume in mL from the two views of one phase (voxel units without spacing)."""
    diameters_2ch, length_2ch = disk_diameters(mask_2ch, spacing_2ch)
    diameters_4ch, length_4ch = disk_diameters(mask_4ch, spacing_4ch)
    thickness = max(length_2ch, length_4ch) / DISKS
    return float(np.pi / 4 * (diameters_2ch * diameters_4ch).sum() * thickness / 1000)


def ejection_fraction(end_diastolic_volume, end_systolic_volume):
    """Share of the end-diastolic volume that leaves the ventricle, in per cent."""
    return 100 * (end_diastolic_volume - end_systolic_volume) / end_diastolic_volume


def patients_ef(frames):
    """Biplane volumes and EF of every patient with all four frames: patient, edv, esv, ef.

    `frames` is a `data.Frames`. Volumes are in mL, NaN where the pixel spacing is unknown; the
    ejection fraction is a ratio and needs none.
    """
    rows = []
    for patient, group in frames.table.groupby("patient"):
        index = {
            (row.view, row.phase): i for i, row in zip(group.index, group.itertuples(), strict=True)
        }
        if len(index) < 4:
            continue
        spacing = {
            key: tuple(frames.table.loc[i, ["lateral_mm", "depth_mm"]].astype(float))
            for key, i in index.items()
        }
        known = not np.isnan(list(spacing.values())).any()
        volume = {}
        for phase in ("ED", "ES"):
            keys = [("2CH", phase), ("4CH", phase)]
            masks = [frames.masks[index[key]].numpy() for key in keys]
            volume[phase] = biplane_volume(
                *masks, *(spacing[key] if known else (1.0, 1.0) for key in keys)
            )
        ef = ejection_fraction(volume["ED"], volume["ES"])
        scale = 1.0 if known else np.nan
        rows.append(
            dict(patient=patient, edv=volume["ED"] * scale, esv=volume["ES"] * scale, ef=ef)
        )
    return pd.DataFrame(rows, columns=["patient", "edv", "esv", "ef"])


def _points(region, spacing):
    """(N, 2) positions (lateral, depth) in mm of the pixels where `region` (H, W) is true."""
    rows, columns = np.nonzero(region)
    return np.stack([columns * spacing[0], rows * spacing[1]], axis=1)


def _dilate(region, pixels):
    """`region` grown by `pixels` in the four directions."""
    for _ in range(pixels):
        padded = np.pad(region, 1)
        region = (
            region | padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]
        )
    return region
