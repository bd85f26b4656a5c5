"""A selection applied once and used many times: the opt-in alternative to gathering in every product.

Any product under a prefix runs at the speed of a physically smaller layer, whatever the number of tokens; an arbitrary
list does not (docs/benchmarks.md). Where the same list serves many calls, and memory for the kept weights is there,
copying them once is the fastest way.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .gather import gather_many
from .index import Index
from .masked_linear import check_operands
from .masked_swiglu import check_shapes, masked_swiglu
from .selection import Selection


@dataclass(frozen=True)
class PreparedSwiglu:
    """A Llama MLP whose kept channels lie side by side: what :func:`prepare_swiglu` returns.

    gate, up: [kept, H]; down: [H, kept], or [kept, H] with ``down_transposed``.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    down_transposed: bool

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H], as :func:`~ppf.fast.ops.masked_swiglu.masked_swiglu` under the selection gives it."""
        return masked_swiglu(x, self.gate, self.up, self.down, down_transposed=self.down_transposed)


def prepare_swiglu(
    gate: Tensor, up: Tensor, down: Tensor, selection: Selection, *, down_transposed: bool = False
) -> PreparedSwiglu:
    """The MLP's kept channels copied together, in one call of the channel gather; a prefix is viewed, not copied.

    gate, up: [C, H]; down: [H, C], or [C, H] with ``down_transposed``; ``selection`` over C. A copy does not follow
    later changes of the weights: prepare again. Gradients flow to gate, up and down. Raises ``InputError`` as
    masked_swiglu does.
    """
    check_operands(gate, up=up, down=down)
    check_shapes(up, down, *gate.shape, down_transposed)
    selection.check("selection", gate.shape[0])
    parts = [(gate, 0), (up, 0), (down, 0 if down_transposed else 1)]
    rows = selection.rows(gate.device)
    if rows is None:
        kept = [weight.narrow(dim, 0, selection.width) for weight, dim in parts]
    else:
        index = Index(rows, selection.total)
        kept = gather_many([(weight, index, dim) for weight, dim in parts])
    return PreparedSwiglu(*kept, down_transposed)
