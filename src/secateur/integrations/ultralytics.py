"""Ultralytics' YOLO: networks by name, and pruned ones in its validator, exporter and trainer.

Its trainer builds a network anew from its YAML file and copies what weights fit, so a pruned
network would grow back. The YOLO objects that come from here train the pruned network itself. Their
checkpoints hold Ultralytics' own classes alone: `ultralytics.YOLO(path)` validates, runs and
exports them without secateur.

The functions need the package `ultralytics`, which is licensed under AGPL-3.0.
"""

from __future__ import annotations

import copy
import functools
import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.data.detections import Decoder, Detections, grid_of, non_maximum_suppression
from secateur.data.preprocessing import Preprocessing
from secateur.graph.forward import without_forward
from secateur.graph.ultralytics_networks import traceable_forward
from secateur.graph.wrappers import unwrapped
from secateur.runtime.atomic_io import replace_file
from secateur.runtime.errors import UnknownName, UsageError

LICENCE = "AGPL-3.0 (https://ultralytics.com/license)"
"""Of the package, and so of what its checkpoints hold."""
NETWORKS = {
    "detect": "DetectionModel",
    "segment": "SegmentationModel",
    "pose": "PoseModel",
    "obb": "OBBModel",
    "classify": "ClassificationModel",
}
"""Ultralytics' tasks whose networks can be pruned, and the classes of these in `nn.tasks`."""
DETECTOR_SIDE, CLASSIFIER_SIDE = 640, 224
"""Sides of images in pixels, if Ultralytics is not told others."""
SCORE_THRESHOLD, IOU, MOST_DETECTIONS = 0.001, 0.7, 300
"""Of the boxes that are kept, and of those that count as the same, as Ultralytics validates."""
_CLASS_HEADS = ("cv3", "one2one_cv3")
"""Attributes of a detection head with the layers whose last one has an output for each class."""


def build(name: str, *, num_classes: int | None = None) -> nn.Module:
    """Return an untrained network by the name of its YAML file, in evaluation mode.

    `name` is one of Ultralytics' files, with a letter for the scale (`yolo11n.yaml`,
    `yolo26s-seg.yaml`), or the path of a file of yours. `num_classes` replaces the number of
    classes in the file. Raises `UnknownName` if there is no such file, and `UsageError` if it
    describes a network for another task than `detect`, `segment`, `pose`, `obb` or `classify`.
    """
    if Path(name).suffix not in (".yaml", ".yml"):
        raise UsageError(
            f"{name!r} is not the name of a YAML file, such as yolo11n.yaml: to prune trained "
            "weights, pass secateur.prune the network YOLO('best.pt').model"
        )
    library = import_ultralytics()
    tasks = library.nn.tasks
    try:
        description = tasks.yaml_model_load(name)
    except FileNotFoundError as error:
        raise UnknownName("Ultralytics network", name, names()) from error
    task = tasks.guess_model_task(description)
    if task not in NETWORKS:
        raise UsageError(
            f"{name} is a network for the task {task}, which is not one of {', '.join(NETWORKS)}"
        )
    kind = getattr(tasks, NETWORKS[task])
    with _quiet():
        model: nn.Module = kind(description, nc=num_classes, verbose=False)
    _complete(model)
    if traceable_forward(model) is None:
        head = type(model.model[-1]).__name__  # type: ignore[index]
        raise UsageError(f"{name} ends in a {head}, whose outputs secateur can't prune for")
    return model.eval()


def names() -> list[str]:
    """Return the names of Ultralytics' YAML files, without the letter for the scale."""
    folder = Path(import_ultralytics().__file__).parent / "cfg" / "models"
    return sorted(path.name for path in folder.glob("*/yolo*.yaml"))


def preprocessing(name: str) -> Preprocessing:
    """Return what the named network expects of images: values from 0 to 1, without a mean.

    Detectors take images of 640×640 pixels, scaled to fit and padded around them in grey;
    classifiers the middle 224×224 pixels.
    """
    is_classifier = Path(name).stem.endswith("-cls")
    side = CLASSIFIER_SIDE if is_classifier else DETECTOR_SIDE
    return Preprocessing(
        side,
        side,
        (0.0, 0.0, 0.0),
        (1.0, 1.0, 1.0),
        fit="crop" if is_classifier else "letterbox",
    )


def decoder(model: nn.Module) -> Decoder | None:
    """Return what makes boxes of a network's raw maps; None if it has no upright boxes."""
    head: Any = _network(model).model[-1]  # type: ignore[index]
    is_detector = hasattr(head, "reg_max") and type(head).__name__.removesuffix("26") != "OBB"
    return functools.partial(_decode, head) if is_detector else None


