"""llama.cpp's graphs as data: what each one computes, and which of them a model fits.

Read off llama.cpp's sources (src/models/) as llama-cpp-python 0.3.36 carries them. ``llama`` and ``deci`` run every
family that is Llama but for constant factors and the rotation, since those can be put into the weights.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from ...errors import InputError
from ...families.traits import activation, logit_cap, rotations
from .source import Source

_QKV = frozenset({"query", "key", "value"})
_ALL = _QKV | {"attention output", "gate", "up", "ffn output"}
# Constant factors that go into the weights, and what llama.cpp does alike up to some length of text.
_FOLDED = frozenset({"score scale", "residual scale", "scaled embedding", "logit transform"})
_SHORT = frozenset({"window", "position scale"})
_ANY_FIXED = frozenset({"default", "linear", "llama3", "yarn", "longrope"})
_SCALAR = frozenset({"default", "linear", "yarn"})


@dataclass(frozen=True)
class Architecture:
    """One graph of llama.cpp."""

    name: str
    traits: frozenset[str] = frozenset()
    """What it computes beyond a plain Llama, or what can be put into its weights."""
    layered: bool = False
    """True if every layer has widths of its own."""
    paired: bool = False
    """True if the rotation turns neighbouring rows, not rows half a head apart."""
    square: bool = False
    """True if query heads times head size must be the hidden size."""
    biases: frozenset[str] = frozenset()
    head: str = "any"
    """ "tied": the embedding; "stored": a tensor of its own; "any": either."""
    fused: frozenset[str] = frozenset()
    """Of "qkv" and "gate and up", those that are one tensor."""
    rope: frozenset[str] = _SCALAR
    factors: bool = False
    """True if any fixed frequencies can be given; else base, one factor and yarn's usual constants."""
    caps: str = "none"
    """ "both": scores and logits are capped; "logits": logits may be."""
    activation: str = "silu"
    unrotated: int = 0
    """Every so many layers one is not rotated; 0 for none."""


_LLAMA = Architecture(
    "llama",
    traits=_FOLDED | {"partial rotation", "length-dependent rotation"},
    paired=True,
    biases=_ALL,
    rope=_ANY_FIXED,
    factors=True,
)
_GEMMA = Architecture(
    "gemma2",
    traits=_FOLDED - {"residual scale"} | {"sandwich norms", "one-plus norm", "window", "score cap"},
    head="tied",
    rope=frozenset({"default", "linear"}),
    caps="both",
    activation="gelu_pytorch_tanh",
)
ARCHITECTURES = {
    found.name: found
    for found in (
        _LLAMA,
        replace(_LLAMA, name="deci", layered=True),
        replace(_LLAMA, name="granite"),
        replace(_LLAMA, name="mistral3", traits=_LLAMA.traits | {"position scale"}),
        Architecture("qwen2", square=True, biases=_QKV),
        Architecture("qwen3", traits=frozenset({"head norm"}), biases=_QKV),
        Architecture("openelm", traits=frozenset({"head norm"}), layered=True, head="tied", fused=frozenset({"qkv"})),
        _GEMMA,
        replace(
            _GEMMA,
            name="gemma3",
            traits=_GEMMA.traits - {"score cap"} | {"head norm", "several rotations"},
            head="any",
            caps="logits",
        ),
        Architecture(
            "phi3",
            traits=frozenset({"partial rotation", "length-dependent rotation"}),
            square=True,
            fused=frozenset({"qkv", "gate and up"}),
            rope=frozenset({"default", "linear", "longrope"}),
        ),
        Architecture("olmo2", traits=frozenset({"post-norms", "joint head norm"}), square=True, head="stored"),
        Architecture("smollm3", traits=frozenset({"unrotated layers"}), paired=True, biases=_QKV, unrotated=4),
    )
}
# (scores are capped, logits are capped) that an architecture can compute.
_CAPS = {"none": [(False, False)], "logits": [(False, False), (False, True)], "both": [(True, True)]}
# Architectures of each family, the one to try first in front.
_OF_FAMILY = {
    "llama": ("llama", "deci"),
    "mistral": ("llama", "deci"),
    "ministral3": ("mistral3", "deci"),
    "qwen2": ("qwen2", "llama", "deci"),
    "qwen3": ("qwen3", "openelm"),
    "gemma2": ("gemma2",),
    "gemma3_text": ("gemma3",),
    "phi3": ("phi3", "llama", "deci"),
    "olmo2": ("olmo2",),
    "smollm3": ("smollm3", "llama", "deci"),
    "granite": ("granite", "deci"),
}
_REMEDY = "Export to hf, which keeps everything"


