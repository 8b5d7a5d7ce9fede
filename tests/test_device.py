"""Devices by name, what they can't do, and the pretend accelerator that other tests run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import secateur
from networks import Chain, make_network, random_images
from pretend_device import DEVICE, WITHOUT_FLOAT64, PretendTensor, pretend_device
from secateur.graph.interpreter import GraphInterpreter
from secateur.pruning.refit.activation_cache import ActivationCache, CachedBatch
from secateur.runtime import timing
from secateur.runtime.device import (
    CPU,
    accelerator_name,
    current_device,
    find_device,
    full_float32,
    sums_device,
    synchronize,
)
from secateur.runtime.errors import UsageError
from secateur.runtime.memory import free_bytes


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], SimpleNamespace]:
    """Makes torch say that there are two accelerators of a type, or none."""

    def set_type(kind: str | None) -> SimpleNamespace:
        module = SimpleNamespace(current=0)
        module.set_device = partial(setattr, module, "current")
        module.current_device = lambda: module.current
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda: torch.device(kind or "cpu")
        )
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        monkeypatch.setattr(torch, "get_device_module", lambda device: module)
        return module

    return set_type


def test_auto_is_the_accelerator_if_there_is_one(
    accelerator: Callable[[str | None], SimpleNamespace],
) -> None:
    accelerator(None)
    assert find_device("auto") == find_device("cpu") == CPU
    accelerator("cuda")
    assert find_device("auto") == find_device("cuda") == torch.device("cuda", 0)
    assert find_device("cpu") == CPU


def test_a_numbered_device_becomes_the_current_one(
    accelerator: Callable[[str | None], SimpleNamespace],
) -> None:
    module = accelerator("xpu")
    assert find_device("xpu:1") == torch.device("xpu", 1)
    assert module.current == 1


def test_an_apple_device_has_no_number_to_choose(
    accelerator: Callable[[str | None], SimpleNamespace],
) -> None:
    module = accelerator("mps")
    del module.set_device
    assert find_device("auto") == torch.device("mps", 0)


@pytest.mark.parametrize(
    ("here", "name", "message"),
    [
        (None, "cuda", "--device cuda is not here: torch finds no accelerator; write --device cpu"),
        ("cuda", "mps", "this machine has cuda; write --device cuda, auto or cpu"),
        ("cuda", "cuda:2", "--device cuda:2 is not here: there are 2; count from 0"),
        ("cuda", "gpu", "--device gpu: expected auto, cpu, cuda, cuda:1, mps or xpu"),
    ],
)
def test_a_device_that_is_not_here_says_what_to_do(
    accelerator: Callable[[str | None], SimpleNamespace], here: str | None, name: str, message: str
) -> None:
    accelerator(here)
    with pytest.raises(UsageError) as caught:
        find_device(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_of_several_processes_takes_its_own(
    accelerator: Callable[[str | None], SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator("cuda")
    monkeypatch.setattr("secateur.runtime.device.rank_and_world_size", lambda: (1, 2))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device("auto") == find_device("cuda") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="each of 2 processes needs a device of its own"):
        find_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match="there are 2; torchrun --nproc-per-node=2"):
        find_device("cuda")


def test_python_leaves_the_choice_to_the_network() -> None:
    with pytest.raises(UsageError, match=r'model.to\("cuda"\)'):
        secateur.prune(
            make_network("residual"), random_images(20), settings={"model.device": "cuda"}
        )


def test_float32_is_float32_inside_and_as_before_behind() -> None:
    cudnn, before = torch.backends.cudnn, torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with full_float32():
            assert not cudnn.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"
        assert cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch 2.9 brought these")
def test_settings_that_older_ones_cannot_say_come_back_too() -> None:
    cudnn: Any = torch.backends.cudnn
    convolution = cudnn.conv
    before = convolution.fp32_precision
    convolution.fp32_precision = "ieee"  # but not of recurrent layers
    try:
        with pytest.raises(RuntimeError, match="legacy and new APIs"):
            _ = cudnn.allow_tf32
        with full_float32():
            assert cudnn.rnn.fp32_precision == "ieee"
        assert cudnn.rnn.fp32_precision == "tf32"
        assert convolution.fp32_precision == "ieee"
    finally:
        convolution.fp32_precision = before


def test_times_include_the_work_that_the_accelerator_still_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: order.append("wait"))
    timing.seconds(lambda: order.append("run"))
    assert order == ["wait", "run", "wait"]
    synchronize()
    assert order[-1] == "wait"


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The pretend accelerator."""
    with pretend_device() as pretended:
        yield pretended


