"""Nothing meets a tensor of another device: the package runs on an accelerator that is pretended.

Where there is only a CPU, a forgotten `.to(device)` goes unnoticed. The tensors below keep their values
on the CPU and say that they are elsewhere; what CUDA refuses to mix with them is refused.
"""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch.utils import backend_registration

from diffecho_utils import (
    checkpoints,
    data,
    downstream,
    metrics,
    models,
    objectives,
    sampling,
    training,
)
from diffecho_utils.profiles import Recipe

register = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
pytestmark = pytest.mark.skipif(register is None, reason="this torch has no devices in Python")

aten = torch.ops.aten
CROSSING = {aten.copy_, aten._to_copy, aten._foreach_copy_}  # what moves values between devices
FACTORIES = [aten.empty.memory_format, aten.empty_strided.default]  # ones, randn, ... fill these
FACTORIES += [aten.arange.default, aten.arange.start, aten.arange.start_step]


class Pretend(torch.Tensor):
    """A tensor of the device pretend:0, with the values of `held`, which is on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    ran = Counter()  # how often each operation was asked of the device

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        kind = {"dtype": held.dtype, "device": "pretend:0"}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, **layout, **kind)

    def __init__(self, held):
        self.held = held

    def tolist(self):  # torch's own refuses subclasses
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        name, kwargs = operation.overloadpacket, dict(kwargs or {})
        cls.ran[name] += 1
        given = [x for v in (*args, *kwargs.values()) for x in (v if isinstance(v, list) else [v])]
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        # Single numbers may come from the CPU, but not its random generators. CUDA takes indices, too.
        strange = [list(x.shape) for x in tensors if not isinstance(x, cls) and x.ndim]
        strange += [x for x in given if isinstance(x, torch.Generator)]
        if strange and name not in CROSSING:
            raise RuntimeError(f"{name} on the device is given {strange[:3]} of the CPU")
        stays = torch.device(kwargs.get("device") or "pretend").type == "pretend"
        kwargs |= {"device": "cpu"} if "device" in kwargs else {}
        known = {id(held(x)): x for x in tensors}

        def returned(value):
            if id(value) in known:  # changed in place
                assert value.shape == known[id(value)].shape, f"{name} cannot be pretended"
                return known[id(value)]
            return cls(value) if stays and isinstance(value, torch.Tensor) else value

        kwargs = {key: each(held, value) for key, value in kwargs.items()}
        return each(returned, operation(*(each(held, value) for value in args), **kwargs))


def each(change, value):
    return type(value)(map(change, value)) if isinstance(value, (list, tuple)) else change(value)


def held(value):
    return value.held if isinstance(value, Pretend) else value


def make(factory, *args, **kwargs):
    return Pretend(factory(*args, **kwargs | {"device": "cpu"}))


def copy_from(source, target, non_blocking=False):
    held(target).copy_(held(source))
    return target


@pytest.fixture(scope="module")
def device():
    """The pretended device, given to whoever asks accelerate for one."""
    module = backend_registration._DummyBackendModule()  # what becomes torch.pretend
    module.get_amp_supported_dtype = list
    module.is_available = lambda: False  # to tests that run later
    register("pretend", module)
    library, pretended = torch.library.Library("aten", "IMPL"), torch.device("pretend:0")
    for factory in FACTORIES:
        library.impl(factory, partial(make, factory), "PrivateUse1")
    library.impl(aten._copy_from.default, copy_from, "PrivateUse1")
    models.processes()
    Accelerator()  # both fill what they share
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these operations are too small for two
    with pytest.MonkeyPatch.context() as patch, torch.autograd.set_multithreading_enabled(False):
        for state in (PartialState, AcceleratorState):
            patch.setitem(state._shared_state, "device", pretended)
        patch.setattr(AcceleratorState, "_check_initialized", lambda *_: None)  # asked for a CPU
        torch.__future__.set_swap_module_params_on_conversion(True)  # `.data =` would lose `held`
        yield pretended
        torch.__future__.set_swap_module_params_on_conversion(False)
    torch.set_num_threads(threads)
    library._destroy()


@pytest.fixture(scope="module")
def few(frames):
    """The frames of two patients: two of each class."""
    return frames.where(frames.table["patient"].isin(["patient0001", "patient0002"]))


@pytest.fixture(scope="module")
def trained(device, smoke, few, tmp_path_factory):
    """Every model, trained there for one step: {model: folder}."""
    folders = {model: tmp_path_factory.mktemp(model) for model in training.MODELS}
    recipes = {name: row for name, row in vars(smoke).items() if isinstance(row, Recipe)}
    recipes = {name: replace(row, steps=1, batch=2) for name, row in recipes.items()}
    for model, needs in training.MODELS.items():
        Pretend.ran.clear()
        built_on = {name: folders[name] for name in needs}
        profile = replace(smoke, **recipes)
        training.train(model, few, profile, folders[model], needs=built_on, say=str)
        assert Pretend.ran[aten.convolution_backward], f"{model} was trained on the CPU"
    return folders


@pytest.fixture(scope="module", params=models.GENERATORS)
def generator(request, device, trained):
    return checkpoints.load_generator(trained[request.param]).to(device)


def test_mixing_is_refused(device):
    there, here = torch.ones(3, device=device), torch.ones(3)
    assert there.device == device and (there + torch.tensor(2.0)).cpu().tolist() == [3, 3, 3]
    for mixed in (
        lambda: there + here,
        lambda: here * there,
        lambda: torch.cat([there, here]),
        lambda: there.normal_(generator=torch.Generator()),
        lambda: there.numpy(),
    ):
        with pytest.raises(RuntimeError, match="of the CPU|not supported for tensor subclasses"):
            mixed()


def test_a_run_that_goes_on(device, smoke, few, tmp_path):
    tensors = {"images": few.images, "masks": few.masks, "labels": few.classes}
    recipe, said = replace(smoke.classifier, steps=3, batch=2, save_every=1), []

    def fit(look):
        objective = objectives.ClassificationObjective(models.build_classifier(smoke))
        state, watch = tmp_path / "state", ({2}, look)
        training.fit(objective, tensors, recipe, state, say=said.append, watch=watch)

    with pytest.raises(ZeroDivisionError):
        fit(lambda step: 1 / 0)
    fit(str)
    assert "resumed at step 1 of 3" in said


@pytest.mark.parametrize("solver", sampling.SOLVERS)
def test_sampling(generator, few, solver):
    """Three steps, the first one guided: the third uses all that a solver remembers."""
    Pretend.ran.clear()
    images = sampling.sample(
        generator,
        [0, 1],
        3,
        guidance=1 if generator.model == "unconditional" else 2,
        guidance_interval=(900, 999),
        scheduler=sampling.SOLVERS[solver].from_config(generator.scheduler.config),
        **sampling.told(generator.model, few.where(few.classes == 0)),
    )
    assert Pretend.ran[aten.convolution] and not isinstance(images, Pretend)


def test_judges_and_features(device, trained, few):
    inception = torch.nn.Conv2d(3, 4, 8, 8)  # stands in for the real one
    inception.register_forward_pre_hook(lambda _, given: given[0].float())
    segmenter, classifier = (
        checkpoints.load_network(trained[n]) for n in ("segmenter", "classifier")
    )
    vae = checkpoints.load_autoencoder(trained["autoencoder"])
    for look, network in (
        (downstream.segment, segmenter),
        (downstream.classify, classifier),
        (metrics.network_features, classifier),
        (metrics.clip_features, checkpoints.load_clip(trained["clip"])[0]),
        (metrics.features, vae),
        (lambda vae, images: data.decode(vae, data.encode(vae, images)), vae),
        (metrics.inception_features, inception),
    ):
        Pretend.ran.clear()
        found = look(network.to(device), few.images)
        assert Pretend.ran[aten.convolution] and len(found) == len(few)
        assert not isinstance(found, Pretend)
