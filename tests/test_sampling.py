"""Samples are fixed by their seeds; a synthetic set is whole, resumable and readable."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
)
from PIL import Image

from diffecho_utils import (
    DiffEchoError,
    assets,
    camus,
    checkpoints,
    downstream,
    models,
    results,
    sampling,
    synthetic,
)
from diffecho_utils.__main__ import main


@pytest.fixture(scope="module")
def generator(smoke):
    torch.manual_seed(0)
    vae = models.build_autoencoder(smoke).eval()
    denoiser = models.Unconditional([models.build_unconditional(smoke) for _ in camus.CLASSES])
    scheduler = models.build_scheduler()
    return checkpoints.Generator("unconditional", denoiser.eval(), scheduler, vae, (4, 8, 8))


@pytest.fixture(scope="module")
def checkpoint(generator, tmp_path_factory):
    """The generator as `train` would have left it, for the command line."""
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints.save([("", generator.vae)], folder / "autoencoder", {"model": "autoencoder"})
    parts = list(zip(camus.CLASS_NAMES, generator.denoiser.unets, strict=True))
    facts = {"model": "unconditional", "latent_side": 8, "world": "phantom", "profile": "smoke"}
    needs = {"autoencoder": folder / "autoencoder"}
    scheduler = ("scheduler", generator.scheduler)
    checkpoints.save([*parts, scheduler], folder / "unconditional", facts, needs)
    return folder / "unconditional"


@pytest.fixture(scope="module")
def sdm(smoke):
    torch.manual_seed(0)
    vae, unet = models.build_autoencoder(smoke).eval(), models.build_sdm(smoke).eval()
    for parameter in unet.parameters():  # untrained, its last layers are zero: it would ignore maps
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    denoiser = models.SemanticDiffusion(unet)
    return checkpoints.Generator("sdm", denoiser, models.build_scheduler(), vae, (4, 8, 8))


def pixels(folder):
    """{name: grey values} of a set's images, metadata or not."""
    return {p.name: np.asarray(Image.open(p), int) for p in (folder / "images").glob("[!.]*")}


def write(generator, folder, count, steps, **settings):
    return synthetic.write(
        generator, folder, *synthetic.plan("unconditional", count), steps, **settings
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


@pytest.mark.parametrize(
    "solver",
    [DDPMScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler],
    ids=lambda solver: solver.__name__,
)
def test_solvers_that_add_noise_draw_the_same_image_in_any_batch(generator, solver):
    changes = {"algorithm_type": "sde-dpmsolver++"} if solver.__name__.startswith("DPM") else {}
    scheduler = solver.from_config(generator.scheduler.config, **changes)
    settings = {"scheduler": scheduler, "classes": [0, 1, 2]}
    together = sampling.sample(generator, [5, 6, 7], 4, **settings)
    by_two = sampling.sample(generator, [5, 6, 7], 4, batch=2, **settings)
    alone = sampling.sample(generator, [6], 4, scheduler=scheduler, classes=[1])
    torch.testing.assert_close(together, by_two, atol=1e-4, rtol=0)
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=0)
    plain = sampling.sample(generator, [6], 4, classes=[1])
    assert not torch.allclose(alone, plain, atol=1e-3)


def test_fresh_noise_is_not_the_initial_noise_again(generator):
    class Drawer(DDIMScheduler):
        drawn = []

        def step(self, prediction, timestep, latents, generator=None):
            fresh = [torch.randn(latents.shape[1:], generator=g) for g in generator]
            self.drawn += [latents, torch.stack(fresh)]
            return super().step(prediction, timestep, latents)

    drawer = Drawer.from_config(generator.scheduler.config)
    sampling.sample(generator, [3, 4], 1, scheduler=drawer, classes=[0, 0])
    start, fresh = drawer.drawn
    assert torch.equal(start, sampling.initial_noise([3, 4], (4, 8, 8)))
    correlation = torch.corrcoef(torch.stack([start.flatten(), fresh.flatten()]))[0, 1]
    assert abs(correlation) < 0.2 and not torch.equal(fresh[0], fresh[1])


