"""Rules: how channel ids pass through each operation, one function per family, in one table.

A rule takes the `ChannelPropagation` and the node of an operation and returns the ids along each
dimension of its value, `None` for a dimension whose size never changes (a list of those if the
operation has several values). On the way it couples channels that must be cut together, and freezes
those that must stay. An operation that is not in the table freezes all its inputs.

Pass rules for your own operations to
`build_dependency_graph(…, rules={"namespace::name": rule})`.
"""

from __future__ import annotations

from secateur.graph.propagation import POINTWISE, Rule
from secateur.graph.rules import copies, elementwise, layers, positions, shapes

_KEEPING = (
    *("hardswish", "softsign", "log_sigmoid", "dropout", "feature_dropout", "alpha_dropout"),
    *("contiguous", "detach", "alias", "to", "_to_copy", "lift_fresh_copy", "zero"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "_conj", "_neg_view"),
)
_POOLING = (
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices"),
)
_UPSAMPLING = (
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d"),
    *("upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler"),
)
_REDUCING = (
    *("mean", "sum", "amax", "amin", "max", "min", "aminmax", "var", "std", "var_mean"),
    *("std_mean", "linalg_vector_norm", "norm", "logsumexp", "prod", "nansum", "any", "all"),
    "count_nonzero",
)
_PICKING = ("argmax", "argmin", "median", "nanmedian", "mode", "kthvalue")
_ALONG = (
    *("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "topk"),
    *("_fft_r2c", "_fft_c2c", "_fft_c2r", "linalg_cross", "index_fill"),
)
_PRODUCTS = (
    *("matmul", "bmm", "mm", "einsum", "baddbmm", "addmm", "tensordot", "inner"),
    "scaled_dot_product_attention",
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), layers.convolution),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), layers.convolution
    ),
    "linear": layers.linear,
    "_weight_norm": layers.weight_norm,
    "renorm": layers.renorm,
    "embedding": layers.embedding,
    **dict.fromkeys(("batch_norm", "instance_norm"), layers.channel_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), layers.layer_norm),
    "group_norm": layers.group_norm,
    "prelu": layers.prelu,
    "torchvision::deform_conv2d": layers.deformable_convolution,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), layers.recurrent),
    POINTWISE: elementwise.combine,
    **dict.fromkeys(_KEEPING, elementwise.keep),
    **dict.fromkeys(("floor_divide", "complex", "polar"), elementwise.combine),
    **dict.fromkeys(("copy", "fill"), elementwise.copy),
    **dict.fromkeys(("bucketize", "searchsorted"), elementwise.lookup),
    **dict.fromkeys(("add", "sub"), elementwise.add),
    **dict.fromkeys(_POOLING, elementwise.pool),
    **dict.fromkeys(("fractional_max_pool2d", "fractional_max_pool3d"), elementwise.random_pool),
    **dict.fromkeys(_UPSAMPLING, elementwise.upsample),
    **dict.fromkeys(_REDUCING, elementwise.reduce),
    **dict.fromkeys(("softmax", "log_softmax"), elementwise.normalise),
    **dict.fromkeys(_PRODUCTS, elementwise.product),
    "getitem": elementwise.item,
    "cat": shapes.concatenate,
    "stack": shapes.stack,
    "permute": shapes.permute,
    "transpose": shapes.transpose,
    "t": shapes.reverse,
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
    **dict.fromkeys(("expand", "expand_as"), copies.expand),
    "repeat": copies.repeat,
    **dict.fromkeys(("zeros", "ones", "full", "empty", "new_zeros", "new_ones"), copies.filled),
    **dict.fromkeys(("new_full", "new_empty"), copies.filled),
    "glu": shapes.glu,
    "pixel_shuffle": shapes.pixel_shuffle,
    "pixel_unshuffle": shapes.pixel_unshuffle,
    "channel_shuffle": shapes.channel_shuffle,
    "flip": positions.flip,
    "roll": positions.along("dims"),
    "rot90": positions.rotate,
    **dict.fromkeys(_ALONG, positions.along("dim")),
    **dict.fromkeys(_PICKING, positions.along("dim", keeps=positions.keeps_dimensions)),
    **dict.fromkeys(("tril", "triu"), positions.triangle),
    "diagonal": positions.diagonal,
    "diag_embed": positions.embed_diagonal,
    "gather": positions.gather,
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), positions.scatter),
    "index_select": positions.index_select,
    **dict.fromkeys(("index_add", "index_copy", "index_reduce"), positions.index_write),
    "index": positions.index,
    "index_put": positions.index_put,
    "slice_scatter": positions.slice_scatter,
    **dict.fromkeys(("select_scatter", "diagonal_scatter"), positions.select_scatter),
    **dict.fromkeys(("max_unpool2d", "max_unpool3d"), positions.unpool),
    "view_as_real": positions.complex_parts,
    "view_as_complex": positions.complex_number,
    "unfold": shapes.windows,
    "im2col": shapes.patches,
    "col2im": shapes.fold,
}
"""ATen operation -> how channel ids pass through it."""
