"""Samples are fixed by their seeds; a synthetic set is whole, resumable and readable."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from diffecho_utils import (
    DiffEchoError,
    assets,
    camus,
    checkpoints,
    data,
    downstream,
    models,
    results,
    sampling,
    synthetic,
)
from diffecho_utils.__main__ import main

SAMPLE = ["sample", "unconditional", "--n", "3", "--steps", "12", "--batch", "2", "--seed", "5"]


@pytest.fixture(scope="module")
def checkpoint(trained):
    return trained["unconditional"]


@pytest.fixture(scope="module")
def generator(checkpoint):
    return checkpoints.load_generator(checkpoint)


@pytest.fixture(scope="module")
def sdm(trained):
    return checkpoints.load_generator(trained["sdm"])


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """The set that SAMPLE makes where nothing goes wrong."""
    folder = tmp_path_factory.mktemp("sets") / "whole"
    assert main([*SAMPLE, "--checkpoint", str(checkpoint), "--out", str(folder)]) == 0
    return folder


def write(generator, folder, count, steps, **settings):
    planned = synthetic.plan("unconditional", count)
    return synthetic.write(generator, folder, *planned, steps, **settings)


def contents(folder):
    """{name: bytes} of a set's images, metadata or not."""
    return {path.name: path.read_bytes() for path in (folder / "images").glob("[!.]*")}


def check_same(folder, whole):
    """The same set, up to the grey level that another grouping of the arithmetic may make."""
    pixels = [
        {path.name: np.asarray(Image.open(path), int) for path in (one / "images").iterdir()}
        for one in (folder, whole)
    ]
    assert pixels[0].keys() == pixels[1].keys() and len(pixels[0]) == 12
    assert max(abs(pixels[0][name] - image).max() for name, image in pixels[1].items()) <= 1
    assert (folder / "metadata.csv").read_text() == (whole / "metadata.csv").read_text()


def test_seed_and_class_fix_the_image_whatever_the_batch(generator):
    classes, seeds, told = [0, 1, 2, 3, 0, 3], [5, 6, 7, 8, 9, 5], []
    progress = {"progress": lambda *done: told.append(done)}
    together = sampling.sample(generator, seeds, 3, classes=classes)
    by_four = sampling.sample(generator, seeds, 3, classes=classes, batch=4, **progress)
    assert together.shape == (6, 1, 64, 64) and together.abs().max() <= 1
    assert told == [(4, 6, "images"), (6, 6, "images")]
    torch.testing.assert_close(together, by_four, atol=1e-4, rtol=0)
    alone = sampling.sample(generator, seeds[3:4], 3, classes=classes[3:4])
    torch.testing.assert_close(together[3:4], alone, atol=1e-4, rtol=0)
    assert not torch.allclose(together[0], together[4], atol=1e-2), "another seed"
    assert not torch.allclose(together[0], together[5], atol=1e-3), "another class"


def test_conditions_that_do_not_fit_are_named(generator, sdm, frames):
    for model, settings, said in (
        (generator, {"classes": [0, 1]}, "2 classes for 1 seeds"),
        (generator, {"masks": frames.masks[:1]}, r"is told \['classes'\], given \['masks'\]"),
        (sdm, {"masks": frames.masks[:1, ::2, ::2]}, r"label maps of \(32, 32\) pixels"),
    ):
        with pytest.raises(DiffEchoError, match=said):
            sampling.sample(model, [0], 2, **settings)


@pytest.mark.parametrize("solver", ["DDPM", "EulerAncestralDiscrete", "DPMSolverMultistep"])
def test_solvers_that_add_noise_draw_the_same_image_in_any_batch(generator, solver):
    changes = {"algorithm_type": "sde-dpmsolver++"} if solver.startswith("DPM") else {}
    kind = getattr(diffusers, f"{solver}Scheduler")
    scheduler = kind.from_config(generator.scheduler.config, **changes)
    settings = {"scheduler": scheduler, "classes": [0, 1, 2]}
    together = sampling.sample(generator, [5, 6, 7], 4, **settings)
    by_two = sampling.sample(generator, [5, 6, 7], 4, batch=2, **settings)
    torch.testing.assert_close(together, by_two, atol=1e-4, rtol=0)
    plain = sampling.sample(generator, [6], 4, classes=[1])
    assert not torch.allclose(together[1:2], plain, atol=1e-3)


