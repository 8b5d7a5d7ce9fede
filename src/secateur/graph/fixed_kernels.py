"""Kernels whose filters stay: those that never train, and those of the image's own colours."""

from __future__ import annotations

from torch import nn

from secateur.graph.channel_ids import Layer
from secateur.graph.network_graph import argument, first_input, shape_of
from secateur.graph.propagation import ChannelPropagation

NEVER_TRAINED = "filters of a kernel that never trains, as it is in a buffer"
COLOURS = "a convolution over the image's own colours"
MOST_COLOURS = 4


def freeze_fixed_kernels(model: nn.Module, propagation: ChannelPropagation) -> None:
    """Freeze the filters of layers that compute the same after any training.

    A depthwise kernel in a buffer, such as a blur, goes with the channels that it is applied to.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    trained = [node for node, name in propagation.graph.tensor_names.items() if name in parameters]
    consuming = {consumer.node for consumer in propagation.consumers}
    for number, layer in enumerate(propagation.layers):
        if layer.produced is None:
            continue
        is_by_group = argument(layer.node, "groups", 1) > 1 and layer.node not in consuming
        kernel = first_input(layer.node, 1)
        if _keeps_colours(propagation, layer, propagation.layers[:number]):
            propagation.freeze((layer.produced,), COLOURS, layer.node)
        elif (
            layer.weight not in parameters
            and not is_by_group
            and not any(propagation.depends_on(kernel, node) for node in trained)
        ):
            propagation.freeze((layer.produced,), NEVER_TRAINED, layer.node)


def _keeps_colours(propagation: ChannelPropagation, layer: Layer, before: list[Layer]) -> bool:
    """Return whether a layer makes as many channels of the image's own as the image has."""
    source, image = first_input(layer.node), propagation.graph.image
    colours = int(shape_of(image)[1]) if len(shape_of(image)) > 1 else 0
    return (
        len(layer.kernel) > 2
        and layer.produced is not None
        and len(layer.produced) == colours == int(shape_of(source)[1])
        and colours <= MOST_COLOURS
        and propagation.depends_on(source, image)
        and not any(propagation.depends_on(source, other.node) for other in before)
    )
