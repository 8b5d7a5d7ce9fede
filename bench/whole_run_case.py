"""One whole run in this process, for `bench/whole_run.py`: prints its time and memory as JSON.

    python bench/whole_run_case.py CASE WHAT [--images N] [--data DIR] [--weights DIR]

WHAT is `secateur`, `torch-pruning` or `graph`. It imports whatever `secateur` is on the path, and
only its public interface, because the same script also runs with an older version.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torchvision.models.resnet import BasicBlock, ResNet

SEED = 0
BATCH = 16
FRACTION_LEFT = 0.5
TORCH_PRUNING_STEPS = 20
"""Steps from the whole network to none: each removes a twentieth of the filters of every layer."""
NORM_IMAGES = 8
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
GRAPHS = 5
"""How often a graph is built, one after the other."""
SIDES = {"resnet10": 64}
"""Image sides in pixels that are not 224."""


def make_case(name: str, images: int, data: Path, weights: Path) -> tuple[nn.Module, Tensor]:
    """Return a network and its images `[image, rgb, height, width]`.

    ResNet-20 has trained weights and CIFAR-10 images. The others are random, with batch-norm
    statistics of their images, because the signal of a random network vanishes without them.
    """
    torch.manual_seed(SEED)
    if name == "resnet20":
        import secateur

        path = weights / "cifar10_resnet20.safetensors"
        return secateur.load_model(name, path, num_classes=10), cifar_images(data, images)
    side = SIDES.get(name, 224)
    model = (
        ResNet(BasicBlock, [1, 1, 1, 1])
        if name == "resnet10"
        else getattr(torchvision.models, name)()
    )
    pixels = torch.randn(images, 3, side, side)
    with torch.no_grad():
        model.train()
        model(pixels[:NORM_IMAGES])
    return model.eval(), pixels


def cifar_images(folder: Path, count: int) -> Tensor:
    """Return the first training images of CIFAR-10, normalised."""
    blocks: list[np.ndarray[Any, Any]] = []
    for path in sorted((folder / "train_a").glob("*.webp")):
        blocks.append(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 32, 32, 3))
        if sum(map(len, blocks)) >= count:
            break
    pixels = torch.from_numpy(np.concatenate(blocks)[:count]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (CIFAR_MEAN, CIFAR_STD))
    return ((pixels - mean) / std).contiguous()


def prune_with_secateur(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Prune by the defaults of `secateur.prune`: scores, plan, cut, and refit."""
    import secateur

    pruned = secateur.prune(model, images, target=f"macs={FRACTION_LEFT}")
    scores = list(pruned.scores.values())
    return {"macs_left": scores[-1].macs / scores[0].macs}


def prune_with_torch_pruning(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Prune step by step by Taylor importance, and re-estimate batch-norm statistics.

    Before every step the gradients of all images are accumulated, as in Torch-Pruning's own
    examples. The labels are the classes that the whole network predicts.
    """
    import torch_pruning as tp

    batches = images.split(BATCH)
    with torch.no_grad():
        labels = [model(batch).argmax(1) for batch in batches]
    whole, _ = tp.utils.count_ops_and_params(model, images[:1])
    heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with warnings.catch_warnings(action="ignore"):
        pruner = tp.pruner.MagnitudePruner(
            model,
            example_inputs=images[:1],
            importance=tp.importance.GroupTaylorImportance(),
            pruning_ratio=1.0,
            iterative_steps=TORCH_PRUNING_STEPS,
            ignored_layers=[heads[-1]],
        )
        left, steps = 1.0, 0
        while left > FRACTION_LEFT:
            model.zero_grad()
            for batch, classes in zip(batches, labels, strict=True):
                F.cross_entropy(model(batch), classes).backward()
            pruner.step()
            steps += 1
            left = tp.utils.count_ops_and_params(model, images[:1])[0] / whole
    update_bn(batches, model)
    return {"macs_left": left, "steps": steps}


def build_graphs(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Build the dependency graph, with the trial cut that checks it, as often as `GRAPHS`."""
    from secateur.graph.build import build_dependency_graph

    for _ in range(GRAPHS):
        build_dependency_graph(model, images)
    return {"times": GRAPHS}


ACTIONS = {
    "secateur": prune_with_secateur,
    "torch-pruning": prune_with_torch_pruning,
    "graph": build_graphs,
}


def main() -> None:
    """Run the action once, and print processor seconds, wall seconds and memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--data", type=Path, default=Path())
    parser.add_argument("--weights", type=Path, default=Path())
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.action != "torch-pruning":
        import secateur

        assert callable(secateur.prune)  # what that imports is not timed
    model, images = make_case(arguments.case, arguments.images, arguments.data, arguments.weights)
    if arguments.action == "graph":
        build_graphs(torchvision.models.resnet18().eval(), images)  # warms up
    before = time.process_time()
    with torch.inference_mode():
        for batch in images.split(BATCH):
            model(batch)
    forward = time.process_time() - before
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before, since = time.process_time(), time.perf_counter()
    outcome = ACTIONS[arguments.action](model, images)
    print(
        json.dumps(
            {
                "cpu_seconds": (time.process_time() - before) / outcome.pop("times", 1),
                "wall_seconds": time.perf_counter() - since,
                "forward_cpu_seconds": forward,
                "images_mib": images.nbytes / 2**20,
                "memory_before_mib": memory / 2**10,
                "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
                **outcome,
            }
        )
    )


if __name__ == "__main__":
    main()