def test_guidance_keeps_to_its_interval(sdm):
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[:, 16:48, 16:48] = 1

    def draw(guidance, interval=None):
        settings = {"guidance": guidance, "guidance_interval": interval}
        ddim = DDIMScheduler.from_config(sdm.scheduler.config, timestep_spacing="trailing")
        return sampling.sample(sdm, [1, 2], 4, scheduler=ddim, masks=masks, **settings)

    plain, strong = draw(1.0), draw(5.0)  # timesteps 999, 749, 499, 249
    torch.testing.assert_close(draw(5.0, (0, 999)), strong)
    torch.testing.assert_close(draw(5.0, (249, 999)), strong)
    torch.testing.assert_close(draw(5.0, (500, 700)), plain)
    for interval in ((250, 999), (0, 998)):
        part = draw(5.0, interval)
        assert not torch.allclose(part, strong, atol=1e-4)
        assert not torch.allclose(part, plain, atol=1e-4)
    for interval in ((700, 300), (-1, 300), (0, 1000)):
        with pytest.raises(DiffEchoError, match="give the lower timestep first"):
            draw(5.0, interval)


def test_class_changes_the_image(generator):
    images = sampling.sample(generator, [1, 1], 3, classes=[0, 3])
    assert not torch.allclose(images[0], images[1], atol=1e-3)


