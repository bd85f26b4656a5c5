"""An elastic model: the dense weights in ranking order once, and every policy a view of them.

    model = ppf.load("RUN", elastic=True, device="cuda")
    model.set_ratio(0.3)              # in place: prefix views, and the library's refits of o and down
    with model.at(0.5):
        model.generate(...)

It is a ``PPFLlamaForCausalLM`` whose layers change their widths, so everything that takes one takes it. Graphs are kept
for the latest policies. A key/value cache belongs to the policy it was made under: every ``generate()`` makes its own,
and ``forward()`` refuses one of another policy.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, PPFError
from ...fast.runtime.engine import Engine
from ...fast.runtime.generation import on_device
from ...fast.runtime.plan import Attention, FeedForward, Layer, Plan, plan_of
from ...fast.runtime.state import STATE, RuntimeState, hooked
from ...fitting.library import Library
from ...model import PPFLlamaForCausalLM
from ...model.grid import Grid
from ...model.policy import Policy
from ...model.weights import DecoderWeights

# Policies whose views, refits and graphs are kept. A policy's own refits of a 7B at half size are some 2 GB.
MAX_POLICIES = 8
_CACHE_TAG = "_ppf_policy"
_CACHE_NAMES = "past_key_values", "cache"


class ElasticLlamaForCausalLM(PPFLlamaForCausalLM):
    """A Llama of any size. Made by ``ppf.load(RUN, elastic=True)``; starts dense."""

    def attach(
        self, grid: Grid, weights: DecoderWeights, library: Library | None, choose: Callable[[float], Policy],
        chosen: Mapping[float, Policy] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """Take ``weights`` (in ranking order, the tensors this model was built from) and what goes with them.

        ``choose`` gives a ratio's policy unless ``chosen`` holds it, ``library`` the refitted o and down (without it,
        the dense columns stay). Whatever was attached before is let go; the model is dense afterwards.
        """
        if "_grid" in self.__dict__:
            self.set_policy(self._grid.dense())
        state = _ElasticState()
        state.plan = plan_of(self)
        state.engine = Engine(state.plan)
        dense = grid.dense()
        self.__dict__.update({
            "_grid": grid, "_weights": weights, "_library": library, "_choose": choose, STATE: state,
            "_plans": OrderedDict({dense: state.plan}), "_chosen": {**chosen, 0.0: dense}, "_policy": dense,
            "_dense_plan": state.plan, "_slots": [_slots(layer) for layer in self.model.layers],
        })  # fmt: skip

    @property
    def policy(self) -> Policy:
        """The widths in force."""
        return self._policy

    @property
    def ratio(self) -> float:
        """Share of the decoder's parameters that the policy in force leaves out."""
        return self._grid.ratio(self._policy)

    def set_ratio(self, ratio: float) -> Policy:
        """Take the run's policy for ``ratio`` (0 is dense) and return it.

        The policies of whole percents are known from loading on; for others the agent is asked once. Raises
        ``InputError`` for a ratio that the run cannot give.
        """
        if ratio not in self._chosen:
            self._chosen[ratio] = self._choose(ratio)
        self.set_policy(self._chosen[ratio])
        return self._policy

    def set_policy(self, policy: Policy) -> None:
        """Take ``policy``, in place. Weights are not copied; refits that are not in memory are solved first.

        Raises ``InputError`` for a policy off the run's grid, ``PPFError`` while a generation is running.
        """
        state = self.__dict__[STATE]
        if state.engine.lock.locked():
            raise PPFError("the policy cannot change while a generation is running: its cache belongs to the old one")
        plan = self._plan(policy)
        for module, (attention, ffn), layer in zip(self.model.layers, self._slots, plan.layers, strict=True):
            _fill(attention, layer.attention)
            _fill(ffn, layer.ffn)
            module.__dict__["has_attention"] = layer.attention is not None
            module.__dict__["has_ffn"] = layer.ffn is not None
        state.plan, self.__dict__["_policy"] = plan, policy

    @contextmanager
    def at(self, choice: float | Policy) -> Iterator[ElasticLlamaForCausalLM]:
        """``with model.at(0.5): …``: a ratio or policy for a while, then the one before again."""
        before = self._policy
        self._set(choice)
        try:
            yield self
        finally:
            self.set_policy(before)

    def prepare(self, choices: Iterable[float | Policy], batch: int = 1, length: int = 512) -> None:
        """Solve the refits of some ratios or policies and, on a GPU, record the graphs of ``batch`` sequences of up to
        ``length`` tokens, so that switching to them later takes no time. At most ``MAX_POLICIES`` are kept.
        """
        for choice in choices:
            with self.at(choice), on_device(self.device):
                if self.device.type == "cuda":
                    state = self.__dict__[STATE]
                    state.engine.session(state.plan, batch, length)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``LlamaForCausalLM.forward`` under the policy in force. Raises ``InputError`` for a cache of another."""
        given = [kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None]
        for cache in given:
            if getattr(cache, _CACHE_TAG, None) != self._policy and cache.get_seq_length():
                remedy = "Start again from the whole text, or return to that policy"
                raise InputError("past_key_values", type(cache).__name__, "was made under another policy", remedy)
        result = super().forward(*args, **kwargs)
        for cache in (*given, *(getattr(result, name, None) for name in _CACHE_NAMES)):
            if cache is not None:
                setattr(cache, _CACHE_TAG, self._policy)
        return result

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """An elastic model is saved as the checkpoint of one policy. Raises ``InputError``."""
        remedy = "Use Run.materialize(model.policy) and ppf.save, or `ppf prune`"
        raise InputError("model", type(self).__name__, "is views of a run's weights, not a checkpoint", remedy)

    def _set(self, choice: float | Policy) -> None:
        if isinstance(choice, Policy):
            self.set_policy(choice)
        else:
            self.set_ratio(choice)

    def _plan(self, policy: Policy) -> Plan:
        """The views of ``policy``, from the ones kept if it is among them."""
        plans = self._plans
        if policy not in plans:
            levels = self._grid.encode([policy])[0].tolist()
            layers = tuple(self._layer(index, policy, levels) for index in range(len(self._weights.layers)))
            plans[policy] = replace(self._dense_plan, layers=layers)
            while len(plans) > MAX_POLICIES:
                self.__dict__[STATE].engine.forget(plans.popitem(last=False)[1])
        plans.move_to_end(policy)
        return plans[policy]

    def _layer(self, index: int, policy: Policy, levels: list[int]) -> Layer:
        s, w = self._grid.structure, self._weights.layers[index]
        groups, channels = policy.attention[index], policy.ffn[index]
        attention = ffn = None
        if groups:
            rows, keys = groups * s.group_rows, groups * s.head_dim
            o = self._output(index, levels[index], w.o, rows)
            attention = Attention(w.attention_norm, w.q[:rows], w.k[:keys], w.v[:keys], o)
        if channels:
            down = self._output(index + s.layers, levels[index + s.layers], w.down, channels)
            ffn = FeedForward(w.ffn_norm, w.gate[:channels], w.up[:channels], down)
        return Layer(attention, ffn)

    def _output(self, sublayer: int, level: int, dense: Tensor, width: int) -> Tensor:
        if self._library is None or width == dense.shape[1]:
            return dense[:, :width]
        return self._library.weight(sublayer, level).to(dense.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> ElasticLlamaForCausalLM:
        """Behind ``to()``, ``cuda()``, ``half()``: nothing may move, since the views would no longer be views."""
        probe = self.model.norm.weight.detach()
        moved = fn(probe)
        if "_weights" in self.__dict__ and (moved.device, moved.dtype) != (probe.device, probe.dtype):
            asked = f"{moved.dtype} on {moved.device}"
            raise InputError(
                "model", asked, "an elastic model cannot be moved or cast", "Give device and dtype to ppf.load"
            )
        return self if "_weights" in self.__dict__ else super()._apply(fn, *args, **kwargs)


class _ElasticState(RuntimeState):
    """The plan and the addresses change with the policy, and only there: ``set_policy`` writes the plan."""

    def obstacle(self, model: Any) -> str | None:
        """Only hooks can be in the way."""
        return hooked(model.modules())


# generate() looks at what forward() takes.
ElasticLlamaForCausalLM.forward.__signature__ = inspect.signature(PPFLlamaForCausalLM.forward)


def _slots(layer: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The parameters of a dense layer that change with the policy, in the order of Attention and of FeedForward."""
    a, f = layer.self_attn, layer.mlp
    attention = [layer.input_layernorm, a.q_proj, a.k_proj, a.v_proj, a.o_proj]
    ffn = [layer.post_attention_layernorm, f.gate_proj, f.up_proj, f.down_proj]
    return [m.weight for m in attention], [m.weight for m in ffn]


def _fill(parameters: list[torch.nn.Parameter], weights: Attention | FeedForward | None) -> None:
    if weights is not None:
        for parameter, weight in zip(parameters, vars(weights).values(), strict=True):
            parameter.data = weight
