"""Rules: how channel ids pass through each operation, one function per family, in one table.

A rule takes the `ChannelPropagation` and the node of an operation and returns the ids along each
dimension of its value, `None` for a dimension whose size never changes (a list of those if the
operation has several values). On the way it couples channels that must be cut together, and freezes
those that must stay. An operation that is not in the table freezes all its inputs.

Pass rules for your own operations to
`build_dependency_graph(…, rules={"namespace::name": rule})`.
"""

from __future__ import annotations

from secateur.graph.propagation import Rule
from secateur.graph.rules import elementwise, layers, shapes

_UNARY = (
    *("relu", "relu6", "hardtanh", "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh"),
    *("leaky_relu", "elu", "selu", "celu", "softplus", "softsign", "mish", "log_sigmoid"),
    *("hardshrink", "softshrink", "threshold", "rrelu"),
    *("neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "square", "reciprocal"),
    *("sin", "cos", "erf", "sign", "round", "floor", "ceil", "nan_to_num", "logical_not"),
    *("dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "detach", "alias"),
    *("to", "_to_copy", "type_as", "lift_fresh_copy", "bitwise_not", "zeros_like", "ones_like"),
)
_BINARY = (
    *("mul", "div", "pow", "maximum", "minimum", "where", "addcmul", "addcdiv", "lerp"),
    *("clamp", "clamp_min", "clamp_max", "rsub", "masked_fill"),
    *("gt", "lt", "ge", "le", "eq", "ne", "logical_and", "logical_or", "remainder", "fmod"),
)
_POOLING = (
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices"),
)
_UPSAMPLING = (
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d"),
    *(
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "upsample_trilinear3d",
        "_upsample_nearest_exact2d",
    ),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler"),
)
_REDUCING = (
    *("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean"),
    *("linalg_vector_norm", "norm", "logsumexp", "prod"),
)
_PRODUCTS = ("matmul", "bmm", "mm", "einsum", "baddbmm", "addmm", "scaled_dot_product_attention")

RULES: dict[str, Rule] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), layers.convolution),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), layers.convolution
    ),
    "linear": layers.linear,
    "embedding": layers.embedding,
    **dict.fromkeys(("batch_norm", "instance_norm"), layers.channel_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), layers.layer_norm),
    "group_norm": layers.group_norm,
    "prelu": layers.prelu,
    **dict.fromkeys(_UNARY, elementwise.keep),
    **dict.fromkeys(_BINARY, elementwise.combine),
    **dict.fromkeys(("add", "sub"), elementwise.add),
    **dict.fromkeys(_POOLING, elementwise.pool),
    **dict.fromkeys(_UPSAMPLING, elementwise.upsample),
    **dict.fromkeys(_REDUCING, elementwise.reduce),
    **dict.fromkeys(("softmax", "log_softmax"), elementwise.normalise),
    **dict.fromkeys(_PRODUCTS, elementwise.product),
    "getitem": elementwise.item,
    **dict.fromkeys(("cat", "concat", "concatenate"), shapes.concatenate),
    "stack": shapes.stack,
    "permute": shapes.permute,
    **dict.fromkeys(("transpose", "swapaxes"), shapes.transpose),
    **dict.fromkeys(("t", "numpy_T"), shapes.reverse),
    "squeeze": shapes.squeeze,
    "unsqueeze": shapes.unsqueeze,
    "select": shapes.select,
    "unbind": shapes.unbind,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), shapes.split),
    "slice": shapes.slice_,
    **dict.fromkeys(("pad", "constant_pad_nd"), shapes.pad),
    "flatten": shapes.flatten,
    "unflatten": shapes.unflatten,
    **dict.fromkeys(("view", "reshape", "reshape_as", "view_as", "_unsafe_view"), shapes.reshape),
    **dict.fromkeys(("expand", "expand_as"), shapes.expand),
    **dict.fromkeys(("repeat", "tile"), shapes.repeat),
    "pixel_shuffle": shapes.pixel_shuffle,
    "pixel_unshuffle": shapes.pixel_unshuffle,
    "channel_shuffle": shapes.channel_shuffle,
    **dict.fromkeys(("flip", "roll"), shapes.flip),
    "unfold": shapes.windows,
    "im2col": shapes.patches,
}
"""ATen operation -> how channel ids pass through it."""
