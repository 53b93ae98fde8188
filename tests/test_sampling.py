"""Samples are fixed by their seeds; a synthetic set is whole, resumable and readable."""

import json

import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from diffecho_utils import DiffEchoError, camus, models, sampling
from diffecho_utils.__main__ import main


@pytest.fixture(scope="module")
def generator(smoke):
    torch.manual_seed(0)
    vae = models.build_autoencoder(smoke).eval()
    denoiser = models.Unconditional([models.build_unconditional(smoke) for _ in camus.CLASSES])
    scheduler = models.build_scheduler()
    return models.Generator("unconditional", denoiser.eval(), scheduler, vae, (4, 8, 8))


def write(generator, folder, count, steps, **settings):
    return sampling.write_synthetic(
        generator, folder, *sampling.plan("unconditional", count), steps, **settings
    )


def test_seed_fixes_the_image_whatever_the_batch(generator):
    classes, seeds = [0, 1, 2, 3, 0], [5, 6, 7, 8, 9]
    together = sampling.sample(generator, seeds, 3, classes=classes)
    by_two = sampling.sample(generator, seeds, 3, classes=classes, batch=2)
    assert together.shape == (5, 1, 64, 64) and together.abs().max() <= 1
    torch.testing.assert_close(together, by_two, atol=1e-4, rtol=0)
    alone = sampling.sample(generator, seeds[3:4], 3, classes=classes[3:4])
    torch.testing.assert_close(together[3:4], alone, atol=1e-4, rtol=0)
    assert not torch.allclose(together[0], together[4], atol=1e-2)


def test_any_scheduler_and_progress(generator):
    told = []
    scheduler = DDIMScheduler.from_config(generator.scheduler.config)
    sampling.sample(
        generator, [0, 1, 2], 2, classes=[0, 1, 2],
        scheduler=scheduler, batch=2, progress=lambda *done: told.append(done),
    )  # fmt: skip
    assert told == [(2, 3), (3, 3)]
    with pytest.raises(DiffEchoError, match="2 classes for 3 seeds"):
        sampling.sample(generator, [0, 1, 2], 2, classes=[0, 1])
    with pytest.raises(DiffEchoError, match=r"is told \['classes'\], given \['masks'\]"):
        sampling.sample(generator, [0], 2, masks=torch.zeros(1, 64, 64, dtype=torch.uint8))
    with pytest.raises(DiffEchoError, match="no null condition; leave guidance at 1"):
        sampling.sample(generator, [0], 2, classes=[0], guidance=2)


def test_class_changes_the_image(generator):
    images = sampling.sample(generator, [1, 1], 3, classes=[0, 3])
    assert not torch.allclose(images[0], images[1], atol=1e-3)


