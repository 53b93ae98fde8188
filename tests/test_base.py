"""The base: a Stable Diffusion 1.x in a folder or on the Hub; tried on a tiny one with random weights."""

import http.server
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DPMSolverMultistepScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file

from diffecho_utils import (
    DiffEchoError,
    base,
    checkpoints,
    models,
    profiles,
    sampling,
    training,
)
from diffecho_utils.__main__ import main


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny base for images of 64 pixels."""
    return base.tiny(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def broken(tiny, tmp_path):
    """A copy of the tiny base, to be broken."""
    return shutil.copytree(tiny, tmp_path / "broken")


def change(folder, path, **facts):
    config = json.loads((folder / path).read_text())
    (folder / path).write_text(json.dumps(config | facts))


def only_pickles(folder):
    weights = folder / base.WEIGHTS["unet"]
    weights.rename(weights.with_suffix(".bin"))


BROKEN = {
    "StableDiffusionXLPipeline": lambda b: change(
        b, "model_index.json", _class_name="StableDiffusionXLPipeline"
    ),
    "Stable Diffusion 2.x": lambda b: change(b, "unet/config.json", cross_attention_dim=1024),
    "prompts 768 wide, and a text encoder of 32": lambda b: change(
        b, "unet/config.json", cross_attention_dim=768
    ),
    "9 channels in": lambda b: change(b, "unet/config.json", in_channels=9),
    "no text_encoder/model.safetensors": lambda b: (b / base.WEIGHTS["text_encoder"]).unlink(),
    "only unet/diffusion_pytorch_model.bin, a pickle": only_pickles,
    "no tokenizer/merges.txt": lambda b: (b / "tokenizer/merges.txt").unlink(),
    "vae/config.json: half-written": lambda b: (b / "vae/config.json").write_text('{"a"'),
    "model.safetensors: half-written": lambda b: os.truncate(
        b / base.WEIGHTS["text_encoder"], 5000
    ),
}


@pytest.mark.parametrize("said", BROKEN)
def test_what_is_missing_or_of_another_family_is_named(broken, said):
    BROKEN[said](broken)
    with pytest.raises(DiffEchoError, match=said):
        base.folder_of(broken)


def test_weights_of_another_architecture_are_named(broken):
    change(broken, "unet/config.json", block_out_channels=[64, 64])
    with pytest.raises(DiffEchoError, match="broken/unet: .*different architectures"):
        base.load(broken, "unet")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as fetching a repository needs; `serve` gives it the repository's folder."""

    def __init__(self, *arguments, directory):
        self.files = {p.relative_to(directory).as_posix(): p for p in directory.glob("*/*")}
        self.files |= {"model_index.json": directory / "model_index.json"}
        super().__init__(*arguments)

    def do_GET(self):
        path, name = self.path.split("?")[0], self.path.split("/resolve/")[-1].split("/", 1)[-1]
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        if "/tree/" in path:
            rows = [
                {"type": "file", "path": n, "size": size, "oid": n} for n, size in sizes.items()
            ]
            self.answer(json.dumps(rows).encode())
        elif path.startswith("/api/models/"):
            self.answer(json.dumps({"id": "tiny/base", "sha": "a" * 40, "siblings": []}).encode())
        elif name in self.files:
            self.answer(self.files[name].read_bytes(), {"ETag": name, "X-Repo-Commit": "a" * 40})
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, body, headers=()):
        self.send_response(200)
        for header, value in (dict(headers) | {"Content-Length": str(len(body))}).items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_name_on_the_hub_is_fetched_once_and_works_offline(tiny, broken, serve, tmp_path):
    script = "import sys; from diffecho_utils import base; print(base.folder_of(sys.argv[1]))"

    def fetched(address, name="tiny/base"):
        where = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub")}
        return subprocess.run(
            [sys.executable, "-c", script, name],
            env=os.environ | where | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "1"},
            capture_output=True,
            text=True,
        )

    only_pickles(broken)
    with serve(broken, Hub) as address:  # said before any weights are asked for
        run = fetched(address, "tiny/broken")
        assert "a pickle" in run.stderr and run.returncode
    with serve(tiny, Hub) as address:
        run = fetched(address)
        assert "fetching tiny/base from the Hub, once" in run.stdout, run.stderr
    folder = run.stdout.splitlines()[-1]
    assert {"unet", "vae", "text_encoder", "tokenizer", "scheduler"} <= {*os.listdir(folder)}
    again = fetched("http://127.0.0.1:9")  # nothing listens there
    assert again.stdout.strip() == folder
    assert not list((tmp_path / "hub").rglob("*broken*/**/*.safetensors"))


def test_without_a_network_it_says_so(monkeypatch):
    def lost(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr(base, "hf_hub_download", lost)
    with pytest.raises(DiffEchoError, match="copy the pipeline's folder here.*--base"):
        base.folder_of("nobody/nothing")
    with pytest.raises(DiffEchoError, match="no folder, and no name on the Hub"):
        base.folder_of("no/such/folder")


# Weights of Stable Diffusion v1-5 as it is published.
REAL = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}


def test_the_real_configuration_has_its_parameters_and_its_layout_is_accepted(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "real")
    for part, parameters in REAL.items():
        with torch.device("meta"):
            built = base.published(part)
        assert sum(p.numel() for p in built.parameters()) == parameters
        (folder / part / "config.json").unlink()
        save = built.config.save_pretrained if part == "text_encoder" else built.save_config
        save(folder / part)
        shapes = {
            name: torch.empty_like(p, device="meta") for name, p in built.state_dict().items()
        }
        hollow(shapes, folder / base.WEIGHTS[part])
    base.check(folder)
    assert base.folder_of(folder) == folder
    assert (folder / base.WEIGHTS["unet"]).stat().st_size > 3.4e9  # of which nothing is on the disk