def test_fresh_noise_is_not_the_initial_noise_again(generator):
    class Drawer(diffusers.DDIMScheduler):
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


def test_drawing_can_begin_with_pictures(generator, frames):
    images, told = frames.images[:4], {"classes": frames.classes[:4]}

    def off(timestep, seed=0, **settings):
        seeds = seed + np.arange(4)
        start = images, timestep
        drawn = sampling.sample(generator, seeds, 20, start=start, **settings, **told)
        return (drawn - rebuilt).abs().mean().item(), drawn

    rebuilt = data.decode(generator.vae, data.encode(generator.vae, images))
    (near, drawn), (far, _) = off(60), off(900)
    assert near < far
    torch.testing.assert_close(off(60, batch=3)[1], drawn, atol=1e-4, rtol=0)
    assert not torch.allclose(off(60, seed=9)[1], drawn, atol=1e-3), "another seed"
    for solver in sampling.SOLVERS.values():
        begun = off(60, scheduler=solver.from_config(generator.scheduler.config))
        assert begun[0] < far
    with pytest.raises(DiffEchoError, match="start at timestep 5: .* the lowest step is"):
        off(5)


def test_guidance_keeps_to_its_interval(sdm):
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[:, 16:48, 16:48] = 1
    spacing = {"timestep_spacing": "trailing"}  # timesteps 999, 749, 499, 249
    ddim = diffusers.DDIMScheduler.from_config(sdm.scheduler.config, **spacing)

    def draw(guidance, interval=None):
        settings = {"guidance": guidance, "guidance_interval": interval, "scheduler": ddim}
        return sampling.sample(sdm, [1, 2], 4, masks=masks, **settings)

    plain, strong = draw(1.0), draw(5.0)
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


