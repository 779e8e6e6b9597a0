"""The two operations all else is made of: `delta_linear` and `delta_conv2d`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import _call
from ._call import How
from ._problem import IntPair
from .formats import Format
from .norms import Tasks


def delta_linear(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor | Format] | Tensor,
    coeffs: Tensor,
    bias: Tensor | None = None,
    *,
    tasks: Tasks | None = None,
    base_coeffs: Tensor | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    batch_dim: int = 0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
    algorithm: str = "auto",
) -> Tensor:
    """A linear layer whose weight is a base plus a weighted sum of deltas, chosen row by row.

    ::

        y_r = (base + Σ_k coeffs[k]·deltas[k]) x_r + bias                          without tasks
        y_r = (base_coeffs[t]·base + Σ_k coeffs[t, k]·deltas[k]) x_r + bias[t]     t = the task of row r

    No summed weight is stored, except by "merge", in scratch memory. Every gradient is exact, that of a
    coefficient also where it is 0.

    Args:
        x: [..., I], any strides; float32, bfloat16, float16 or float64. Under autocast x, base, deltas and bias
            take its dtype, as in ``F.linear``; coeffs never do. Each call casts anew and keeps the copies for its
            backward, where ``F.linear`` shares one of a trained weight: for a layer that runs many times a forward,
            such as a recurrent one, cast the model itself.
        base: [O, I], the weight all tasks share.
        deltas: K tensors [O, I] or formats of `taps_fast.formats`, or one tensor [K, O, I] or one
            `taps_fast.stacked.Stack`. K = 0 is the base alone.
        coeffs: [K], or [T, K] with tasks. Used in float32 (float64 when x is).
        bias: [O]; with tasks also [T, O] (rows of id -1 then have none) or [T + 1, O] (last row: id -1).
        tasks: integer ids [B], or a `TaskBatch`: sample b runs as task ``tasks[b]``, -1 as the base alone.
            When the batch axis holds r·B entries, each id covers r consecutive ones.
        base_coeffs: [T] ([1] without tasks), what multiplies base; 0 for a baked task, whose delta is its whole
            weight. Default 1. Data: it has no gradient.
        pairs: the (task, delta) pairs whose coefficient can be non-zero or needs a gradient, others get 0; default
            all. With one delta a task, naming them keeps the backward from computing T·K dot products where T are
            wanted.
        batch_dim: the axis of x that carries the batch, any but the last; negative ones count from the last.
        scale, shift, activation: what follows the product, as in `scale_shift`: act(scale[t]·y + shift[t]), with
            tables of the shapes of bias. In inference it is applied to y where it lies.
        backend: "cpu", "cuda", "triton" or "reference"; default: the best that can run. An explicit one never falls
            back.
        algorithm: "blend" (weight summed, rounded at most once to x's dtype, one product), "split" (two products
            into one accumulator: exact in low precision), "stream" (the same for few rows on CUDA), "merge" (weight
            in scratch, vendor GEMM) or "auto". Of a format, "split" never makes a dense delta; "blend" and "merge"
            do, "blend" on a CPU without gradients a panel at a time.

    Returns:
        y [..., O] in x's dtype.

    Raises:
        ValueError: shapes, devices, ids or pairs that do not fit; TypeError: dtypes that do not.
        BackendError: the explicit backend or algorithm cannot run this problem; the text says why.

    Cost: 2·M·I·O flops (blend) or up to 2·M·I·O for each open delta more (split); base and each open delta are
    read once. Source: TAPS, arXiv 2203.16708; the general sum covers AdaMerging and its kin.

    >>> import torch
    >>> base, delta = torch.randn(8, 4), torch.randn(8, 4)
    >>> x = torch.randn(3, 4)
    >>> y = delta_linear(x, base, [delta], torch.tensor([[1.0], [0.0]]), tasks=[0, 1, -1])
    >>> weights = [base + delta, base, base]
    >>> bool(torch.allclose(y, torch.stack([w @ v for w, v in zip(weights, x)]), atol=1e-5))
    True
    """
    how = How(tasks, base_coeffs, pairs, batch_dim, scale, shift, activation, backend, algorithm)
    return _call.linear(x, base, deltas, coeffs, bias, how)


def delta_conv2d(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor | Format] | Tensor,
    coeffs: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    tasks: Tasks | None = None,
    base_coeffs: Tensor | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
    algorithm: str = "auto",
) -> Tensor:
    """A 2-d convolution whose kernel is a base plus a weighted sum of deltas, chosen image by image.

    ::

        y_n = conv2d(x_n, base_coeffs[t]·base + Σ_k coeffs[t, k]·deltas[k]) + bias[t]      t = the task of image n

    Args:
        x: [N, C, H, W] or [C, H, W]; dtypes and autocast as in `delta_linear`.
        base: [O, C / groups, kh, kw].
        deltas: as in `delta_linear`, shaped like base. Formats are made dense in scratch.
        coeffs, bias, tasks, base_coeffs, pairs, scale, shift, activation: as in `delta_linear`, with images for
            rows. Scale and shift are what an evaluated batch norm is: weight / √(var + eps) and what remains.
        stride, padding, dilation, groups: as in ``F.conv2d``, padding "same" and "valid" included.
        backend, algorithm: "cpu" (depthwise on channels last), "linear" ("rows": on channels last a convolution is
            `delta_linear` on its pixels if it is 1 × 1, else on a copy of patches), "aten" ("merge": kernel summed
            into scratch, vendor convolution; "split": base convolution for all images, then one for each open delta),
            "triton" ("split", in inference: each image with its own task's deltas in one kernel, fastest on channels
            last) or "reference" ("split", "blend"); default: the fastest ("auto").

    Returns:
        y [N, O, H', W'] ([O, H', W'] for an unbatched x) in x's dtype and memory format.

    Raises:
        ValueError, TypeError, BackendError: as `delta_linear`; RuntimeError where ``F.conv2d`` raises.

    Cost: one vendor convolution for each distinct weight in the batch; of a mixed batch on a GPU, where ids are not
    read back, one of all images for the base and for each delta, or with "triton" one product an image for the base
    and for each delta that its task uses. Patches are at most 64 MiB unless "linear" is asked for.
    Source: TAPS, arXiv 2203.16708.

    >>> import torch
    >>> base, delta = torch.randn(2, 8, 4, 3, 3)
    >>> x = torch.randn(2, 4, 5, 5)
    >>> y = delta_conv2d(x, base, [delta], torch.tensor([[1.0]]), padding=1, tasks=[0, -1])
    >>> bool(torch.allclose(y[:1], torch.conv2d(x[:1], base + delta, padding=1), atol=1e-4))
    True
    """
    how = How(tasks, base_coeffs, pairs, 0, scale, shift, activation, backend, algorithm)
    return _call.conv2d(x, base, deltas, coeffs, bias, stride, padding, dilation, groups, how)
