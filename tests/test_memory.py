"""Memory is checked before it runs out, and errors of the system are explained in one line."""

from __future__ import annotations

import errno
import json
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fault_case import Case
from networks import Chain, Residual, random_images
from secateur import build_dependency_graph
from secateur.experiments.run import run
from secateur.graph.activation_memory import peak_bytes, total_bytes
from secateur.pipeline import scoring_context
from secateur.pruning.cost.batch_size import LEAST_BATCH, batch_that_fits
from secateur.runtime import memory
from secateur.runtime.error_messages import explain
from secateur.runtime.errors import SecateurError
from secateur.runtime.memory import USABLE_FRACTION, free_bytes
from secateur.training import memory_check, trainer
from secateur.training.memory_check import check_training


def test_free_memory_is_that_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_bytes(torch.device("cpu"))
    assert 2**20 < free < 2**50
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 600000\ninactive_file 400000\n")
    assert free_bytes(torch.device("cpu")) == 2_400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(torch.device("cpu")) > 2_400_000


def test_batches_fit_into_free_memory() -> None:
    dependencies = build_dependency_graph(Residual(), random_images(2))
    activations = peak_bytes(dependencies)({})
    assert 0 < activations < total_bytes(dependencies)
    assert batch_that_fits(dependencies, 100, 2**40, with_gradients=False) == 100
    tight = int(10 * activations / USABLE_FRACTION)
    assert batch_that_fits(dependencies, 100, tight, with_gradients=False) == 10
    assert LEAST_BATCH <= batch_that_fits(dependencies, 100, tight, with_gradients=True) < 10
    assert batch_that_fits(dependencies, 100, 0, with_gradients=False) == LEAST_BATCH


def test_a_run_with_little_memory_takes_fewer_images_at_a_time_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, report_images=0)
    case.write()
    plenty = run(case.config(epochs=0), tmp_path / "plenty")
    assert plenty.requested_batch_size is None
    assert not any("did not fit" in notice for notice in plenty.notices)
    monkeypatch.setattr(scoring_context, "batch_that_fits", lambda *_, **__: 5)
    result = run(case.config(epochs=0), tmp_path / "little")
    assert result.config.data.batch_size == 5
    assert result.requested_batch_size == 12
    assert any("did not fit" in notice and "12" in notice for notice in result.notices)
    assert result.plan_hash == plenty.plan_hash
    log = (tmp_path / "little" / "log.jsonl").read_text()
    events = [json.loads(line) for line in log.splitlines()]
    assert {"event": "batch_size", "requested": 12, "used": 5} in events
    monkeypatch.undo()
    # It resumes with the configuration that it was started with.
    resumed = run(case.config(epochs=0), tmp_path / "little", resume=True)
    assert resumed.config.data.batch_size == 5


def test_a_step_that_is_too_large_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Chain()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_training(model, random_images(2), 1000)
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: 1_000_000)
    check_training(model, random_images(2), 2)
    with pytest.raises(SecateurError, match=r"a training step on 1000 images takes about .* GiB"):
        check_training(model, random_images(2), 1000)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_kernels_in_another_precision_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of 2 MB, whatever the number of images, whose activations are of 2 kB each."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1000), nn.Linear(1000, 1000), nn.ReLU())
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: 4_000_000)
    with torch.autocast("cpu", torch.bfloat16):
        check_training(model, torch.rand(4, 3, 2, 2), 200)
        check_training(model, torch.rand(2, 3, 2, 2), 200)
        with pytest.raises(SecateurError, match="a training step on 2000 images"):
            check_training(model, torch.rand(4, 3, 2, 2), 2000)


def test_nothing_of_the_measured_step_stays_in_memory() -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.seen: weakref.ref[Tensor] | None = None

        def forward(self, images: Tensor) -> Tensor:
            values: Tensor = self.conv(images).sigmoid()
            self.seen = weakref.ref(values)
            return (values * values).mean((2, 3))  # both save the values

    model = Remembering()
    check_training(model, random_images(2), 8)
    assert model.seen is not None
    assert model.seen() is None


def test_memory_of_a_step_grows_with_the_images_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, report_images=0)
    case.write()
    batch_sizes: list[int] = []
    monkeypatch.setattr(
        trainer, "check_training", lambda model, few, batch_size: batch_sizes.append(batch_size)
    )
    settings = case.config(epochs=1).finetune
    for steps in (1, 4):
        changed = settings.model_copy(update={"gradient_accumulation_steps": steps})
        config = case.config(epochs=1).model_copy(update={"finetune": changed})
        run(config, tmp_path / str(steps))
    assert batch_sizes == [16, 4]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "data.batch_size"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: x"
            ),
            "memory",
        ),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:9"),
            "another process",
        ),
        (dist.DistNetworkError("The client socket has failed"), "another process"),
        (
            RuntimeError(
                "Expected to have finished reduction in the prior iteration before starting a new "
                "one.\nParameter indices which did not receive grad for rank 0: 2 3"
            ),
            "parameters that its forward does not use",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "No space left on device: '/x'"),
    ],
)
def test_errors_of_the_system_are_explained_in_one_line(error: Exception, words: str) -> None:
    line = explain(error)
    assert line is not None
    assert words in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes"), ValueError("x"), KeyError(1)]
)
def test_bugs_are_not_explained(error: Exception) -> None:
    assert explain(error) is None