def test_synthetic_set_resumes_to_the_same_files(generator, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    table = write(generator, whole, 2, 2, seed=3, batch=3)
    assert list(table.columns) == synthetic.METADATA and len(table) == 8
    assert table.groupby(["view", "phase"]).size().to_dict() == dict.fromkeys(camus.CLASSES, 2)
    assert table["seed"].tolist() == list(range(3, 11))

    def killed(done, total):
        if done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(generator, parts, 2, 2, seed=3, batch=3, progress=killed)
    assert not (parts / "metadata.csv").exists() and len(list((parts / "images").iterdir())) == 3
    with pytest.raises(DiffEchoError, match="run it again to finish"):
        synthetic.read(parts, 64)
    write(generator, parts, 2, 2, seed=3, batch=3)
    names = sorted(p.name for p in (whole / "images").iterdir())
    assert names == sorted(p.name for p in (parts / "images").iterdir()) and len(names) == 8
    for name in [f"images/{name}" for name in names] + ["metadata.csv", "README.md"]:
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    with pytest.raises(DiffEchoError, match=r"other settings \(steps\)"):
        write(generator, whole, 2, 5, seed=3)


def test_a_hole_is_filled_by_the_same_image_and_nothing_else_is_touched(generator, tmp_path):
    write(generator, tmp_path, 2, 2, batch=3)
    before = {path: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    lost = tmp_path / "images" / "000004.png"
    lost.unlink()
    leftover = tmp_path / "images" / ".000004.png.99"
    leftover.write_bytes(b"half of it")
    times = {path: path.stat().st_mtime_ns for path in before if path != lost}
    told = []
    write(generator, tmp_path, 2, 2, batch=3, progress=lambda *done: told.append(done))
    assert told == [(8, 8)] and not leftover.exists()
    assert {path: path.read_bytes() for path in (tmp_path / "images").iterdir()} == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_set_belongs_to_its_settings_and_weights(generator, tmp_path):
    write(generator, tmp_path, 1, 2)
    other = models.Unconditional([*generator.denoiser.unets[1:], generator.denoiser.unets[0]])
    with pytest.raises(DiffEchoError, match=r"other settings \(generator\)"):
        write(replace(generator, denoiser=other), tmp_path, 1, 2)
    with pytest.raises(DiffEchoError, match=r"other settings \(solver\).*--restart"):
        write(generator, tmp_path, 1, 2, solver="DDIM")
    with pytest.raises(DiffEchoError, match="no solver 'Heun'; choose one of DDPM, DDIM"):
        write(generator, tmp_path, 1, 2, solver="Heun")
    for wrong in ({"guidance": 2.0}, {"guidance_interval": (9, 3)}):
        with pytest.raises(DiffEchoError):
            write(generator, tmp_path / "new", 1, 2, **wrong)
    assert not (tmp_path / "new").exists(), "a mistake must not claim the folder"
    (tmp_path / "dataset.json").write_text('{"settings"')
    with pytest.raises(DiffEchoError, match="half-written"):
        write(generator, tmp_path, 1, 2)


@pytest.mark.parametrize(
    "facts, licence, cite",
    [
        ({"world": "phantom"}, "cc0-1.0", False),
        ({"world": "camus"}, "cc-by-nc-sa-4.0", True),
        ({"world": "phantom", "masks_world": "camus"}, "cc-by-nc-sa-4.0", True),
        ({"world": "elsewhere"}, "other", False),
        ({}, "other", False),
    ],
)
def test_card_carries_the_licence_of_the_data(generator, tmp_path, facts, licence, cite):
    write(generator, tmp_path, 1, 1, facts=facts)
    card = (tmp_path / "README.md").read_text()
    assert f"license: {licence}\n" in card and "Not for clinical use" in card
    assert ("10.1109/TMI.2019.2900516" in card) == cite
    assert "| 4CH-ES | 1 |" in card and "| steps | 1 |" in card
    counts = json.loads((tmp_path / "dataset.json").read_text())["counts"]
    assert counts == dict.fromkeys(camus.CLASS_NAMES, 1)


def test_a_set_is_thrown_away_when_asked(generator, tmp_path):
    before = write(generator, tmp_path / "set", 2, 2)
    after = write(generator, tmp_path / "set", 1, 2, solver="DDIM", restart=True)
    assert len(before) == 8 and len(after) == 4 == len(
        list((tmp_path / "set" / "images").iterdir())
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("no set")
    write(generator, tmp_path / "mine", 1, 2, restart=True)
    assert (tmp_path / "mine" / "notes.txt").exists(), "only a set is thrown away"


def test_datasets_reads_the_image_folder(generator, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    write(generator, tmp_path / "set", 1, 2)
    folder = str(tmp_path / "set")
    found = datasets.load_dataset(
        "imagefolder", data_dir=folder, split="train", cache_dir=str(tmp_path / "cache")
    )
    table = pd.read_csv(tmp_path / "set" / "metadata.csv")
    assert found["prompt"] == table["prompt"].tolist() and found["seed"] == table["seed"].tolist()
    assert found[0]["image"].mode == "L" and found[0]["image"].size == (64, 64)


@pytest.mark.parametrize("world", ["camus", "phantom"])
def test_shipped_sets_are_whole_and_drawn_by_the_shipped_generators(world):
    """The first image of each set is drawn again; a grey level is what another machine may differ by."""
    folder = assets.root() / "data" / "synthetic" / world / "text-seg"
    images, table = synthetic.read(folder, 128)
    maps, settings = synthetic.read_label_maps(folder, table, 128), synthetic.read_settings(folder)
    assert camus.class_index(table).tolist() == sorted(camus.class_index(table).tolist())
    assert len(images) == len(maps) >= 100 and set(maps.unique().tolist()) == {0, 1, 2, 3}
    generator = checkpoints.load_generator(assets.checkpoint(world, "text-seg"))
    assert settings["generator"] == synthetic.digest(generator) and settings["world"] == world
    again = sampling.sample(
        generator,
        table["seed"][:1],
        settings["steps"],
        guidance=settings["guidance"],
        prompts=table["prompt"][:1],
        masks=maps[:1],
    )
    assert (127.5 * (again.clamp(-1, 1) - images[:1])).abs().max() < 1.5


SAMPLE = ["sample", "unconditional", "--n", "3", "--steps", "12", "--batch", "2", "--seed", "5"]


def test_killed_run_goes_on_as_if_nothing_had_happened(checkpoint, tmp_path):
    """SIGKILL at any moment: no image lost, none twice, all as in a run that was left alone."""
    arguments = [*SAMPLE, "--checkpoint", str(checkpoint), "--out"]
    command = [sys.executable, "-m", "diffecho_utils", *arguments, str(tmp_path / "killed")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    images = tmp_path / "killed" / "images"
    while process.poll() is None and time.monotonic() < deadline:
        if images.is_dir() and any(images.glob("[!.]*.png")):
            break
        time.sleep(0.005)
    process.kill()
    process.wait()
    there = {path.name: path.read_bytes() for path in images.glob("[!.]*.png")}
    assert 0 < len(there) < 12 and not (tmp_path / "killed" / "metadata.csv").exists()
    assert main([*arguments, str(tmp_path / "killed")]) == 0
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    assert {name: (images / name).read_bytes() for name in there} == there
    found, expected = pixels(tmp_path / "killed"), pixels(tmp_path / "whole")
    assert sorted(p.name for p in images.iterdir()) == sorted(expected) and len(expected) == 12
    assert max(abs(found[name] - expected[name]).max() for name in expected) <= 1
    tables = [pd.read_csv(tmp_path / k / "metadata.csv") for k in ("killed", "whole")]
    pd.testing.assert_frame_equal(*tables)
    assert tables[0]["file_name"].is_unique and tables[0]["seed"].tolist() == list(range(5, 17))


def test_label_maps_of_the_first_patients_only(phantom_root, tmp_path, capsys):
    """What a generator of few patients draws must not show the label maps of others."""
    shipped = assets.checkpoint("phantom", "text-seg")
    command = ["sample", "text-seg", "--checkpoint", str(shipped), "--masks", str(phantom_root)]
    command += ["--n", "2", "--steps", "1", "--patients"]
    assert main([*command, "1", "--out", str(tmp_path / "set")]) == 0
    maps = [
        np.asarray(Image.open(path)) for path in sorted((tmp_path / "set/label_maps").iterdir())
    ]
    assert len(maps) == 8 and all((maps[i] == maps[i + 1]).all() for i in range(0, 8, 2))
    assert synthetic.read_settings(tmp_path / "set")["masks_patients"] == 1
    assert main([*command, "99", "--out", str(tmp_path / "none")]) == 1
    assert "99 were asked for" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_two_processes_write_one_set(checkpoint, tmp_path):
    arguments = [*SAMPLE, "--checkpoint", str(checkpoint), "--out"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]  # gloo: no GPUs
    settings = "--num_processes=2 --num_machines=1 --mixed_precision=no --dynamo_backend=no"
    port = "--main_process_port=0"
    command = [*launch, *settings.split(), port, "-m", "diffecho_utils"]
    done = subprocess.run(
        [*command, *arguments, str(tmp_path / "two")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("wrote 12 images") == 1, "the main process alone says so"
    assert main([*arguments, str(tmp_path / "one")]) == 0
    two, one = pixels(tmp_path / "two"), pixels(tmp_path / "one")
    assert two.keys() == one.keys() and len(one) == 12
    assert max(abs(two[name] - one[name]).max() for name in one) <= 1
    tables = [(tmp_path / k / "metadata.csv").read_text() for k in ("two", "one")]
    assert tables[0] == tables[1]


def test_a_process_draws_its_share_only(generator, tmp_path, monkeypatch):
    """And the main process does not call a set whole that lacks another's share."""

    class Second:
        process_index, num_processes, is_main_process = 1, 2, False

        def wait_for_everyone(self):
            pass

    monkeypatch.setattr(models, "processes", Second)
    write(generator, tmp_path, 2, 1, batch=2)
    assert sorted(pixels(tmp_path)) == [f"{i:06d}.png" for i in (2, 3, 6, 7)]
    assert not (tmp_path / "metadata.csv").exists()
    Second.process_index, Second.is_main_process = 0, True
    with pytest.raises(DiffEchoError, match="2 of 8 images are missing"):
        write(generator, tmp_path, 2, 1, batch=2)
    assert not (tmp_path / "metadata.csv").exists()


def test_bad_synthetic_sets_are_named(generator, tmp_path):
    write(generator, tmp_path, 1, 2)
    images, table = synthetic.read(tmp_path, 32)
    assert images.shape == (4, 1, 32, 32) and len(table) == 4
    assert synthetic.read(tmp_path)[0].shape[-1] == synthetic.own_side(tmp_path) == 64
    with pytest.raises(DiffEchoError, match="images of 64 px, and 128 px are asked for"):
        synthetic.read(tmp_path, 128)
    path = tmp_path / table["file_name"][1]
    whole = path.read_bytes()
    Image.open(path).convert("RGB").save(path)
    with pytest.raises(DiffEchoError, match="mode RGB"):
        synthetic.read(tmp_path, 64)
    path.write_bytes(whole[:60])
    with pytest.raises(DiffEchoError, match="unreadable"):
        synthetic.read(tmp_path, 64)
    path.unlink()
    with pytest.raises(DiffEchoError, match="000001.png"):
        synthetic.read(tmp_path, 64)
    (tmp_path / "metadata.csv").write_text("file_name\n")
    with pytest.raises(DiffEchoError, match="lacks the columns"):
        synthetic.read(tmp_path, 64)


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
    assert main(train) == 0
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


def test_label_maps_are_refused_where_nobody_reads_them(checkpoint, phantom_root, tmp_path, capsys):
    """Else the card would name a source, and so a licence, that was not used."""
    sample = ["sample", "unconditional", "--checkpoint", str(checkpoint), "--masks", phantom_root]
    assert main([*sample, "--out", str(tmp_path / "set")]) == 1
    assert "unconditional is told no label maps" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_records_name_the_whole_command(phantom_root, tmp_path, monkeypatch):
    """With each setting, and without the folders of this machine."""
    kept = []
    monkeypatch.setattr(results, "save", lambda *_, command, **__: kept.append(command))
    arm = ["downstream", "segmentation", "--data", phantom_root, "--profile", "smoke"]
    arm += ["--test-data", phantom_root, "--steps", "2", f"--json={tmp_path / 'arm.json'}"]
    monkeypatch.setattr(downstream, "check_apart", lambda *_: None)
    split = ["--train-split", "all", "--test-split", "training"]
    assert main([*arm, *split, "--no-augmentation"]) == 0
    assert kept == [
        "python -m diffecho_utils downstream segmentation --data phantom --profile smoke --test-data "
        "phantom --steps 2 --json=arm.json --train-split all --test-split training --no-augmentation"
    ]


def test_label_maps_and_prompts_of_a_set(sdm, frames, tmp_path):
    """The SDM's set holds the label maps it drew to, class by class; text models' hold their prompts."""
    table, masks = synthetic.plan("sdm", 12, frames)
    assert len(table) == 48 and (table["prompt"] == "").all()
    written = synthetic.write(sdm, tmp_path, table[:3], masks[:3], 2)
    for name, mask in zip(written["label_map"], masks, strict=False):
        assert (torch.from_numpy(np.array(Image.open(tmp_path / name))) == mask).all()
    with pytest.raises(DiffEchoError, match="other settings"):
        synthetic.write(sdm, tmp_path, table[:3], masks[1:4], 2)
    with pytest.raises(DiffEchoError, match="needs label maps"):
        synthetic.plan("text-seg", 2)
    with pytest.raises(DiffEchoError, match="no label map of class 2CH-ES"):
        synthetic.plan("sdm", 2, frames.where(frames.table["phase"] == "ED"))
    with pytest.raises(DiffEchoError, match=r"label maps of \(32, 32\) pixels"):
        sampling.sample(sdm, [0], 2, masks=masks[:1, ::2, ::2])
    prompts, _ = synthetic.plan("text", 2, template="paper")
    assert "four-chamber" in prompts["prompt"].iloc[-1] and "es phase" in prompts["prompt"].iloc[-1]


def test_shipped_dials_are_the_measured_ones():
    """Strength and guidance in the checkpoints are those that experiments/strength.py chose."""
    chosen = results.load(assets.record("camus", "cpu", "strength"))["values"]["chosen"]
    folders = {name: assets.checkpoint("camus", name) for name in ("text-seg", "sdm")}
    shipped = {name: checkpoints.load_generator(folder) for name, folder in folders.items()}
    assert shipped["text-seg"].denoiser.strength == chosen["text-seg"]
    assert shipped["sdm"].guidance == chosen["sdm"]
