"""An elastic model: the dense weights in ranking order once, and every policy a view of them.

    model = ppf.load("RUN", elastic=True, device="cuda")
    model.set_ratio(0.3)              # in place: prefix views, and the library's refits of the output projections
    with model.at(0.5):
        model.generate(...)

It is a model of the class that the family's results have, whose layers change their widths, so everything that takes
one takes it. Graphs are kept for the latest policies. A key/value cache belongs to the policy it was made under: every
``generate()`` makes its own, and ``forward()`` refuses one of another policy.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ...errors import InputError, PPFError
from ...families import KINDS, Family
from ...fast.runtime import generation
from ...fast.runtime.plan import Plan, layer_of, unsupported
from ...fast.runtime.state import STATE, RuntimeState, hooked
from ...fitting.library import Library
from ...model.build import build
from ...model.classes import result_classes
from ...model.decoder import Decoder
from ...model.grid import Grid
from ...model.policy import Policy
from .slots import Form, slots_of

# Policies whose views, refits and graphs are kept. A policy's own refits of a 7B at half size are some 2 GB.
MAX_POLICIES = 8
_CACHE_TAG = "_ppf_policy"
_CACHE_NAMES = "past_key_values", "cache"


class Elastic:
    """Mixed into the class of a family's results: a model of any size. Made by ``ppf.load(RUN, elastic=True)``, or by
    :func:`elastic_model` and :meth:`attach`; starts dense."""

    def attach(
        self, grid: Grid, decoder: Decoder, library: Library | None, choose: Callable[[float], Policy],
        chosen: Mapping[float, Policy] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """Take ``decoder`` (in ranking order, the tensors this model was built from) and what goes with it.

        ``choose`` gives a ratio's policy unless ``chosen`` holds it, ``library`` the refitted output projections
        (without it, the dense columns stay). Whatever was attached before is let go; the model is dense afterwards.
        """
        if "_slots" in self.__dict__:
            self.set_policy(self._grid.dense())
        state, dense = _ElasticState(unsupported(self)), grid.dense()
        if state.reason is None:
            state.renew(self)
        slots = slots_of(decoder, self.model.layers)
        self.__dict__.update({
            "_grid": grid, "_decoder": decoder, "_library": library, "_choose": choose, STATE: state,
            "_slots": slots, "_chosen": {**chosen, 0.0: dense}, "_policy": dense, "_dense_plan": state.plan,
            "_forms": OrderedDict(),
        })  # fmt: skip
        self._forms[dense] = Form([slot.cut(slot.units) for slot in slots], state.plan, self._types(dense))

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
        if state.engine is not None and state.engine.lock.locked():
            raise PPFError("the policy cannot change while a generation is running: its cache belongs to the old one")
        form = self._form(policy)
        for slot, tensors in zip(self._slots, form.tensors, strict=True):
            slot.fill(tensors)
        if form.layer_types is not None and form.layer_types != self.config.layer_types:
            self.config.layer_types = list(form.layer_types)
        state.plan, self.__dict__["_policy"] = form.plan, policy

    @contextmanager
    def at(self, choice: float | Policy) -> Iterator[Elastic]:
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
            with self.at(choice), generation.on_device(self.device):
                state = self.__dict__[STATE]
                if self.device.type == "cuda" and state.engine is not None:
                    state.engine.session(state.plan, batch, length)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate``, by PPF's runtime where it can serve the request; see :func:`ppf.accelerate`."""
        return generation.generate(self, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The family's ``forward`` under the policy in force. Raises ``InputError`` for a cache of another."""
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
        remedy = "Use ppf.Run(RUN).prune(policy=model.policy).save_pretrained(OUT), or `ppf prune`"
        raise InputError("model", type(self).__name__, "is views of a run's weights, not a checkpoint", remedy)

    def _set(self, choice: float | Policy) -> None:
        if isinstance(choice, Policy):
            self.set_policy(choice)
        else:
            self.set_ratio(choice)

    def _form(self, policy: Policy) -> Form:
        """The tensors of ``policy``, from the ones kept if it is among them."""
        forms = self._forms
        if policy not in forms:
            outputs = self._outputs(policy)
            tensors = [
                slot.cut(policy[slot.kind][slot.index], outputs.get((slot.index, slot.kind))) for slot in self._slots
            ]
            forms[policy] = Form(tensors, self._plan(policy, outputs), self._types(policy))
            while len(forms) > MAX_POLICIES:
                oldest = forms.popitem(last=False)[1]
                if oldest.plan is not None:
                    self.__dict__[STATE].engine.forget(oldest.plan)
        forms.move_to_end(policy)
        return forms[policy]

    def _outputs(self, policy: Policy) -> dict[tuple[int, str], Tensor]:
        """The refitted output projections of the sub-layers that ``policy`` makes narrower, by layer and kind."""
        levels = self._grid.encode([policy])[0].tolist()
        if self._library is None:
            return {}
        layers, decoder = self._grid.structure.layers, self._decoder
        found = {}
        for sublayer, (level, top) in enumerate(zip(levels, self._grid.maximum, strict=True)):
            if 0 < level < top:
                place = sublayer % layers, KINDS[sublayer // layers]
                found[place] = self._library.weight(sublayer, level).to(decoder.device, decoder.dtype)
        return found

    def _plan(self, policy: Policy, outputs: Mapping[tuple[int, str], Tensor]) -> Plan | None:
        """What the runtime computes with under ``policy``; None if it does not serve this model."""
        if self._dense_plan is None:
            return None
        layers = []
        for index, dense in enumerate(self._dense_plan.layers):
            parts = {
                kind: getattr(self._decoder, kind)(index, policy[kind][index], outputs.get((index, kind)))
                for kind in KINDS
                if policy[kind][index]
            }
            layers.append(layer_of(*(parts.get(kind) for kind in KINDS), dense.window))
        return replace(self._dense_plan, layers=tuple(layers))

    def _types(self, policy: Policy) -> list[str] | None:
        """Types of the layers: one without attention takes the first's, since masks take a text's length from the cache
        of the first layer of each type."""
        types = getattr(self._decoder.config, "layer_types", None)
        return types and [kind if width else types[0] for kind, width in zip(types, policy.attention, strict=True)]

    def _get_static_cache_init_shape(self) -> tuple[list[int], int] | None:
        """Shapes for generate()'s eager cache: the configuration has the dense widths, not those in force."""
        dense = super()._get_static_cache_init_shape()
        return None if dense is None else (list(self._policy.attention), dense[1])

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Elastic:
        """Behind ``to()``, ``cuda()``, ``half()``: nothing may move, since the views would no longer be views."""
        if "_slots" not in self.__dict__:
            return super()._apply(fn, *args, **kwargs)
        probe = self.model.norm.weight.detach()
        moved = fn(probe)
        if (moved.device, moved.dtype) != (probe.device, probe.dtype):
            asked = f"{moved.dtype} on {moved.device}"
            raise InputError(
                "model", asked, "an elastic model cannot be moved or cast", "Give device and dtype to ppf.load"
            )
        return self


class _ElasticState(RuntimeState):
    """The plan and the addresses change with the policy, and only there: ``set_policy`` writes the plan."""

    def __init__(self, reason: str | None):
        super().__init__()
        self.reason = reason

    def obstacle(self, model: Any) -> str | None:
        """What was in the way when the model was made, or hooks."""
        return self.reason or hooked(model.modules())


@functools.cache
def elastic_class(family: Family) -> type[PreTrainedModel]:
    """The class of a family's elastic models, such as ``ElasticQwen3ForCausalLM``. Raises ``InputError`` for a family
    that holds several projections in one matrix."""
    if any(len(roles) > 1 for part in family.parts.values() for roles in part.rows.values()):
        problem = "holds several projections in one matrix, so that a smaller width is no prefix of it"
        raise InputError("elastic", family.model_type, problem, "Make a model of one size, with `ppf prune`")
    base = result_classes(family)["ForCausalLM"]

    # generate() looks at what forward() takes.
    @functools.wraps(base.forward)
    def forward(self: Elastic, *args: Any, **kwargs: Any) -> Any:
        return Elastic.forward(self, *args, **kwargs)

    return type(f"Elastic{family.classes}ForCausalLM", (Elastic, base), {"__module__": __name__, "forward": forward})


def elastic_model(decoder: Decoder, generation_config: GenerationConfig | None = None) -> PreTrainedModel:
    """An elastic model over the tensors of ``decoder``, in ranking order; nothing is copied. Still to be attached."""
    model_class = elastic_class(decoder.family)
    return build(_config(decoder), decoder.state(), decoder.dtype, generation_config, model_class)


def _config(decoder: Decoder) -> PreTrainedConfig:
    """The decoder's, as a configuration of results, whose layers may differ."""
    config_class = result_classes(decoder.family)["Config"]
    if isinstance(decoder.config, config_class):
        return copy.deepcopy(decoder.config)
    own = ("model_type", "architectures", "transformers_version")
    fields = {name: value for name, value in decoder.config.to_dict().items() if name not in own}
    return config_class(**fields | {"head_dim": decoder.structure.head_dim})
