"""Attention modules that can lose heads, and channels of the streams that they read and write.

The forward passes of PyTorch and torchvision derive the width of a head from the width of the stream, so neither
can change. The modules here compute the same, but read both off the weights. To remove a head is exact where its
queries, keys, values and columns of the output projection are zero in the masked model: it puts out zeros,
whatever it attends to.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ThinAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with fewer heads; attention weights are averaged over those that are left."""

    returns_weights = True  # False in a trace, where averaging the weights would tie the heads together

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `torch.nn.MultiheadAttention.forward`."""
        is_batched, is_self = query.dim() == 3, query is key and key is value
        streams = [query] if is_self else [query, key, value]
        if not is_batched:
            streams = [x.unsqueeze(0) for x in streams]
        elif not self.batch_first:
            streams = [x.transpose(0, 1) for x in streams]
        q, k, v = (torch.unflatten(x, -1, (-1, self.head_dim)).transpose(1, 2) for x in self._project(streams))
        mask = _mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            mixed = F.dropout(weights, dropout) @ v
            if not self.returns_weights:
                weights = torch.zeros(weights.shape)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = F.linear(mixed.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not is_batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, streams: list[Tensor]) -> list[Tensor]:
        """Queries, keys and values, each (batch, tokens, heads x head_dim)."""
        biases = [None] * 3 if self.in_proj_bias is None else list(self.in_proj_bias.chunk(3))
        if self.in_proj_weight is None:
            matrices = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
            return [
                F.linear(x, w, b) for x, w, b in zip(streams * (3 // len(streams)), matrices, biases, strict=True)
            ]
        if len(streams) == 1:
            return list(F.linear(streams[0], self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1))
        matrices = list(self.in_proj_weight.chunk(3))
        return [F.linear(x, w, b) for x, w, b in zip(streams, matrices, biases, strict=True)]


def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The sum of the masks, to be added to scores of shape (batch, heads, tokens, keys); None without masks.

    A boolean mask is True where attention is not allowed.
    """
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.dim() == 2 else torch.unflatten(attn_mask, 0, (len(q), -1)))
    if key_padding_mask is not None:
        masks.append(key_padding_mask.view(len(q), 1, 1, -1))
    added = [
        torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
        for mask in masks
    ]
    return sum(added[1:], added[0]) if added else None