def test_an_interrupted_set_goes_on_to_the_same_files(generator, tmp_path):
    """Also one with a hole: it is filled with the same image, and nothing else is touched."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    table = write(generator, whole, 2, 2, seed=3, batch=3)
    assert list(table.columns) == synthetic.METADATA and len(table) == 8
    assert table.groupby(["view", "phase"]).size().to_dict() == dict.fromkeys(camus.CLASSES, 2)
    assert table["seed"].tolist() == list(range(3, 11))
    counts = json.loads((whole / "dataset.json").read_text())["counts"]
    assert counts == dict.fromkeys(camus.CLASS_NAMES, 2)

    def killed(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(generator, parts, 2, 2, seed=3, batch=3, progress=killed)
    assert not (parts / "metadata.csv").exists() and len(contents(parts)) == 3
    with pytest.raises(DiffEchoError, match="run it again to finish"):
        synthetic.read(parts, 64)
    write(generator, parts, 2, 2, seed=3, batch=3)
    assert contents(parts) == contents(whole)
    for name in ("metadata.csv", "README.md"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    (parts / "images" / "000004.png").unlink()
    (parts / "images" / ".000004.png.99").write_bytes(b"half of it")
    times = {path: path.stat().st_mtime_ns for path in (parts / "images").glob("0*.png")}
    told = []
    write(generator, parts, 2, 2, seed=3, batch=3, progress=lambda *done: told.append(done))
    assert told == [(n, 8, "images") for n in (3, 6, 8)]
    assert contents(parts) == contents(whole)
    assert len(list((parts / "images").iterdir())) == 8, "no half file"
    assert {path: path.stat().st_mtime_ns for path in times} == times and len(times) == 7


def test_a_set_belongs_to_its_settings_and_weights(generator, tmp_path):
    folder = tmp_path / "set"
    write(generator, folder, 2, 2)
    unets = generator.denoiser.unets
    other = replace(generator, denoiser=models.Unconditional([*unets[1:], unets[0]]))
    for model, steps, changes, said in (
        (other, 2, {}, r"other settings \(generator\)"),
        (generator, 5, {}, r"other settings \(steps\)"),
        (generator, 2, {"solver": "DDIM"}, r"other settings \(solver\).*--restart"),
    ):
        with pytest.raises(DiffEchoError, match=said):
            write(model, folder, 2, steps, **changes)
    for wrong, said in (
        ({"solver": "Heun"}, "no solver 'Heun'; choose one of DDPM, DDIM"),
        ({"guidance_interval": (9, 3)}, "give the lower timestep first"),
    ):
        with pytest.raises(DiffEchoError, match=said):
            write(generator, tmp_path / "new", 1, 2, **wrong)
    assert not (tmp_path / "new").exists(), "a mistake must not claim the folder"
    (folder / "dataset.json").write_text('{"settings"')
    with pytest.raises(DiffEchoError, match="half-written"):
        write(generator, folder, 2, 2)
    assert len(write(generator, folder, 1, 2, solver="DDIM", restart=True)) == 4
    assert len(contents(folder)) == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("no set")
    write(generator, tmp_path / "mine", 1, 2, restart=True)
    assert (tmp_path / "mine" / "notes.txt").exists(), "only a set is thrown away"


@pytest.mark.parametrize(
    "facts, licence",
    [
        ({"world": "phantom"}, "cc0-1.0"),
        ({"world": "camus"}, "cc-by-nc-sa-4.0"),
        ({"world": "phantom", "masks_world": "camus"}, "cc-by-nc-sa-4.0"),
        ({"world": "elsewhere"}, "other"),
        ({}, "other"),
    ],
)
def test_card_carries_the_licence_of_the_data(tmp_path, facts, licence):
    described = {"settings": {"model": "sdm", "steps": 1, **facts}, "counts": {"4CH-ES": 3}}
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    card = synthetic.card(tmp_path)
    assert f"license: {licence}\n" in card and "Not for clinical use" in card
    assert ("10.1109/TMI.2019.2900516" in card) == ("camus" in facts.values())
    assert "| 4CH-ES | 3 |" in card and "| steps | 1 |" in card and "\n3 apical frames" in card


def test_shipped_set_is_whole_and_drawn_by_the_shipped_generator():
    """The first image is drawn again; a grey level is what another machine may differ by."""
    folder = assets.root() / "data" / "synthetic" / "camus" / "text-seg"
    images, table = synthetic.read(folder, 128)
    maps, settings = synthetic.read_label_maps(folder, table, 128), synthetic.read_settings(folder)
    assert camus.class_index(table).tolist() == sorted(camus.class_index(table).tolist())
    assert len(images) == len(maps) >= 100 and set(maps.unique().tolist()) == {0, 1, 2, 3}
    assert (folder / "README.md").read_text() == synthetic.card(folder)
    generator = checkpoints.load_generator(assets.checkpoint("camus", "text-seg"))
    assert settings["generator"] == synthetic.digest(generator) and settings["world"] == "camus"
    again = sampling.sample(
        generator,
        table["seed"][:1],
        settings["steps"],
        guidance=settings["guidance"],
        prompts=table["prompt"][:1],
        masks=maps[:1],
    )
    assert (127.5 * (again.clamp(-1, 1) - images[:1])).abs().max() < 1.5


def test_shipped_dials_are_the_measured_ones():
    """Strength and guidance in the checkpoints are those that experiments/strength.py chose."""
    chosen = results.load(assets.record("camus", "cpu", "strength"))["values"]["chosen"]
    folders = {name: assets.checkpoint("camus", name) for name in ("text-seg", "sdm")}
    shipped = {name: checkpoints.load_generator(folder) for name, folder in folders.items()}
    assert shipped["text-seg"].denoiser.strength == chosen["text-seg"]
    assert shipped["sdm"].guidance == chosen["sdm"]


def test_killed_run_goes_on_as_if_nothing_had_happened(checkpoint, whole, tmp_path):
    """SIGKILL at any moment: no image lost, none twice, all as in a run that was left alone."""
    arguments = [*SAMPLE, "--checkpoint", str(checkpoint), "--out", str(tmp_path)]
    command = [sys.executable, "-m", "diffecho_utils", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline and not contents(tmp_path):
        time.sleep(0.005)
    process.kill()
    process.wait()
    there = contents(tmp_path)
    assert 0 < len(there) < 12 and not (tmp_path / "metadata.csv").exists()
    assert main(arguments) == 0
    assert {name: contents(tmp_path)[name] for name in there} == there
    check_same(tmp_path, whole)
    table = pd.read_csv(tmp_path / "metadata.csv")
    assert table["file_name"].is_unique and table["seed"].tolist() == list(range(5, 17))


def test_two_processes_write_one_set(checkpoint, whole, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]  # gloo: no GPUs
    settings = "--num_processes=2 --num_machines=1 --mixed_precision=no --dynamo_backend=no"
    command = [*launch, *settings.split(), "--main_process_port=0", "-m", "diffecho_utils"]
    done = subprocess.run(
        [*command, *SAMPLE, "--checkpoint", str(checkpoint), "--out", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("wrote 12 images") == 1, "the main process alone says so"
    check_same(tmp_path, whole)


def test_a_process_draws_its_share_only(generator, tmp_path, monkeypatch):
    """And the main process does not call a set whole that lacks another's share."""

    class Process:
        process_index, num_processes, is_main_process = 0, 2, True

        def wait_for_everyone(self):
            pass

    monkeypatch.setattr(models, "processes", Process)
    told = []
    with pytest.raises(DiffEchoError, match="3 of 8 images are missing"):
        write(generator, tmp_path, 2, 1, batch=3, progress=lambda *done: told.append(done))
    assert not (tmp_path / "metadata.csv").exists()
    assert sorted(contents(tmp_path)) == [f"{i:06d}.png" for i in (0, 1, 2, 6, 7)]
    assert told == [(3, 5, "images"), (5, 5, "images")]
    Process.process_index, Process.is_main_process = 1, False
    write(generator, tmp_path, 2, 1, batch=3)
    assert len(contents(tmp_path)) == 8 and not (tmp_path / "metadata.csv").exists()


