"""Measurements from label maps: areas, volumes by the method of disks, ejection fraction.

Chapter 01. Volumes follow the biplane method of disks (modified Simpson) of the ASE/EACVI
recommendations (Lang et al. 2015): 20 disks along the ventricle's long axis, each an ellipse whose
two diameters come from the two- and the four-chamber view.
"""

import numpy as np
import pandas as pd
from scipy.ndimage import binary_dilation

from diffecho_utils import DiffEchoError
from diffecho_utils.camus import CLASSES, LABELS, PHASES, VIEWS

DISKS = 20


def areas(masks, spacing=None):
    """Area of LV cavity, myocardium and LA in each label map: (N, H, W) uint8 -> (N, 3) float64.

    As shares of the picture, or in cm2 with `spacing`, an (N, 2) array of (lateral, depth) mm.
    """
    masks = np.asarray(masks)
    chambers = [masks == LABELS[name] for name in ("LV cavity", "myocardium", "LA")]
    counts = np.stack([chamber.sum((1, 2)) for chamber in chambers], axis=1).astype(float)
    if spacing is None:
        return counts / masks[0].size
    return counts * np.prod(np.asarray(spacing, dtype=float), axis=1)[:, None] / 100


def long_axis(mask, spacing=(1.0, 1.0), chamber="LV cavity"):
    """The long axis of the ventricle, or of the atrium (`chamber="LA"`): (base, tip).

    Each (lateral, depth) in mm, pixels without spacing. Base: middle of the mitral plane, taken as
    the cavity's border with the atrium (without an atrium label: below the cavity's middle, with
    whatever is not myocardium). Tip: the chamber's point farthest from it. Raises DiffEchoError
    where the label map (H, W) has no such chamber, or a cavity without an opening.
    """
    mask = np.asarray(mask)
    for name in ("LV cavity", chamber):
        if not (mask == LABELS[name]).any():
            raise DiffEchoError(
                f"label map without {name} (label {LABELS[name]}): no long axis; leave the frame out"
            )
    cavity, beyond = mask == LABELS["LV cavity"], mask == LABELS["LA"]
    if not beyond.any():
        beyond = ~cavity & (mask != LABELS["myocardium"])
        beyond[: int(np.nonzero(cavity)[0].mean())] = False
    # Midway between both sides: the cavity's side alone lies inside the cavity and shortens the
    # axis by a fixed number of pixels, which lowers the EF, the more the smaller the picture.
    grown = [binary_dilation(region, iterations=3) for region in (beyond, cavity)]
    sides = [cavity & grown[0], beyond & grown[1]]
    if not sides[0].any():
        raise DiffEchoError(
            "the LV cavity meets neither atrium nor, below its middle, background: no mitral plane "
            "and no long axis; leave the frame out"
        )
    base = np.mean([_points(side, spacing).mean(0) for side in sides], axis=0)
    points = _points(mask == LABELS[chamber], spacing)
    return base, points[np.argmax(((points - base) ** 2).sum(1))]


def disk_diameters(mask, spacing=(1.0, 1.0), chamber="LV cavity"):
    """(diameters, length): the chamber's width across each of 20 equal slices of its long axis.

    diameters: (20,) mm from the mitral plane to the tip (a slice's area over its thickness);
    length: mm. Raises DiffEchoError as `long_axis` does.
    """
    base, tip = long_axis(mask, spacing, chamber)
    length = float(np.linalg.norm(tip - base))
    points = _points(np.asarray(mask) == LABELS[chamber], spacing)
    along = (points - base) @ (tip - base) / length**2
    slices = np.clip((along * DISKS).astype(int), 0, DISKS - 1)
    pixel = spacing[0] * spacing[1]
    return np.bincount(slices, minlength=DISKS) * pixel / (length / DISKS), length


def disk_volume(diameters_2ch, diameters_4ch, length):
    """Volume in mL of a stack of elliptic disks: diameters (20,) mm in each view, height of all in mm."""
    return float(np.pi / 4 * (diameters_2ch * diameters_4ch).sum() * length / DISKS / 1000)


def biplane_volume(
    mask_2ch, mask_4ch, spacing_2ch=(1.0, 1.0), spacing_4ch=(1.0, 1.0), chamber="LV cavity"
):
    """Volume of a chamber in mL from the two views of one phase, by disks as high as the longer axis.

    With `chamber="LA"` the left atrium's; with one label map given for both views the single-plane
    volume. Without spacing the unit is a thousand cubic pixels.
    """
    diameters_2ch, length_2ch = disk_diameters(mask_2ch, spacing_2ch, chamber)
    diameters_4ch, length_4ch = disk_diameters(mask_4ch, spacing_4ch, chamber)
    return disk_volume(diameters_2ch, diameters_4ch, max(length_2ch, length_4ch))


def ejection_fraction(end_diastolic_volume, end_systolic_volume):
    """Share of the end-diastolic volume that leaves the ventricle, in per cent."""
    return 100 * (end_diastolic_volume - end_systolic_volume) / end_diastolic_volume


def patients_ef(masks, table, one_height=False):
    """Biplane volumes and EF of every patient with all four frames: columns patient, edv, esv, ef.

    masks: (N, H, W), whoever drew them, of the frames in `table`. Volumes are in mL, NaN where the
    pixel spacing is unknown; the EF is a ratio and needs none. All are NaN for a patient with a label
    map that has no long axis (no cavity, say): `checks` names it.

    The recommendations measure the axis anew in each phase, so that its shortening is part of the
    EF: the default. With `one_height` both phases have disks as high as the longest of the four
    axes, as in CAMUS's public evaluation script: the shortening drops out, and the EF is lower.
    Only so do CAMUS's label maps give about the published half of patients at or below 45 %.
    """
    masks, rows = np.asarray(masks), []
    for patient, group in table.reset_index(drop=True).groupby("patient"):
        classes = list(zip(group["view"], group["phase"], strict=True))
        if len(set(classes)) < len(CLASSES):
            continue
        sizes = group[["lateral_mm", "depth_mm"]].to_numpy(dtype=float)
        known = np.isfinite(sizes).all()
        if not known:
            sizes = np.ones_like(sizes)
        try:
            measured = map(disk_diameters, masks[group.index], sizes)
            disks = dict(zip(classes, measured, strict=True))
        except DiffEchoError:
            rows.append((patient, np.nan, np.nan, np.nan))
            continue
        height = {phase: max(disks[view, phase][1] for view in VIEWS) for phase in PHASES}
        if one_height:
            height = dict.fromkeys(PHASES, max(height.values()))
        edv, esv = (
            disk_volume(*(disks[view, phase][0] for view in VIEWS), height[phase])
            for phase in PHASES
        )
        unit = 1.0 if known else np.nan
        rows.append((patient, edv * unit, esv * unit, ejection_fraction(edv, esv)))
    return pd.DataFrame(rows, columns=["patient", "edv", "esv", "ef"])


def _points(region, spacing):
    """(N, 2) positions (lateral, depth) in mm of the pixels where `region` (H, W) is true."""
    rows, columns = np.nonzero(region)
    return np.stack([columns * spacing[0], rows * spacing[1]], axis=1)