def test_the_pretend_device_computes_what_the_cpu_does(device: torch.device) -> None:
    network, images = Chain().eval(), random_images()
    expected = network(images)
    output = network.to(device)(images.to(device))
    assert output.device == device
    assert isinstance(network.conv1.weight, torch.nn.Parameter)
    assert torch.equal(output.cpu(), expected)
    output.sum().backward()
    assert network.conv1.weight.grad is not None
    assert network.conv1.weight.grad.device == device


def test_the_pretend_device_refuses_what_a_real_one_refuses(device: torch.device) -> None:
    here, there = torch.rand(3, device=device), torch.rand(3)
    with pytest.raises(RuntimeError, match="same device, but found cpu and lazy:0"):
        here + there
    with pytest.raises(RuntimeError, match="same device"):
        there[here.argsort()]  # a real device indexes with the CPU's numbers, not the reverse
    with pytest.raises(TypeError, match="convert lazy:0 device type tensor to numpy"):
        here.numpy()
    assert torch.equal((here + torch.tensor(1.0)).cpu(), here.cpu() + 1)
    assert torch.equal(here[torch.tensor([2, 0])].cpu(), here.cpu()[[2, 0]])


def test_nothing_stays_behind_the_pretend_device() -> None:
    with pretend_device() as pretended:
        torch.rand(1, device=pretended)
        assert torch.accelerator.is_available()
    assert not hasattr(torch, DEVICE.type)
    assert not torch.__future__.get_overwrite_module_params_on_conversion()
    assert torch.accelerator.is_available() == (torch.accelerator.device_count() > 0)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.rand(1, device=DEVICE)


def test_sums_go_to_the_cpu_where_there_is_no_float64(device: torch.device) -> None:
    assert sums_device(CPU) == CPU
    assert sums_device(device) == device
    assert sums_device(WITHOUT_FLOAT64) == CPU
    with pytest.raises(TypeError, match="float64"):
        torch.rand(2, device=WITHOUT_FLOAT64).double()


def test_facts_of_a_device(device: torch.device) -> None:
    assert free_bytes(device) == 2**33
    assert accelerator_name(device) == "pretend lazy:0"
    assert accelerator_name(CPU) is None
    with current_device(device), current_device(CPU):
        pass


@pytest.mark.parametrize(
    ("free", "host", "places"),
    [
        (6, 3, ["device", "device", "device"]),
        (2, 3, ["device", "host", "host"]),
        (2, 1, ["device", "host", "file"]),
    ],
)
def test_activations_move_to_the_host_before_they_go_to_files(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    host: int,
    places: list[str],
) -> None:
    """`free` and `host` count batches; half of what is free on the device is used."""
    size = 2 * random_images(4).numel() * 4  # of a batch in both networks
    monkeypatch.setattr(
        "secateur.pruning.refit.activation_cache.free_bytes", lambda device: free * size
    )
    graph = secateur.build_dependency_graph(make_network("residual"), random_images()).graph
    with ActivationCache(host * size, device) as cache:
        values = [random_images(4, seed=seed) for seed in range(3)]
        for images in values:
            full, cut = (GraphInterpreter(graph, {}, images.to(device)) for _ in range(2))
            cache.append(CachedBatch(full, cut, torch.arange(4)))
        assert [_place(batch) for batch in cache._batches] == places
        for batch, images in zip(cache, values, strict=True):
            image = batch.cut.value(graph.image)
            assert image.device == device
            assert torch.equal(image.cpu(), images)


def _place(batch: CachedBatch) -> str:
    values = batch.cut.values()
    if not values:
        return "file"
    return "device" if isinstance(values[0][1], PretendTensor) else "host"