def architecture_of(source: Source) -> Architecture:
    """The architecture that ``source`` is written as. Raises ``InputError`` if none runs it as transformers does."""
    names = _OF_FAMILY.get(source.family.model_type)
    if names is None:
        problem = "PPF knows no graph of llama.cpp that computes this family"
        raise InputError("architecture", source.config.model_type, problem, _REMEDY)
    candidates = [ARCHITECTURES[name] for name in names if ARCHITECTURES[name].layered != source.is_uniform]
    if not candidates:
        problem = f"llama.cpp's {names[0]} has the same widths in all layers, this checkpoint has not"
        remedy = "Prune with the same widths in all layers, or export to hf"
        raise InputError("architecture", source.config.model_type, problem, remedy)
    reasons = []
    for candidate in candidates:
        reason = _problem(candidate, source)
        if reason is None:
            return candidate
        reasons.append(f"{candidate.name} {reason}")
    problem = f"llama.cpp would compute something else: {'; '.join(reasons)}"
    raise InputError("architecture", source.config.model_type, problem, _REMEDY)


def context_length(source: Source, architecture: Architecture) -> int:
    """Tokens up to which llama.cpp computes what transformers does: it knows no windows outside Gemma's graphs."""
    config, lengths = source.config, [source.config.max_position_embeddings]
    beyond = source.traits - architecture.traits
    if "window" in beyond:
        lengths.append(config.sliding_window)
    if "position scale" in beyond:
        lengths.append(config.rope_parameters["original_max_position_embeddings"])
    return min(lengths)


def _problem(architecture: Architecture, source: Source) -> str | None:
    """Why llama.cpp would not run ``source`` as this architecture, after its name; None if it would."""
    checks = _unserved, _unfitting_shape, _unfitting_rotation
    return next((reason for check in checks if (reason := check(architecture, source)) is not None), None)


def _unserved(architecture: Architecture, source: Source) -> str | None:
    config = source.config
    if missing := source.traits - architecture.traits - _SHORT - {"activation"}:
        return f"does not compute {_listed(missing)}"
    if activation(config) != architecture.activation:
        return f"has {architecture.activation} for the activation, not {activation(config)}"
    if missing := source.biases - architecture.biases:
        return f"has no biases of {_listed(missing)}"
    found = "score cap" in source.traits, logit_cap(config) is not None
    if found not in _CAPS[architecture.caps]:
        return "caps both scores and logits" if architecture.caps == "both" else "does not cap the logits"
    return None


def _unfitting_shape(architecture: Architecture, source: Source) -> str | None:
    width, hidden = source.widths[0][0] * source.head_dim, source.config.hidden_size
    if architecture.square and width != hidden:
        return f"needs heads of {hidden} numbers together, these have {width}"
    if architecture.head == "tied" and not source.config.tie_word_embeddings:
        return "takes the embedding for the head, which is another matrix here"
    return None


def _unfitting_rotation(architecture: Architecture, source: Source) -> str | None:
    kinds = {parameters.get("rope_type", "default") for parameters in rotations(source.config)}
    if missing := kinds - architecture.rope:
        return f"has no {_listed(missing)} rotary embedding"
    layers, step = range(source.config.num_hidden_layers), architecture.unrotated
    rotated = getattr(source.config, "no_rope_layers", None) or [1] * len(layers)
    if step and [bool(turn) for turn in rotated] != [bool((layer + 1) % step) for layer in layers]:
        return f"leaves every {step}th layer without rotation, this model others"
    return None


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))
