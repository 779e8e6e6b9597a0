"""Multi-head attention whose projections are adapted layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layer import TapsLayer
from .stand_in import OF_EVERY_MODULE, fill


class TaskAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that calls its projections: the original reads their weights and never does.

    Args:
        source: for its configuration, and what else was set on it.
        in_proj: the layer of ``in_proj_weight`` [3·E, E].
        out_proj: the layer of ``out_proj.weight``.

    Cost: as the original in self-attention. Where key or value is another tensor than query, the whole in-projection
    runs once for each distinct one.
    """

    # nn.TransformerEncoderLayer asks for this first; the answer keeps it off its path in C++, which reads weights.
    in_proj_bias = None  # type: ignore[assignment]
    in_proj: TapsLayer
    out_proj: TapsLayer  # type: ignore[assignment]

    def __init__(self, source: nn.MultiheadAttention, in_proj: TapsLayer, out_proj: TapsLayer) -> None:
        nn.Module.__init__(self)
        self.taken = [name for name in vars(source) if name not in OF_EVERY_MODULE]
        self.__dict__.update({name: vars(source)[name] for name in self.taken})
        self.in_proj, self.out_proj = in_proj, out_proj
        self.training = source.training

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
        """As ``nn.MultiheadAttention``; ``attn_mask`` is used also where it is said to be causal."""
        if is_causal and attn_mask is None:
            raise RuntimeError(f"{self.in_proj.path}: is_causal must go with an attn_mask, got none")
        q, k, v = (self._heads(t) for t in self._project(query, key, value))  # [B, heads, length, E / heads]
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            weights = torch.softmax(logits if mask is None else logits + mask, -1)
            weights = F.dropout(weights, dropout) if dropout > 0.0 else weights
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = y.transpose(1, 2).flatten(2)  # [B, length, E]
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if query.dim() == 2:
            y, weights = y[0], None if weights is None else weights[0]
        elif not self.batch_first:
            y = y.transpose(0, 1)
        return self.out_proj(y), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self.embed_dim
        projected = self.in_proj(query)
        q, k, v = projected.split(width, -1)
        if key is not query:
            projected = self.in_proj(key)
            k = projected[..., width : 2 * width]
        if value is not key:
            projected = self.in_proj(value)
        if value is not query:
            v = projected[..., 2 * width :]
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        """[B, heads, length, E / heads] from [length, B, E], [B, length, E] or [length, E]."""
        x = x[None] if x.dim() == 2 else x if self.batch_first else x.transpose(0, 1)
        return x.reshape(*x.shape[:2], self.num_heads, x.shape[2] // self.num_heads).transpose(1, 2)

    def _mask(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """What is added to the logits [B, heads, L, S]."""
        total: Tensor | None = None
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.reshape(len(attn_mask) // self.num_heads, self.num_heads, *attn_mask.shape[1:])
            total = _additive(attn_mask, q.dtype)
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype).reshape(q.shape[0], 1, 1, k.shape[2])
            total = padding if total is None else total + padding
        return None if total is None else total.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])

    def merged(self, task: str | None) -> nn.MultiheadAttention:
        """The ordinary module with the weights of ``task``."""
        weight, bias = self.in_proj.effective(task)
        bare = nn.MultiheadAttention(
            self.embed_dim, self.num_heads, self.dropout, bias is not None, batch_first=self.batch_first, device="meta"
        )
        bare.__dict__.update({name: vars(self)[name] for name in self.taken})
        bare.in_proj_weight = nn.Parameter(weight.detach().clone())
        bare.register_parameter("in_proj_bias", None if bias is None else nn.Parameter(bias.detach().clone()))
        weight, bias = self.out_proj.effective(task)
        fill(bare.out_proj, weight, bias, self.training)
        return bare.train(self.training)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 and -inf for a boolean mask, whose True means "not this one"; a float mask as it is."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
    return mask.to(dtype)