def test_synthetic_set_resumes_to_the_same_files(generator, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    table = write(generator, whole, 2, 2, seed=3, batch=3)
    assert list(table.columns) == sampling.METADATA and len(table) == 8
    assert table.groupby(["view", "phase"]).size().to_dict() == dict.fromkeys(camus.CLASSES, 2)
    assert table["seed"].tolist() == list(range(3, 11))

    def killed(done, total):
        if done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(generator, parts, 2, 2, seed=3, batch=3, progress=killed)
    assert not (parts / "metadata.csv").exists() and len(list((parts / "images").iterdir())) == 3
    with pytest.raises(DiffEchoError, match="run it again to finish"):
        sampling.read_synthetic(parts, 64)
    write(generator, parts, 2, 2, seed=3, batch=3)
    names = sorted(p.name for p in (whole / "images").iterdir())
    assert names == sorted(p.name for p in (parts / "images").iterdir()) and len(names) == 8
    first, second = (sampling.read_synthetic(folder, 64)[0] for folder in (whole, parts))
    torch.testing.assert_close(first, second, atol=2 / 255, rtol=0)
    with pytest.raises(DiffEchoError, match="other settings"):
        write(generator, whole, 2, 5, seed=3)


def test_image_folder_is_what_datasets_expects(generator, tmp_path):
    write(generator, tmp_path, 1, 2)
    table = pd.read_csv(tmp_path / "metadata.csv")
    assert table.columns[0] == "file_name" and all(
        (tmp_path / n).is_file() for n in table["file_name"]
    )
    assert (
        json.loads((tmp_path / "dataset.json").read_text())["settings"]["model"] == "unconditional"
    )
    assert Image.open(tmp_path / table["file_name"][0]).mode == "L"


def test_bad_synthetic_sets_are_named(generator, tmp_path):
    write(generator, tmp_path, 1, 2)
    images, table = sampling.read_synthetic(tmp_path, 32)
    assert images.shape == (4, 1, 32, 32) and len(table) == 4
    path = tmp_path / table["file_name"][1]
    whole = path.read_bytes()
    Image.open(path).convert("RGB").save(path)
    with pytest.raises(DiffEchoError, match="mode RGB"):
        sampling.read_synthetic(tmp_path, 64)
    path.write_bytes(whole[:60])
    with pytest.raises(DiffEchoError, match="unreadable"):
        sampling.read_synthetic(tmp_path, 64)
    path.unlink()
    with pytest.raises(DiffEchoError, match="000001.png"):
        sampling.read_synthetic(tmp_path, 64)
    (tmp_path / "metadata.csv").write_text("file_name\n")
    with pytest.raises(DiffEchoError, match="lacks the columns"):
        sampling.read_synthetic(tmp_path, 64)


def test_command_line_from_training_to_evaluation(broken_root, tmp_path, capsys):
    """The whole road: train, resume, sample, evaluate, on a phantom with half its patients held out."""
    patients = sorted(p.name for p in (broken_root / "database_nifti").iterdir())
    for split, part in (("training", patients[:5]), ("validation", patients[5:])):
        path = broken_root / "database_split" / f"subgroup_{split}.txt"
        path.write_text("\n".join(part) + "\n")
    (broken_root / "database_split" / "subgroup_testing.txt").unlink()
    data = ["--data", str(broken_root), "--profile", "smoke"]
    autoencoder, out, synthetic = (str(tmp_path / n) for n in ("ae", "unconditional", "synthetic"))
    assert main(["train", "autoencoder", *data, "--out", autoencoder]) == 0
    train = ["train", "unconditional", *data, "--autoencoder", autoencoder, "--out", out]
    assert main(train) == 0
    assert main([*train, "--resume"]) == 0
    assert "resumed at step 4 of 4" in capsys.readouterr().out
    sample = ["sample", "unconditional", "--checkpoint", out, "--out", synthetic, "--n", "4"]
    assert main([*sample, "--steps", "2"]) == 0
    report = tmp_path / "report.json"
    evaluate = ["evaluate", synthetic, *data, "--autoencoder", autoencoder, "--json", str(report)]
    assert main(evaluate) == 0
    record = json.loads(report.read_text())
    assert record["world"] == "phantom" and record["split"] == "validation"
    assert record["values"]["all"]["distance"] > record["values"]["all"]["floor"] > 0
    assert main(["evaluate", str(tmp_path), *data, "--autoencoder", autoencoder]) == 1
    assert "metadata.csv: missing" in capsys.readouterr().err


def test_label_maps_and_prompts_of_a_set(smoke, frames, tmp_path):
    """The SDM's set holds the label maps it drew to, class by class; text models' hold their prompts."""
    torch.manual_seed(0)
    vae, unet = models.build_autoencoder(smoke).eval(), models.build_sdm(smoke).eval()
    scheduler, denoiser = models.build_scheduler(), models.SemanticDiffusion(unet)
    sdm = models.Generator("sdm", denoiser, scheduler, vae, (4, 8, 8))
    table, masks = sampling.plan("sdm", 12, frames)
    assert len(table) == 48 and (table["prompt"] == "").all()
    written = sampling.write_synthetic(sdm, tmp_path, table[:3], masks[:3], 2)
    for name, mask in zip(written["label_map"], masks, strict=False):
        assert (
            torch.tensor(list(Image.open(tmp_path / name).get_flattened_data())) == mask.flatten()
        ).all()
    with pytest.raises(DiffEchoError, match="other settings"):
        sampling.write_synthetic(sdm, tmp_path, table[:3], masks[1:4], 2)
    with pytest.raises(DiffEchoError, match="needs label maps"):
        sampling.plan("text-seg", 2)
    with pytest.raises(DiffEchoError, match="no label map of class 2CH-ES"):
        sampling.plan("sdm", 2, frames.where(frames.table["phase"] == "ED"))
    with pytest.raises(DiffEchoError, match=r"label maps of \(32, 32\) pixels"):
        sampling.sample(sdm, [0], 2, masks=masks[:1, ::2, ::2])
    prompts, _ = sampling.plan("text", 2, template="paper")
    assert "four-chamber" in prompts["prompt"].iloc[-1] and "es phase" in prompts["prompt"].iloc[-1]
