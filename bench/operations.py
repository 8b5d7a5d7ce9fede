"""Tensor functions to call between two convolutions, for `operation_outcomes`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor

SIDE = 6
"""Height and width of the feature maps."""

Function = Callable[[Tensor], Tensor]


def _gate(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _written(x: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    """Return a copy of the values after something was written into it."""
    values = x.clone()
    write(values)
    return values


def _out(function: Callable[..., object]) -> Function:
    """Return a function that writes its value into a tensor that it is passed."""

    def write(x: Tensor) -> Tensor:
        value = torch.empty_like(x)
        function(x, out=value)
        return value

    return write


def _standardised(x: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(x, (2, 3), keepdim=True)
    return (x - mean) / (deviation + 1)


ARITHMETIC: dict[str, Function] = {
    "torch.add": lambda x: torch.add(x, 1, alpha=2),
    "torch.sub": lambda x: torch.sub(x, 1),
    "torch.subtract": lambda x: torch.subtract(x, 1),
    "torch.mul": lambda x: torch.mul(x, 2),
    "torch.multiply": lambda x: torch.multiply(x, 2),
    "torch.div": lambda x: torch.div(x, 2),
    "torch.divide": lambda x: torch.divide(x, 2),
    "torch.true_divide": lambda x: torch.true_divide(x, 2),
    "torch.floor_divide": lambda x: torch.floor_divide(x, 0.3),
    "torch.remainder": lambda x: torch.remainder(x, 0.7),
    "torch.fmod": lambda x: torch.fmod(x, 0.7),
    "torch.neg": torch.neg,
    "torch.negative": torch.negative,
    "torch.positive": torch.positive,
    "torch.abs": torch.abs,
    "torch.absolute": torch.absolute,
    "torch.sign": torch.sign,
    "torch.sgn": torch.sgn,
    "torch.reciprocal": lambda x: torch.reciprocal(x.abs() + 1),
    "torch.sqrt": lambda x: torch.sqrt(x.abs()),
    "torch.rsqrt": lambda x: torch.rsqrt(x.abs() + 1),
    "torch.square": torch.square,
    "torch.pow": lambda x: torch.pow(x, 2),
    "torch.float_power": lambda x: torch.float_power(x, 2).to(x.dtype),
    "torch.exp": torch.exp,
    "torch.exp2": torch.exp2,
    "torch.expm1": torch.expm1,
    "torch.log": lambda x: torch.log(x.abs() + 1),
    "torch.log2": lambda x: torch.log2(x.abs() + 1),
    "torch.log10": lambda x: torch.log10(x.abs() + 1),
    "torch.log1p": lambda x: torch.log1p(x.abs()),
    "torch.sin": torch.sin,
    "torch.cos": torch.cos,
    "torch.tan": torch.tan,
    "torch.arcsin": lambda x: torch.arcsin(x.tanh()),
    "torch.arctan": torch.arctan,
    "torch.atan2": lambda x: torch.atan2(x, x + 2),
    "torch.sinh": torch.sinh,
    "torch.asinh": torch.asinh,
    "torch.erf": torch.erf,
    "torch.erfinv": lambda x: torch.erfinv(x.tanh() * 0.9),
    "torch.special.expit": torch.special.expit,
    "torch.special.i0": torch.special.i0,
    "torch.sinc": torch.sinc,
    "torch.lgamma": lambda x: torch.lgamma(x.abs() + 1),
    "torch.digamma": lambda x: torch.digamma(x.abs() + 1),
    "torch.logit": lambda x: torch.logit(x.sigmoid(), 0.01),
    "torch.hypot": lambda x: torch.hypot(x, x + 1),
    "torch.logaddexp": lambda x: torch.logaddexp(x, x + 1),
    "torch.xlogy": lambda x: torch.xlogy(x.abs(), x.abs() + 1),
    "torch.floor": torch.floor,
    "torch.ceil": torch.ceil,
    "torch.round": torch.round,
    "torch.trunc": torch.trunc,
    "torch.fix": torch.fix,
    "torch.frac": torch.frac,
    "torch.copysign": lambda x: torch.copysign(x, x - 1),
    "torch.heaviside": lambda x: torch.heaviside(x, x + 1),
    "torch.clamp": lambda x: torch.clamp(x, 0, 6),
    "torch.clip": lambda x: torch.clip(x, 0, 6),
    "Tensor.clip": lambda x: x.clip(min=0),
    "Tensor.clamp_min": lambda x: x.clamp_min(0.1),
    "torch.nan_to_num": torch.nan_to_num,
    "torch.addcmul": lambda x: torch.addcmul(x, x, x + 1, value=0.5),
    "torch.addcdiv": lambda x: torch.addcdiv(x, x, x.abs() + 1),
    "torch.lerp": lambda x: torch.lerp(x, x + 1, 0.3),
    "torch.maximum": lambda x: torch.maximum(x, x * 0.1),
    "torch.minimum": lambda x: torch.minimum(x, x * 0.1),
    "torch.fmax": lambda x: torch.fmax(x, x * 0.1),
    "torch.max of two": lambda x: torch.max(x, x * 0.1),
    "torch.where": lambda x: torch.where(x > 0, x, x * 0.1),
    "Tensor.masked_fill": lambda x: x.masked_fill(x < 0, 0.5),
    "torch.greater": lambda x: torch.greater(x, 0).to(x.dtype),
    "torch.less_equal": lambda x: torch.less_equal(x, 0).to(x.dtype),
    "torch.not_equal": lambda x: torch.not_equal(x, 0).to(x.dtype),
    "torch.isclose": lambda x: torch.isclose(x, x + 1).to(x.dtype) + x,
    "torch.isfinite": lambda x: torch.isfinite(x).to(x.dtype) + x,
    "torch.logical_xor": lambda x: torch.logical_xor(x > 0, x > 1).to(x.dtype),
    "torch.bitwise_and": lambda x: ((x > 0) & (x > 1)).to(x.dtype),
    "Tensor.half": lambda x: x.float().to(x.dtype),
    "Tensor.type": lambda x: x.type(torch.float32).type(x.dtype),
    "torch.complex": lambda x: torch.complex(x, x + 1).abs(),
    "torch.view_as_complex": lambda x: torch.view_as_complex(torch.stack([x, x], -1)).imag,
    "torch.polar": lambda x: torch.polar(x.abs(), x).real,
    "torch.angle": lambda x: torch.angle(x),
    "Tensor.add_": lambda x: x.add_(1),
    "Tensor.multiply_": lambda x: x.multiply_(2),
    "Tensor.clip_": lambda x: x.clip_(0, 6),
    "Tensor.neg_": lambda x: x.neg_(),
    "Tensor.squeeze_": lambda x: x.unsqueeze(1).squeeze_(1),
    "Tensor.unsqueeze_": lambda x: x.unsqueeze_(-1).squeeze(-1),
    "Tensor.transpose_": lambda x: x.exp().transpose_(2, 3),
    "Tensor.exp_": lambda x: x.exp_(),
    "torch.add(out=)": _out(lambda x, out: torch.add(x, x, out=out)),
    "torch.multiply(out=)": _out(lambda x, out: torch.multiply(x, x, out=out)),
    "torch.sigmoid(out=)": _out(torch.sigmoid),
}

ACTIVATIONS: dict[str, Function] = {
    "F.relu": F.relu,
    "F.relu6": F.relu6,
    "F.leaky_relu": F.leaky_relu,
    "F.elu": F.elu,
    "F.selu": F.selu,
    "F.celu": F.celu,
    "F.gelu": F.gelu,
    "F.silu": F.silu,
    "F.mish": F.mish,
    "F.hardswish": F.hardswish,
    "F.hardsigmoid": F.hardsigmoid,
    "F.hardtanh": F.hardtanh,
    "F.softplus": F.softplus,
    "F.softsign": F.softsign,
    "F.logsigmoid": F.logsigmoid,
    "F.tanhshrink": F.tanhshrink,
    "F.hardshrink": F.hardshrink,
    "F.softshrink": F.softshrink,
    "F.threshold": lambda x: F.threshold(x, 0.1, 0.2),
    "F.glu": lambda x: F.glu(x, 1),
    "F.prelu": lambda x: F.prelu(x, torch.tensor([0.2], dtype=x.dtype)),
    "F.rrelu": F.rrelu,
    "F.dropout": lambda x: F.dropout(x, training=False),
    "F.dropout in place": lambda x: F.dropout(x, training=False, inplace=True),
    "F.dropout2d in place": lambda x: F.dropout2d(x, training=False, inplace=True),
    "F.alpha_dropout in place": lambda x: F.alpha_dropout(x, training=False, inplace=True),
    "F.selu in place": lambda x: F.selu(x, inplace=True),
    "F.hardtanh in place": lambda x: F.hardtanh(x, inplace=True),
    "F.hardswish in place": lambda x: F.hardswish(x, inplace=True),
    "F.rrelu in place": lambda x: F.rrelu(x, inplace=True),
    "F.threshold in place": lambda x: F.threshold(x, 0.1, 0.2, inplace=True),
    "F.dropout2d": lambda x: F.dropout2d(x, training=False),
    "F.alpha_dropout": lambda x: F.alpha_dropout(x, training=False),
    "F.softmax": lambda x: F.softmax(x, 1),
    "F.softmin": lambda x: F.softmin(x, 1),
    "F.log_softmax": lambda x: F.log_softmax(x, 1),
    "F.softmax over positions": lambda x: x.flatten(2).softmax(-1).view_as(x),
}

NORMS: dict[str, Function] = {
    "F.normalize": lambda x: F.normalize(x, dim=1),
    "F.normalize over positions": lambda x: F.normalize(x, dim=-1),
    "F.layer_norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "F.rms_norm": lambda x: F.rms_norm(x, x.shape[-2:]),
    "F.group_norm": lambda x: F.group_norm(x, 1),
    "F.instance_norm": F.instance_norm,
    "F.local_response_norm": lambda x: F.local_response_norm(x, 3),
    "torch.norm": lambda x: x / (torch.norm(x, dim=1, keepdim=True) + 1),
    "torch.linalg.norm": lambda x: x / (torch.linalg.norm(x, dim=(2, 3), keepdim=True) + 1),
    "torch.linalg.vector_norm": lambda x: x / (torch.linalg.vector_norm(x, dim=1, keepdim=True)),
    "torch.std_mean": _standardised,
    "torch.var": lambda x: x / (torch.var(x, 1, keepdim=True) + 1),
    "torch.logsumexp": lambda x: x - torch.logsumexp(x, (2, 3), keepdim=True),
    "torch.renorm": lambda x: torch.renorm(x, 2, 0, 1.0),
    "F.cosine_similarity": lambda x: x * F.cosine_similarity(x, x + 1, dim=1)[:, None],
    "F.pairwise_distance": lambda x: x * F.pairwise_distance(x, x + 1)[..., None],
}

REDUCTIONS: dict[str, Function] = {
    "torch.mean": lambda x: x.mean((2, 3)),
    "torch.sum": lambda x: x.sum(-1),
    "torch.nansum": lambda x: x.nansum(-1),
    "torch.nanmean": lambda x: x.nanmean(-1),
    "torch.amax": lambda x: x.amax((2, 3)),
    "torch.aminmax": lambda x: x.aminmax(dim=3)[0],
    "Tensor.max over positions": lambda x: x.max(-1)[0],
    "torch.prod": lambda x: x.prod(-1),
    "torch.median": lambda x: x.median(-1)[0],
    "torch.nanmedian": lambda x: x.nanmedian(-1)[0],
    "torch.mode": lambda x: x.mode(-1)[0],
    "torch.kthvalue": lambda x: x.kthvalue(2, -1)[0],
    "torch.quantile": lambda x: torch.quantile(x, 0.3, dim=-1),
    "torch.argmax": lambda x: x.argmax(-1).to(x.dtype),
    "torch.count_nonzero": lambda x: torch.count_nonzero(x, -1).to(x.dtype),
    "torch.any": lambda x: (x > 0).any(-1).to(x.dtype),
    "torch.all": lambda x: (x > 0).all(-1).to(x.dtype),
    "torch.trapezoid": lambda x: torch.trapezoid(x, dim=-1),
    "torch.dist": lambda x: x * torch.dist(x, x + 1),
    "mean over channels": lambda x: x * x.mean(1, keepdim=True),
    "maximum over channels": lambda x: x * x.amax(1, keepdim=True),
    "argmax over channels": lambda x: x * x.argmax(1, keepdim=True),
    "median over channels": lambda x: x * x.median(1, keepdim=True)[0],
}

POSITIONS: dict[str, Function] = {
    "torch.cumsum": lambda x: x.cumsum(-1),
    "torch.cumprod": lambda x: x.cumprod(-1),
    "torch.cummax": lambda x: x.cummax(-1)[0],
    "torch.logcumsumexp": lambda x: x.logcumsumexp(-1),
    "torch.cumsum over channels": lambda x: x.cumsum(1),
    "torch.diff": lambda x: x.diff(dim=-1),
    "torch.gradient": lambda x: torch.gradient(x, dim=-1)[0],
    "torch.sort": lambda x: x.flatten(2).sort(-1)[0],
    "torch.sort over channels": lambda x: x.sort(1)[0],
    "torch.argsort": lambda x: x.flatten(2).argsort(-1).to(x.dtype),
    "torch.msort": lambda x: x.transpose(0, 2).msort().transpose(0, 2),
    "torch.topk": lambda x: x.flatten(2).topk(4, -1)[0],
    "torch.topk over channels": lambda x: x.topk(4, 1)[0],
    "torch.flip": lambda x: x.flip(-1),
    "torch.flip over channels": lambda x: x.flip(1),
    "torch.fliplr": lambda x: x.transpose(1, 2).fliplr().transpose(1, 2),
    "torch.rot90": lambda x: x.rot90(1, (2, 3)),
    "torch.roll": lambda x: x.roll(1, -1),
    "torch.roll over channels": lambda x: x.roll(1, 1),
    "torch.tril": torch.tril,
    "torch.triu": torch.triu,
    "torch.diagonal": lambda x: x.diagonal(dim1=2, dim2=3),
    "torch.diag_embed": lambda x: x.diag_embed(),
    "torch.linalg.diagonal": torch.linalg.diagonal,
    "torch.gather": lambda x: x.gather(3, torch.zeros_like(x, dtype=torch.long)),
    "torch.take_along_dim": lambda x: torch.take_along_dim(x, x.argsort(-1), -1),
    "torch.scatter": lambda x: x.scatter(3, torch.zeros_like(x, dtype=torch.long), x),
    "torch.scatter_add": lambda x: x.scatter_add(3, torch.zeros_like(x, dtype=torch.long), x),
    "torch.index_select": lambda x: x.index_select(-1, torch.tensor([0, 2, 4])),
    "torch.index_select of channels": lambda x: x.index_select(1, torch.tensor([0, 2, 4])),
    "torch.index_add": lambda x: x.index_add(-1, torch.tensor([0]), x[..., :1]),
    "torch.index_fill": lambda x: x.index_fill(-1, torch.tensor([0]), 0.5),
    "torch.index_copy": lambda x: x.index_copy(-1, torch.tensor([0]), x[..., 1:2]),
    "indexing with a list": lambda x: x[..., [0, 2, 1]],
    "indexing channels with a list": lambda x: x[:, [1, 0, 2]],
    "indexing with a mask": lambda x: x[..., torch.arange(x.shape[-1]) % 2 == 0],
    "torch.masked_select": lambda x: x * torch.masked_select(x, x > 0).sum(),
    "torch.take": lambda x: x * torch.take(x, torch.tensor([0])),
    "torch.bucketize": lambda x: torch.bucketize(x, torch.tensor([0.0, 1.0])).to(x.dtype),
    "torch.searchsorted": lambda x: torch.searchsorted(torch.tensor([0.0, 1.0]).to(x), x).to(
        x.dtype
    ),
    "torch.fft.fft": lambda x: torch.fft.fft(x, dim=-1).real,
    "torch.fft.fft2": lambda x: torch.fft.fft2(x).real,
    "torch.fft.rfft2": lambda x: torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[-2:]),
    "torch.fft.fftshift": lambda x: torch.fft.fftshift(x, dim=(2, 3)),
    "torch.fft over channels": lambda x: torch.fft.fft(x, dim=1).real,
}

SHAPES: dict[str, Function] = {
    "torch.permute": lambda x: torch.permute(x, (0, 2, 3, 1)).permute(0, 3, 1, 2),
    "torch.transpose": lambda x: x.transpose(1, 2).transpose(1, 2),
    "torch.swapaxes": lambda x: x.swapaxes(1, 2).swapaxes(1, 2),
    "torch.swapdims": lambda x: x.swapdims(1, 2).swapdims(1, 2),
    "torch.movedim": lambda x: x.movedim(1, -1).movedim(-1, 1),
    "torch.moveaxis": lambda x: x.moveaxis(1, -1).moveaxis(-1, 1),
    "Tensor.mT": lambda x: x.mT,
    "Tensor.adjoint": lambda x: x.adjoint(),
    "torch.t": lambda x: x.mean((2, 3)).t().t(),
    "torch.reshape": lambda x: x.reshape(x.shape[0], x.shape[1], -1),
    "Tensor.view": lambda x: x.view(x.shape[0], x.shape[1], -1),
    "Tensor.view_as": lambda x: x.flatten(2).view_as(x),
    "Tensor.reshape_as": lambda x: x.flatten(2).reshape_as(x),
    "torch.flatten": lambda x: x.flatten(1),
    "torch.ravel": lambda x: x * x.mean().ravel(),
    "torch.unflatten": lambda x: x.unflatten(1, (-1, 2)).flatten(1, 2),
    "torch.squeeze": lambda x: _gate(x).squeeze(-1),
    "torch.unsqueeze": lambda x: x.unsqueeze(2).squeeze(2),
    "torch.atleast_3d": torch.atleast_3d,
    "torch.cat": lambda x: torch.cat([x, x * 2], 1),
    "torch.concat": lambda x: torch.concat([x, x * 2], 1),
    "torch.concatenate": lambda x: torch.concatenate([x, x * 2], 1),
    "torch.hstack": lambda x: torch.hstack([x, x * 2]),
    "torch.vstack": lambda x: torch.vstack([x, x * 2])[: x.shape[0]],
    "torch.dstack": lambda x: torch.dstack([x, x * 2]),
    "torch.column_stack": lambda x: torch.column_stack([x, x * 2]),
    "torch.stack": lambda x: torch.stack([x, x * 2], 2).flatten(2, 3),
    "torch.split": lambda x: torch.cat(x.split(x.shape[1] // 2, 1)[::-1], 1),
    "torch.chunk": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "torch.tensor_split": lambda x: torch.cat(torch.tensor_split(x, 2, 1)[::-1], 1),
    "torch.hsplit": lambda x: torch.cat(torch.hsplit(x, 2)[::-1], 1),
    "torch.vsplit": lambda x: torch.cat(torch.vsplit(x.transpose(0, 2), 2)).transpose(0, 2),
    "torch.unbind": lambda x: torch.stack(x.unbind(-1)[::-1], -1),
    "torch.unbind of channels": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "torch.narrow": lambda x: x.narrow(-1, 1, 3),
    "torch.narrow of channels": lambda x: x.narrow(1, 0, x.shape[1] // 2),
    "torch.select": lambda x: x.select(-1, 0),
    "slices": lambda x: x[:, :, ::2, 1:],
    "slices of channels": lambda x: x[:, : x.shape[1] // 2],
    "Tensor.expand": lambda x: _gate(x).expand(-1, -1, 4, 4),
    "Tensor.expand_as": lambda x: _gate(x).expand_as(x) * x,
    "torch.broadcast_to": lambda x: torch.broadcast_to(_gate(x), x.shape) * x,
    "torch.broadcast_tensors": lambda x: torch.broadcast_tensors(x, _gate(x))[1] * x,
    "expand over channels": lambda x: x * x.mean(1, keepdim=True).expand(-1, x.shape[1], -1, -1),
    "Tensor.repeat": lambda x: x.repeat(1, 2, 1, 1),
    "repeat over channels": lambda x: x * x.mean(1, keepdim=True).repeat(1, x.shape[1], 1, 1),
    "torch.tile": lambda x: torch.tile(x, (1, 2, 1, 1)),
    "torch.repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "repeat_interleave over positions": lambda x: x.repeat_interleave(2, -1),
    "F.pad": lambda x: F.pad(x, (1, 1, 1, 1)),
    "F.pad reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "F.pad replicate": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "F.pad circular": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "F.pad of channels": lambda x: F.pad(x, (0, 0, 0, 0, 0, 3)),
    "F.pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "F.pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "F.channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "F.unfold": lambda x: F.unfold(x, 2),
    "F.fold": lambda x: F.fold(F.unfold(x, 2, stride=2), x.shape[-2:], 2, stride=2),
    "Tensor.unfold": lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).mean(-1),
    "torch.meshgrid": lambda x: (
        x + torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")[0]
    ),
    "torch.zeros_like": lambda x: x + torch.zeros_like(x),
    "torch.full_like": lambda x: x + torch.full_like(x, 2),
    "Tensor.new_zeros": lambda x: x + x.new_zeros(x.shape),
    "Tensor.new_full": lambda x: x * x.new_full((1, x.shape[1], 1, 1), 2),
    "torch.ones": lambda x: x * torch.ones(x.shape[1], 1, 1),
    "Tensor.contiguous": lambda x: x.contiguous(memory_format=torch.channels_last),
    "torch.clone": torch.clone,
    "Tensor.detach": lambda x: x.detach(),
    "Tensor.as_strided": lambda x: x.as_strided(x.shape, x.stride()),
    "torch.nonzero": lambda x: x * torch.nonzero(x > 0, as_tuple=False).shape[0],
}

RESIZING: dict[str, Function] = {
    "F.max_pool2d": lambda x: F.max_pool2d(x, 2),
    "F.avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "F.lp_pool2d": lambda x: F.lp_pool2d(x, 2, 2),
    "F.fractional_max_pool2d": lambda x: F.fractional_max_pool2d(
        x, 2, output_size=3, _random_samples=torch.full((x.shape[0], x.shape[1], 2), 0.3).to(x)
    ),
    "F.adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 2),
    "F.adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 2),
    "F.adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 2),
    "F.adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x.flatten(2), 2),
    "F.max_pool1d": lambda x: F.max_pool1d(x.flatten(2), 2),
    "F.avg_pool1d": lambda x: F.avg_pool1d(x.flatten(2), 2),
    "F.lp_pool1d": lambda x: F.lp_pool1d(x.flatten(2), 2, 2),
    "F.adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x[:, :, None], 2),
    "F.avg_pool3d": lambda x: F.avg_pool3d(x[:, :, None], (1, 2, 2)),
    "F.max_unpool2d": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), [2, 2]),
    "F.max_unpool1d": lambda x: F.max_unpool1d(
        *F.max_pool1d(x.flatten(2), 2, return_indices=True), [2]
    ),
    "F.interpolate nearest": lambda x: F.interpolate(x, scale_factor=2),
    "F.interpolate nearest-exact": lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    "F.interpolate bilinear": lambda x: F.interpolate(x, size=(9, 9), mode="bilinear"),
    "F.interpolate bicubic": lambda x: F.interpolate(x, size=(9, 9), mode="bicubic"),
    "F.interpolate area": lambda x: F.interpolate(x, size=(3, 3), mode="area"),
    "F.interpolate antialias": lambda x: F.interpolate(
        x, size=(3, 3), mode="bilinear", antialias=True
    ),
    "F.interpolate linear": lambda x: F.interpolate(x.flatten(2), size=9, mode="linear"),
    "F.interpolate trilinear": lambda x: F.interpolate(
        x[:, :, None], size=(2, 3, 3), mode="trilinear"
    ),
    "F.interpolate nearest-exact 1d": lambda x: F.interpolate(
        x.flatten(2), size=9, mode="nearest-exact"
    ),
    "F.grid_sample": lambda x: F.grid_sample(
        x,
        F.affine_grid(
            torch.eye(2, 3).to(x).expand(x.shape[0], -1, -1),
            [x.shape[0], 1, 4, 4],
            align_corners=False,
        ),
        align_corners=False,
    ),
    "F.upsample_bilinear": lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear"),
}

PRODUCTS: dict[str, Function] = {
    "torch.matmul": lambda x: x @ torch.ones(SIDE, 4).to(x),
    "torch.matmul of maps": lambda x: x @ x.transpose(-1, -2),
    "torch.bmm": lambda x: torch.bmm(x.flatten(2), x.flatten(2).transpose(1, 2)),
    "torch.baddbmm": lambda x: torch.baddbmm(
        x.flatten(2), x.flatten(2), x.flatten(2).transpose(1, 2) @ x.flatten(2)
    ),
    "torch.mv": lambda x: x * torch.mv(torch.ones(SIDE, SIDE).to(x), torch.ones(SIDE).to(x)),
    "torch.einsum": lambda x: torch.einsum("bchw,wv->bchv", x, torch.ones(SIDE, 4).to(x)),
    "torch.einsum of maps": lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
    "torch.tensordot": lambda x: torch.tensordot(x, torch.ones(SIDE, 4).to(x), 1),
    "torch.inner": lambda x: torch.inner(x, torch.ones(4, SIDE).to(x)),
    "torch.outer": lambda x: x * torch.outer(torch.arange(6.0), torch.arange(6.0)).to(x),
    "torch.kron": lambda x: torch.kron(x, torch.ones(1, 1, 2, 2).to(x)),
    "torch.cdist": lambda x: torch.cdist(_tokens(x), _tokens(x + 1)),
    "torch.linalg.matmul": lambda x: torch.linalg.matmul(x, torch.ones(SIDE, 4).to(x)),
    "torch.linalg.vecdot": lambda x: torch.linalg.vecdot(x, x + 1, dim=-1),
    "torch.cross": lambda x: torch.linalg.cross(x[..., :3], x[..., 3:], dim=-1),
    "F.scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(
        _tokens(x), _tokens(x), _tokens(x)
    ).transpose(1, 2),
    "F.bilinear": lambda x: F.bilinear(x, x, torch.ones(4, SIDE, SIDE).to(x)),
    "F.linear over positions": lambda x: F.linear(x, torch.ones(4, SIDE).to(x)),
    "F.conv2d, depthwise": lambda x: F.conv2d(
        x, torch.ones(1, 1, 3, 3).to(x).expand(x.shape[1], 1, 3, 3), groups=x.shape[1]
    ),
    "F.conv2d, a fixed kernel": lambda x: F.conv2d(x, torch.ones(4, x.shape[1], 3, 3).to(x)),
    "F.embedding": lambda x: x + F.embedding(torch.tensor([1]), torch.ones(4, SIDE).to(x)),
    "F.one_hot": lambda x: x * F.one_hot(torch.arange(SIDE), SIDE).to(x),
    "torch.linalg.inv": lambda x: torch.linalg.inv(x + 9 * torch.eye(SIDE).to(x)),
    "torch.linalg.svd": lambda x: torch.linalg.svd(x, full_matrices=False)[1],
    "torch.corrcoef": lambda x: x * torch.corrcoef(x.mean((0, 2)).T).sum(),
}

WRITES: dict[str, Function] = {
    "x[:, :, 0] = 0": lambda x: _written(x, lambda y: y[:, :, 0].zero_()),
    "x[:, :, :2] = number": lambda x: _written(x, lambda y: y[:, :, :2].fill_(0.5)),
    "x[..., 1:] += value": lambda x: _written(x, lambda y: y[..., 1:].add_(x[..., :-1])),
    "x[mask] = number": lambda x: _written(x, lambda y: y.__setitem__(x < 0, 0.0)),
    "x[:, half:] = value": lambda x: _written(x, lambda y: y[:, x.shape[1] // 2 :].mul_(2)),
    "x[:, 0] = 0": lambda x: _written(x, lambda y: y[:, 0].zero_()),
    "x[..., list] = value": lambda x: _written(x, lambda y: y.__setitem__((..., [0, 2]), 1.0)),
    "a view relu_'d": lambda x: _written(x, lambda y: y.flatten(1).relu_()),
    "a transposed view": lambda x: _written(x, lambda y: y.transpose(1, 2).mul_(2)),
    "a diagonal": lambda x: _written(x, lambda y: y.diagonal(dim1=2, dim2=3).zero_()),
    "Tensor.fill_diagonal_": lambda x: x + torch.zeros(SIDE, SIDE).to(x).fill_diagonal_(1),
    "Tensor.copy_": lambda x: torch.empty_like(x).copy_(x),
    "Tensor.index_add_": lambda x: _written(
        x, lambda y: y.index_add_(-1, torch.tensor([0]), x[..., :1])
    ),
    "Tensor.masked_fill_": lambda x: _written(x, lambda y: y.masked_fill_(x < 0, 0.5)),
    "Tensor.scatter_": lambda x: _written(
        x, lambda y: y.scatter_(3, torch.zeros_like(x, dtype=torch.long), 0.5)
    ),
    "a buffer filled slice by slice": lambda x: _filled_by_slices(x),
    "chunks written in place": lambda x: _written(x, lambda y: y.chunk(2, 1)[0].add_(1)),
}


def _filled_by_slices(x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    value = x.new_empty(x.shape)
    value[:, :half] = x[:, half:]
    value[:, half:] = x[:, :half]
    return value


VISION: dict[str, Function] = {
    "torchvision.ops.deform_conv2d": lambda x: torchvision.ops.deform_conv2d(
        x,
        torch.zeros(x.shape[0], 18, SIDE, SIDE).to(x),
        torch.ones(4, x.shape[1], 3, 3).to(x),
        padding=1,
    ),
    "torchvision.ops.roi_align": lambda x: torchvision.ops.roi_align(
        x, torch.tensor([[0.0, 0, 0, 4, 4]]).to(x), 2
    ),
    "torchvision.ops.roi_pool": lambda x: torchvision.ops.roi_pool(
        x, torch.tensor([[0.0, 0, 0, 4, 4]]).to(x), 2
    ),
    "torchvision.ops.ps_roi_align": lambda x: torchvision.ops.ps_roi_align(
        x, torch.tensor([[0.0, 0, 0, 4, 4]]).to(x), 2
    ),
    "torchvision.ops.stochastic_depth": lambda x: torchvision.ops.stochastic_depth(
        x, 0.5, "row", training=False
    ),
    "torchvision.ops.drop_block2d": lambda x: torchvision.ops.drop_block2d(
        x, 0.5, 3, training=False
    ),
}

FAMILIES: dict[str, dict[str, Function]] = {
    "Arithmetic": ARITHMETIC,
    "Activations": ACTIVATIONS,
    "Norms": NORMS,
    "Reductions": REDUCTIONS,
    "Order and places": POSITIONS,
    "Shapes": SHAPES,
    "Pooling and resizing": RESIZING,
    "Products": PRODUCTS,
    "Writes in place": WRITES,
    "torchvision.ops": VISION,
}
FUNCTIONS: dict[str, Function] = {
    name: function for family in FAMILIES.values() for name, function in family.items()
}