def hollow(tensors, path):
    """A safetensors file with the names and shapes of `tensors` (float32), whose values are a hole."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.unlink()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def fine_tuned(tiny, frames, smoke, tmp_path_factory):
    """{how: folder} of the tiny base fine-tuned for a moment: whole, by LoRA, and a ControlNet on it."""
    root, profile = tmp_path_factory.mktemp("fine-tuned"), replace(smoke, base=str(tiny))
    for stage in ("text", "lora", "text-seg"):
        profile = profiles.adapt(profile, stage, learning_rate=0.05)  # so that it shows
    hows = {"whole": ("text", {}), "lora": ("text", {"lora": 4}), "text-seg": ("text-seg", {})}
    for how, (model, settings) in hows.items():
        training.train(model, frames, profile, root / how, say=str, **settings)
    return {how: root / how for how in hows}


def stock(how, folder, tiny):
    """The stock pipeline with what was trained, put together as its users do, without this package."""
    quiet = {"safety_checker": None, "local_files_only": True}
    if how == "text-seg":
        controlnet = ControlNetModel.from_pretrained(folder / "controlnet", dtype=torch.float32)
        return StableDiffusionControlNetPipeline.from_pretrained(
            tiny, controlnet=controlnet, **quiet
        )
    pipeline = StableDiffusionPipeline.from_pretrained(tiny, **quiet)
    if how == "lora":
        pipeline.load_lora_weights(folder)
    else:
        pipeline.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    return pipeline


@pytest.mark.parametrize("how", ["whole", "lora", "text-seg"])
def test_stock_pipelines_draw_the_same_picture(how, fine_tuned, tiny, frames):
    generator = checkpoints.load_generator(fine_tuned[how])
    asked = frames.where(np.arange(len(frames)) < 2)
    told = sampling.told(generator.model, asked)
    mine = sampling.sample(generator, [3, 4], 3, guidance=2.0, **told)

    def drawn(pipeline, **image):
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(generator.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        noise = sampling.initial_noise([3, 4], generator.latent_shape)
        settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
        images = pipeline(told["prompts"], latents=noise, **settings, **image).images
        return 2 * images.mean(1, keepdim=True) - 1

    image = {"image": models.control_image(asked.masks)} if how == "text-seg" else {}
    theirs = drawn(stock(how, fine_tuned[how], tiny), **image)
    torch.testing.assert_close(theirs, mine, atol=1e-3, rtol=0)
    untrained = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    assert (drawn(untrained) - mine).abs().mean() > 1e-3


def test_only_what_is_asked_for_is_trained_and_saved(fine_tuned, tiny):
    kept = {
        how: {p.name for p in folder.rglob("*.safetensors") if "state" not in p.parts}
        for how, folder in fine_tuned.items()
    }
    assert kept == {
        "whole": {"diffusion_pytorch_model.safetensors"},
        "lora": {"pytorch_lora_weights.safetensors"},
        "text-seg": {"diffusion_pytorch_model.safetensors"},
    }
    unet = base.load(tiny, "unet")
    base.Lora(unet, 4)
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    assert 0 < trained < 0.05 * models.count_parameters(unet)
    made = checkpoints.read_training(fine_tuned["lora"])
    assert made["lora"] == 4 and made["base"]["sha256"] == base.digest(tiny)


def test_another_base_is_refused_and_a_moved_one_is_named(fine_tuned, tiny, broken, tmp_path):
    moved = shutil.copytree(tiny, tmp_path / "moved")
    assert checkpoints.load_generator(fine_tuned["lora"], moved).model == "text"
    weights = broken / base.WEIGHTS["vae"]
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DiffEchoError, match="not the base .* was trained on.*--base"):
        checkpoints.load_generator(fine_tuned["lora"], broken)


def test_the_whole_road_by_commands(tiny, phantom_root, tmp_path, capsys):
    out, drawn = tmp_path / "lora", tmp_path / "set"
    folders = ["--data", phantom_root, "--profile", "smoke", "--out", out]
    assert (
        main(["train", "text", *folders, "--base", tiny, "--lora", 2, "--template", "random"]) == 0
    )
    for model in ("sdm", "text-seg"):
        refused = [*folders[:-1], tmp_path / "x", "--lora", 2, "--base", tiny]
        assert main(["train", model, *refused]) == 1 and "LoRA" in capsys.readouterr().err
    draw = ["--checkpoint", out, "--out", drawn, "--n", 6, "--steps", 2, "--guidance", 2]
    assert main(["sample", "text", *draw]) == 0
    assert len(list((drawn / "images").glob("*.png"))) == 24


def test_two_processes_train_what_one_does_with_twice_the_batch(tiny, phantom_root, tmp_path):
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1"  # gloo
    launch += " --mixed_precision=no --dynamo_backend=no --main_process_port=0"  # any free port
    how = {"PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "true"}
    words = (
        f"-m diffecho_utils train text --data {phantom_root} --profile smoke --base {tiny} --lora 4"
    )
    weights = {}
    for name, launcher, batch in (("one", "", 8), ("two", launch, 4), ("start", "", 8)):
        rate = 1e-9 if name == "start" else 0.05
        command = (
            f"{launcher} {words} --batch {batch} --learning-rate {rate} --out {tmp_path / name}"
        )
        run = subprocess.run(
            [sys.executable, *command.split()], env=os.environ | how, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr[-2000:]
        loaded = load_file(tmp_path / name / base.LORA_WEIGHTS)
        weights[name] = torch.cat([tensor.flatten() for tensor in loaded.values()])
    moved = (weights["one"] - weights["start"]).norm()
    assert (weights["one"] - weights["two"]).norm() < 0.02 * moved