class ThinWindowAttention(nn.Module):
    """Attention within shifted windows, as in torchvision's Swin Transformers, with fewer heads.

    Liu et al., "Swin Transformer" (ICCV 2021), and "Swin Transformer V2" (CVPR 2022), in which scores are scaled
    cosines and a small network computes the position bias. It has the parameters and settings of
    ``ShiftedWindowAttention`` or ``ShiftedWindowAttentionV2``.
    """

    head_dim: int
    window_size: list[int]
    shift_size: list[int]
    attention_dropout: float
    dropout: float
    qkv: nn.Linear
    proj: nn.Linear
    relative_position_index: Tensor
    relative_position_bias_table: Tensor
    relative_coords_table: Tensor
    cpb_mlp: nn.Sequential

    def forward(self, x: Tensor) -> Tensor:
        """The attended stream, shape (batch, height, width, channels) as that of ``x``."""
        _, height, width, _ = x.shape
        x = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        counts = [n // size for n, size in zip(x.shape[1:3], self.window_size, strict=True)]
        # A window as large as the image is not shifted.
        shifts = [0 if n == 1 else shift for n, shift in zip(counts, self.shift_size, strict=True)]
        x = torch.roll(x, [-shift for shift in shifts], (1, 2)) if any(shifts) else x
        rows = torch.unflatten(x, 1, (counts[0], -1))
        windows = torch.unflatten(rows, 3, (counts[1], -1)).transpose(2, 3)
        tokens = self._attend(windows.flatten(3, 4).flatten(0, 2), self._shift_mask(counts, shifts, x))
        windows = torch.unflatten(torch.unflatten(tokens, 1, self.window_size), 0, (-1, *counts))
        x = windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        x = torch.roll(x, shifts, (1, 2)) if any(shifts) else x
        return x[:, :height, :width].contiguous()

    def _attend(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Attention among the tokens of each window, shape (batch x windows, tokens, channels)."""
        logit_scale: Tensor | None = getattr(self, "logit_scale", None)
        bias: Tensor | None = self.qkv.bias
        if logit_scale is not None and bias is not None:  # V2's keys have no bias
            query, key, value = bias.chunk(3)
            bias = torch.cat([query, torch.zeros_like(key), value])
        q, k, v = F.linear(tokens, self.qkv.weight, bias).chunk(3, dim=-1)
        q, k, v = (torch.unflatten(x, -1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        if logit_scale is not None:
            scale = logit_scale.clamp(max=math.log(100.0)).exp()
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale
        else:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        scores = scores + self._position_bias(q.shape[2])
        if mask is not None:
            scores = (torch.unflatten(scores, 0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        mixed = F.dropout(scores.softmax(-1), self.attention_dropout, self.training) @ v
        out = F.linear(mixed.transpose(1, 2).flatten(2), self.proj.weight, self.proj.bias)
        return F.dropout(out, self.dropout, self.training)

    def _position_bias(self, n_tokens: int) -> Tensor:
        """The bias of each pair of tokens by their relative position, shape (heads, tokens, tokens)."""
        if hasattr(self, "cpb_mlp"):
            table = 16 * self.cpb_mlp(self.relative_coords_table).flatten(0, -2).sigmoid()
        else:
            table = self.relative_position_bias_table
        return _by_head(table, self.relative_position_index, n_tokens)

    def _shift_mask(self, counts: Sequence[int], shifts: Sequence[int], x: Tensor) -> Tensor | None:
        """-100 for pairs of tokens that only the shift brought together, else 0, shape (windows, tokens, tokens).

        None without a shift.
        """
        if not any(shifts):
            return None
        down, across = (
            _region(n * size, size, shift, x.device)
            for n, size, shift in zip(counts, self.window_size, shifts, strict=True)
        )
        regions = (3 * down[:, None] + across).view(counts[0], self.window_size[0], counts[1], self.window_size[1])
        of_window = regions.transpose(1, 2).flatten(2).flatten(0, 1)
        return torch.where(of_window[:, None] != of_window[:, :, None], -100.0, 0.0).to(x.dtype)


def _region(n: int, size: int, shift: int, device: torch.device) -> Tensor:
    """For each of ``n`` places along a dimension 2 if the shift moved it there from the other end, shape (n,).

    It is 1 at the other places of the last window, of ``size`` places, and 0 before; 0 everywhere without a shift.
    """
    places = torch.arange(n, device=device)
    return (places >= n - size).long() + (places >= n - shift) if shift else torch.zeros_like(places)


def _by_head(table: Tensor, index: Tensor, n_tokens: int) -> Tensor:
    """A table's entry of each head for each pair of tokens, shape (heads, tokens, tokens)."""
    return table[index.flatten()].view(n_tokens, n_tokens, -1).permute(2, 0, 1)


class ThinGridAttention(nn.Module):
    """Attention within windows or grids, as in torchvision's MaxViT, with fewer heads.

    Tu et al., "MaxViT: Multi-Axis Vision Transformer" (ECCV 2022). It has the parameters and settings of
    ``RelativePositionalMultiHeadAttention``.
    """

    head_dim: int
    scale_factor: float
    to_qkv: nn.Linear
    merge: nn.Linear
    relative_position_index: Tensor
    relative_position_bias_table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """The attended stream, shape (batch, groups, tokens, channels) as that of ``x``."""
        n_tokens = x.shape[2]
        q, k, v = (
            torch.unflatten(part, -1, (-1, self.head_dim)).transpose(2, 3)
            for part in self.to_qkv(x).chunk(3, dim=-1)
        )
        bias = _by_head(self.relative_position_bias_table, self.relative_position_index, n_tokens)
        mixed = (q @ (k * self.scale_factor).transpose(-2, -1) + bias).softmax(-1) @ v
        out: Tensor = self.merge(mixed.transpose(2, 3).flatten(3))
        return out


@dataclass(frozen=True)
class Known:
    """A kind of attention module whose heads can be removed.

    Attributes:
        form: The class that computes the same with fewer heads.
        projections: Names of the parameters that make queries, keys and values.
        parts: How many of queries, keys and values each of these parameters makes.
        uncalled: Names of the inner layers that are never called: the module reads their weights.
    """

    form: type[nn.Module]
    projections: tuple[str, ...]
    parts: int = 3
    uncalled: tuple[str, ...] = ()


_PACKED = Known(ThinAttention, ("in_proj_weight",), uncalled=("out_proj",))
_SEPARATE = Known(
    ThinAttention, ("q_proj_weight", "k_proj_weight", "v_proj_weight"), parts=1, uncalled=("out_proj",)
)
_WINDOWS = Known(ThinWindowAttention, ("qkv.weight",), uncalled=("qkv", "proj"))
_GRID = Known(ThinGridAttention, ("to_qkv.weight",))
# By name, so that torchvision need not be imported.
_KNOWN = {
    "torch.nn.modules.activation.MultiheadAttention": _PACKED,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": _WINDOWS,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": _WINDOWS,
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": _GRID,
    **{f"{__name__}.{known.form.__name__}": known for known in (_PACKED, _WINDOWS, _GRID)},  # pruned once more
}


def known_attention(module: nn.Module) -> Known | None:
    """The kind of attention of a module; None if it is no attention, or one whose heads cannot be removed."""
    known = _KNOWN.get(f"{type(module).__module__}.{type(module).__qualname__}")
    if isinstance(module, nn.MultiheadAttention):
        if module.bias_k is not None or module.add_zero_attn:
            return None
        return _SEPARATE if known is _PACKED and module.in_proj_weight is None else known
    return known


def make_thin(module: nn.Module, dense: nn.Module) -> None:
    """Turns a module of a known kind into its thin form, in place.

    Args:
        module: The module, whose parameters may have lost heads, or channels of the stream.
        dense: The module as it was before.
    """
    known = known_attention(dense)
    assert known is not None
    head_dim = _head_dim(dense, known)
    module.__class__ = known.form  # it keeps its parameters, settings, mode and hooks
    setattr(module, "head_dim", head_dim)  # noqa: B010  # nn.Module does not declare it
    n_heads = len(module.get_parameter(known.projections[0])) // known.parts // head_dim
    setattr(module, "n_heads" if known is _GRID else "num_heads", n_heads)
    if isinstance(module, nn.MultiheadAttention):
        module.embed_dim = len(module.out_proj.weight)
        module._qkv_same_embed_dim = False  # keeps PyTorch's encoder from its fused kernel


def _head_dim(module: nn.Module, known: Known) -> int:
    if hasattr(module, "head_dim"):
        return int(module.head_dim)  # type: ignore[arg-type]  # a number, which mypy cannot know
    return len(module.get_parameter(known.projections[0])) // known.parts // int(module.num_heads)  # type: ignore[arg-type]


def heads_of_rows(model: nn.Module) -> dict[str, Tensor]:
    """For each parameter that makes queries, keys or values: the head of each of its rows, shape (rows,)."""
    heads = {}
    for layer, module in model.named_modules():
        if (known := known_attention(module)) is not None:
            head_dim = _head_dim(module, known)
            for name in known.projections:
                n_heads = len(module.get_parameter(name)) // known.parts // head_dim
                of_part = torch.arange(n_heads).repeat_interleave(head_dim)
                heads[f"{layer}.{name}".lstrip(".")] = of_part.repeat(known.parts)
    return heads


def make_traceable(model: nn.Module) -> nn.Module:
    """Turns all attention of known kinds, in place, into forms that a trace can follow; for tracing alone."""
    for module in model.modules():
        if known_attention(module) is not None:
            make_thin(module, module)
            setattr(module, "returns_weights", False)  # noqa: B010  # nn.Module does not declare it
    return model