def test_datasets_reads_the_image_folder(whole, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    where = {"data_dir": str(whole), "cache_dir": str(tmp_path)}
    found = datasets.load_dataset("imagefolder", split="train", **where)
    table = pd.read_csv(whole / "metadata.csv")
    assert found["prompt"] == table["prompt"].tolist() and found["seed"] == table["seed"].tolist()
    assert found[0]["image"].mode == "L" and found[0]["image"].size == (64, 64)


def test_bad_synthetic_sets_are_named(generator, tmp_path):
    write(generator, tmp_path, 1, 2)
    images, table = synthetic.read(tmp_path, 32)
    assert images.shape == (4, 1, 32, 32) and len(table) == 4
    assert synthetic.read(tmp_path)[0].shape[-1] == synthetic.own_side(tmp_path) == 64
    path, metadata = tmp_path / table["file_name"][1], tmp_path / "metadata.csv"
    whole = path.read_bytes()

    def refused(said, side=64):
        with pytest.raises(DiffEchoError, match=said):
            synthetic.read(tmp_path, side)

    refused("images of 64 px, and 128 px are asked for", side=128)
    Image.open(path).resize((32, 64)).save(path)
    refused(r"several sizes \(.* 64 x 64, images/000001.png 32 x 64\)")
    Image.open(path).convert("RGB").save(path)
    refused("mode RGB")
    path.write_bytes(whole[:60])
    refused("unreadable")
    path.unlink()
    refused("000001.png.*missing")
    metadata.write_text(metadata.read_text().replace("4CH", "3CH"))
    refused(r"view and phase \[\('3CH', 'ED'\), .* known are")
    metadata.write_text("file_name\n")
    refused("lacks the columns")


def test_label_maps_and_prompts_of_a_set(sdm, frames, tmp_path):
    """The SDM's set holds the label maps it drew to, class by class; text models' hold their prompts."""
    table, masks = synthetic.plan("sdm", 12, frames)
    assert len(table) == 48 and (table["prompt"] == "").all()
    written = synthetic.write(sdm, tmp_path, table[:3], masks[:3], 2)
    assert torch.equal(synthetic.read_label_maps(tmp_path, written, 64), masks[:3])
    with pytest.raises(DiffEchoError, match="other settings"):
        synthetic.write(sdm, tmp_path, table[:3], masks[1:4], 2)
    with pytest.raises(DiffEchoError, match="needs label maps"):
        synthetic.plan("text-seg", 2)
    with pytest.raises(DiffEchoError, match="no label map of class 2CH-ES"):
        synthetic.plan("sdm", 2, frames.where(frames.table["phase"] == "ED"))
    synthetic.save_grey(np.full((64, 64), 9, np.uint8), tmp_path / written["label_map"][0])
    with pytest.raises(DiffEchoError, match="no label map, with values up to 9"):
        synthetic.read_label_maps(tmp_path, written, 64)
    prompts, _ = synthetic.plan("text", 2, template="paper")
    assert "four-chamber" in prompts["prompt"].iloc[-1] and "es phase" in prompts["prompt"].iloc[-1]


def test_label_maps_of_the_first_patients_only(checkpoint, trained, phantom_root, tmp_path, capsys):
    """What a generator of few patients draws must not show the label maps of others."""
    shipped = trained["text-seg"]
    command = ["sample", "text-seg", "--checkpoint", str(shipped), "--masks", str(phantom_root)]
    command += ["--n", "2", "--steps", "1", "--patients"]
    assert main([*command, "1", "--out", str(tmp_path / "set")]) == 0
    paths = sorted((tmp_path / "set/label_maps").iterdir())
    maps = [np.asarray(Image.open(path)) for path in paths]
    assert len(maps) == 8 and all((maps[i] == maps[i + 1]).all() for i in range(0, 8, 2))
    assert synthetic.read_settings(tmp_path / "set")["masks_patients"] == 1
    assert main([*command, "99", "--out", str(tmp_path / "none")]) == 1
    assert "99 were asked for" in capsys.readouterr().err and not (tmp_path / "none").exists()
    # refused where nobody reads them: else the card would name a source, and so a licence, not used
    command = ["sample", "unconditional", "--checkpoint", str(checkpoint), "--masks", phantom_root]
    assert main([*command, "--out", str(tmp_path / "none")]) == 1
    assert "unconditional is told no label maps" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_command_line_from_training_to_evaluation(parted_root, tmp_path, capsys):
    """The whole road: train, resume, sample, evaluate, on a phantom with four patients held out."""
    data = ["--data", str(parted_root), "--profile", "smoke"]
    autoencoder, out, drawn = (str(tmp_path / n) for n in ("ae", "unconditional", "synthetic"))
    assert main(["train", "autoencoder", *data, "--out", autoencoder]) == 0
    train = ["train", "unconditional", *data, "--autoencoder", autoencoder, "--out", out]
    assert main(train) == 0
    assert main(train) == 0
    assert "resumed at step 4 of 4" in capsys.readouterr().out
    sample = ["sample", "unconditional", "--checkpoint", out, "--out", drawn, "--n", "4"]
    assert main([*sample, "--steps", "2"]) == 0
    report = tmp_path / "report.json"
    evaluate = ["evaluate", drawn, *data, "--autoencoder", autoencoder, "--json", str(report)]
    assert main(evaluate) == 0
    record = json.loads(report.read_text())
    assert record["world"] == "phantom" and record["split"] == "validation"
    assert record["values"]["all"]["distance"] > record["values"]["all"]["floor"] > 0
    assert main(["evaluate", str(tmp_path), *data, "--autoencoder", autoencoder]) == 1
    assert "metadata.csv: missing" in capsys.readouterr().err


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