def _decode(head: Any, output: object, size: tuple[int, int]) -> list[Detections]:
    """Return what a network finds in each image, from its raw maps; see `Decoder`.

    Boxes are distributions over distances from a cell's middle to the four sides (Li et al., 2020,
    arXiv 2006.04388, equation 6), or distances if the head has no such ones. Of a head with two
    branches the one that the network runs by counts, whose boxes need no suppression.
    """
    maps: Any = output
    if not isinstance(maps, tuple | list) or len(maps) < 2:
        raise UsageError("the network must return the raw maps of its head: boxes, class scores, …")
    if head.end2end:
        maps = maps[len(maps) // 2 :]
    iou = 1.0 if head.end2end else IOU
    detections = []
    for boxes, scores in zip(_corners(head, maps[0], size), maps[1].sigmoid(), strict=True):
        kept = non_maximum_suppression(boxes, scores.T, threshold=SCORE_THRESHOLD, iou=iou)
        detections.append(kept.take(torch.arange(min(MOST_DETECTIONS, len(kept.scores)))))
    return detections


def _corners(head: Any, boxes: Tensor, size: tuple[int, int]) -> Float[Tensor, "image position 4"]:
    """Return left, top, right and bottom of the boxes at all positions, in pixels."""
    cells, sides = grid_of(size, tuple(int(stride) for stride in head.stride), boxes.device)
    if boxes.shape[2] != len(cells):
        raise UsageError(
            f"the network has {len(cells)} positions for images of {size[0]}×{size[1]}, but "
            f"returns {boxes.shape[2]}"
        )
    distances = boxes.float().unflatten(1, (4, head.reg_max))  # [image, side, distance, position]
    if head.reg_max > 1:
        steps = torch.arange(head.reg_max, device=boxes.device, dtype=torch.float32)
        distances = (distances.softmax(2) * steps[:, None]).sum(2, keepdim=True)
    left, top, right, bottom = distances[:, :, 0].unbind(1)  # [image, position], in cells
    x, y = (cells + 0.5).unbind(1)
    return torch.stack([x - left, y - top, x + right, y + bottom], dim=-1) * sides


def as_yolo(model: nn.Module, path: str | Path) -> Any:
    """Return a pruned network as Ultralytics' YOLO object, to validate, export or train it.

    The network is written to `path` (`.pt`), a checkpoint in Ultralytics' own format; exported
    files are written beside it. Raises `UsageError` if the network is not one of Ultralytics', and
    `WriteError`.

    >>> from secateur.integrations.ultralytics import as_yolo, build
    >>> import tempfile
    >>> yolo = as_yolo(build("yolo11n.yaml"), f"{tempfile.mkdtemp()}/yolo11n_pruned.pt")
    >>> yolo.task
    'detect'
    """
    path = Path(path)
    if path.suffix != ".pt":
        raise UsageError(f"{path} must end in .pt: Ultralytics tells its checkpoints by that")
    network: Any = copy.deepcopy(_network(model))
    _complete(network)
    network.criterion = None  # holds tensors of the training
    arguments = network.args if isinstance(network.args, Mapping) else vars(network.args)
    content = {
        "model": network.float().eval(),
        "train_args": dict(arguments),
        "date": datetime.now(UTC).isoformat(),
        "version": import_ultralytics().__version__,
        "license": LICENCE,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    replace_file(path, buffer.getvalue())
    return load_yolo(path)


def load_yolo(path: str | Path) -> Any:
    """Return the YOLO object of a checkpoint with a pruned network, to train the network on.

    `ultralytics.YOLO(path)` is the same except for training, where the network would grow back.
    Ultralytics unpickles the file, which may run code: load only files that you trust. Raises
    `FileNotFoundError`.
    """
    return _pruned_yolo()(Path(path))


def import_ultralytics() -> Any:
    """Import Ultralytics; raise `UsageError` that names the extra if it is not installed."""
    try:
        import ultralytics
        import ultralytics.nn.tasks
    except ImportError as error:
        raise UsageError(
            "Ultralytics' networks need the extra: pip install 'secateur[ultralytics]'"
        ) from error
    return ultralytics


def _network(model: nn.Module) -> nn.Module:
    """Return the network itself, in Ultralytics' own class."""
    network = without_forward(unwrapped(model))
    kind: type[nn.Module] = import_ultralytics().nn.tasks.BaseModel
    if not isinstance(network, kind):
        raise UsageError(
            f"got {type(network).__name__}: pass a network of Ultralytics', such as "
            "YOLO('yolo11n.yaml').model"
        )
    return network


def _complete(network: Any) -> None:
    """Set what Ultralytics' YOLO object expects of a network and `build` or a user left out."""
    library = import_ultralytics()
    network.task = getattr(network, "task", library.nn.tasks.guess_model_task(network))
    if not hasattr(network, "args"):
        network.args = {**library.utils.DEFAULT_CFG_DICT, "task": network.task}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ultralytics' log silent inside the block: some classes write to it in any case."""
    log = import_ultralytics().utils.LOGGER
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


class _KeepsPruned:
    """Mixed into a trainer of Ultralytics': trains the network itself, not one of its YAML file."""

    def get_model(
        self, cfg: object = None, weights: nn.Module | None = None, verbose: bool = True
    ) -> nn.Module:
        """Return a copy of `weights`, with an output for each class of the data.

        Raises `UsageError` if the network doesn't fit the data, or if there is none.
        """
        trainer: Any = self
        if weights is None:
            raise UsageError(
                "a pruned network can't be built from its YAML file: train it from its checkpoint, "
                "with pretrained=True"
            )
        model: Any = copy.deepcopy(_unfused(weights)).requires_grad_()
        model.criterion = None  # of an earlier training
        _fit_to_data(model, trainer.data)
        for module in model.modules():
            if isinstance(module, nn.Dropout) and trainer.args.dropout:
                module.p = trainer.args.dropout
        network: nn.Module = model
        return network


def _unfused(weights: nn.Module) -> nn.Module:
    """Return a network whose norms have not been folded into its kernels, as inference does it."""
    network: Any = weights
    if not network.is_fused():
        return weights
    path = getattr(network, "pt_path", None)
    if path is None or not Path(path).is_file():
        raise UsageError(
            "the network's batch norms were folded into its kernels for inference: train a copy "
            "that has not been run by Ultralytics' predictor or validator"
        )
    unfused: nn.Module = import_ultralytics().nn.tasks.load_checkpoint(path)[0]
    return unfused


def _fit_to_data(model: Any, data: Mapping[str, Any]) -> None:
    """Give a network an output for each class of the data; raise `UsageError` if more differs."""
    channels = model.yaml.get("channels", 3)
    if data["channels"] != channels:
        raise UsageError(
            f"the data has images of {data['channels']} channels, the network takes {channels}"
        )
    head = model.model[-1]
    if hasattr(head, "kpt_shape") and tuple(data["kpt_shape"]) != tuple(head.kpt_shape):
        raise UsageError(
            f"the data has key points of shape {list(data['kpt_shape'])} (kpt_shape), the network "
            f"predicts {list(head.kpt_shape)}"
        )
    model.names = data["names"]
    classes = data["nc"]
    if classes == model.yaml["nc"]:
        return
    model.yaml["nc"] = classes
    if not hasattr(head, "nc"):  # a classifier: its trainer replaces the last layer
        return
    head.nc, head.no = classes, classes + 4 * head.reg_max
    for name in _CLASS_HEADS:
        for layers, stride in zip(getattr(head, name, None) or (), head.stride, strict=False):
            layers[-1] = _with_outputs(layers[-1], classes)
            # As in Detect.bias_init: about five objects in an image of 640 × 640 pixels.
            layers[-1].bias.data.fill_(math.log(5 / classes / (640 / float(stride)) ** 2))
    semantic = getattr(getattr(head, "proto", None), "semseg", None)
    if semantic is not None:
        semantic[-1] = _with_outputs(semantic[-1], classes)


def _with_outputs(layer: nn.Conv2d, outputs: int) -> nn.Conv2d:
    """Return a new 1×1 convolution with the inputs of another one."""
    new = nn.Conv2d(layer.in_channels, outputs, 1)
    return new.to(layer.weight.device, layer.weight.dtype)


@functools.cache
def _pruned_yolo() -> Any:
    """Return the class of YOLO objects whose trainers keep a pruned network pruned."""
    library = import_ultralytics()

    @functools.cache
    def keeping_pruned(trainer: type) -> type:
        description = f"{trainer.__name__}, which keeps a pruned network pruned."
        return type(f"Pruned{trainer.__name__}", (_KeepsPruned, trainer), {"__doc__": description})

    class PrunedYOLO(library.YOLO):  # type: ignore[name-defined]
        """Ultralytics' YOLO object, with trainers that keep a pruned network pruned."""

        @property
        def task_map(self) -> dict[str, dict[str, Any]]:
            """What does each task: network, trainer, validator and predictor."""
            known = super().task_map
            return {
                task: {**known[task], "trainer": keeping_pruned(known[task]["trainer"])}
                for task in NETWORKS
            }

    return PrunedYOLO
