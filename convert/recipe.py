"""Which tensor gets which type.

A recipe is a base type and a table of upgrades: llama.cpp's mixtures (src/llama-quant.cpp,
`llama_tensor_get_type_impl`), learned from there and written as data. The two files follow one rule
for what is quantized at all: matrices, not norms, biases or the patch embedding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from qvl.convert.tensor_map import Mapped
from qvl.runtime.errors import InputError
from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.library import Type


@dataclass(frozen=True)
class Layer:
    """What a rule may look at.

    Attributes:
        i: the layer's number.
        n: how many layers there are.
        gqa: query heads to a key/value head.
        calibrated: an importance matrix is at hand.
    """

    i: int
    n: int
    gqa: int
    calibrated: bool


Rule = Callable[[Layer], bool]
Upgrades = tuple[tuple[Rule, Type], ...]


def always(_: Layer) -> bool:
    return True


def more_bits(layer: Layer) -> bool:
    """The first eighth, the last eighth, and every third layer between them."""
    eighth = layer.n // 8
    return layer.i < eighth or layer.i >= 7 * layer.n // 8 or (layer.i - eighth) % 3 == 2


def first(count: int) -> Rule:
    return lambda layer: layer.i < count


def first_part(divisor: int) -> Rule:
    return lambda layer: layer.i < layer.n // divisor


def wide_groups(layer: Layer) -> bool:
    """Few key/value heads: their matrices are small, and more bits cost little."""
    return layer.gqa >= 4


def _all(*rules: Rule) -> Rule:
    return lambda layer: all(rule(layer) for rule in rules)


def _calibrated(layer: Layer) -> bool:
    return layer.calibrated


def _uncalibrated(layer: Layer) -> bool:
    return not layer.calibrated


@dataclass(frozen=True)
class Recipe:
    """A type as users name it.

    Attributes:
        name: as in `--type`.
        file_type: `general.file_type` (`enum llama_ftype`, llama.h).
        base: for every matrix that no upgrade names.
        upgrades: tensor kind ("attn_v", "ffn_down", …) to rules; the first that holds decides.
        head: for the output matrix, or for the token embedding where it serves as output.
        embedding: for a token embedding that is not the output, else the base.
    """

    name: str
    file_type: int
    base: Type
    upgrades: Mapping[str, Upgrades] = field(default_factory=dict)
    head: Type | None = Type.Q6_K
    embedding: Type | None = None


_K_M: Final[Mapping[str, Upgrades]] = {
    "attn_v": ((more_bits, Type.Q6_K),),
    "ffn_down": ((more_bits, Type.Q6_K),),
}
_LEGACY: Final = _all(_calibrated, first_part(8))
_IQ4: Final[Mapping[str, Upgrades]] = {
    "attn_v": ((wide_groups, Type.Q5_K),),
    "ffn_down": ((_all(_uncalibrated, first_part(8)), Type.Q5_K),),
}

TEXT_RECIPES: Final[dict[str, Recipe]] = {
    recipe.name: recipe
    for recipe in (
        Recipe("f32", 0, Type.F32, head=None),
        Recipe("f16", 1, Type.F16, head=None),
        Recipe("bf16", 32, Type.BF16, head=None),
        Recipe("q8_0", 7, Type.Q8_0, head=Type.Q8_0),
        Recipe("q4_0", 2, Type.Q4_0, {"ffn_down": ((_LEGACY, Type.Q4_1),)}),
        Recipe("q4_1", 3, Type.Q4_1),
        Recipe("q5_0", 8, Type.Q5_0, {"ffn_down": ((_LEGACY, Type.Q5_1),)}),
        Recipe("q5_1", 9, Type.Q5_1),
        Recipe("q4_k_s", 14, Type.Q4_K, {"attn_v": ((first(4), Type.Q5_K),),
                                         "ffn_down": ((first_part(8), Type.Q5_K),)}),
        Recipe("q4_k_m", 15, Type.Q4_K, _K_M),
        Recipe("q5_k_s", 16, Type.Q5_K),
        Recipe("q5_k_m", 17, Type.Q5_K, _K_M),
        Recipe("q6_k", 18, Type.Q6_K),
        Recipe("q2_k", 10, Type.Q2_K, {"attn_v": ((wide_groups, Type.Q4_K), (always, Type.Q3_K)),
                                       "ffn_down": ((always, Type.Q3_K),),
                                       "attn_output": ((always, Type.Q3_K),)}),
        Recipe("q3_k_s", 11, Type.Q3_K),
        Recipe("q3_k_m", 12, Type.Q3_K, {"attn_v": ((first(2), Type.Q5_K), (always, Type.Q4_K)),
                                         "ffn_down": ((first_part(16), Type.Q5_K), (always, Type.Q4_K)),
                                         "attn_output": ((always, Type.Q4_K),)}),
        Recipe("q3_k_l", 13, Type.Q3_K, {"attn_v": ((always, Type.Q5_K),),
                                         "ffn_down": ((always, Type.Q5_K),),
                                         "attn_output": ((always, Type.Q5_K),)}),
        Recipe("iq4_nl", 25, Type.IQ4_NL, _IQ4),
        Recipe("iq4_xs", 30, Type.IQ4_XS, _IQ4),
    )
}  # fmt: skip

VISION_RECIPES: Final[dict[str, Recipe]] = {
    recipe.name: recipe
    for recipe in (
        Recipe("f32", 0, Type.F32),
        Recipe("f16", 1, Type.F16),
        Recipe("bf16", 32, Type.BF16),
        Recipe("q8_0", 7, Type.Q8_0),
        Recipe("q6_k", 18, Type.Q6_K),
        Recipe("q5_k", 16, Type.Q5_K),
        Recipe("q4_k", 14, Type.Q4_K),
        Recipe("q4_0", 2, Type.Q4_0),
    )
}

# Where a row is no multiple of the block: the next type that has smaller blocks, then F16
# (llama-quant.cpp, `tensor_type_fallback`).
SMALLER_BLOCKS: Final[dict[Type, Type]] = {
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
    Type.IQ4_XS: Type.IQ4_NL,
}
FLOATS: Final = (Type.F32, Type.F16, Type.BF16)


@dataclass(frozen=True)
class Planned:
    """A tensor with its type.

    Attributes:
        wanted: the recipe's type, before its rows were looked at.
        type: what is written.
    """

    tensor: Mapped
    type: Type
    wanted: Type

    @property
    def nbytes(self) -> int:
        rows = self.tensor.n_elements // self.tensor.n_per_row
        return rows * ggml.row_size(self.type, self.tensor.n_per_row)


@dataclass(frozen=True)
class Choices:
    """What the caller asked for beyond a type's name.

    Attributes:
        overrides: regular expression over tensor names to type; the first match decides.
        embedding: type of the token embedding.
        head: type of the output matrix (of the token embedding, where that serves as output).
        calibrated: an importance matrix is at hand.
    """

    overrides: tuple[tuple[re.Pattern[str], Type], ...] = ()
    embedding: Type | None = None
    head: Type | None = None
    calibrated: bool = False


def find_recipe(name: str, recipes: Mapping[str, Recipe], what: str) -> Recipe:
    """The recipe of a name, whatever its case.

    Raises:
        InputError: no such type; the hint lists those there are.
    """
    recipe = recipes.get(name.lower())
    if recipe is None:
        raise InputError(f"unknown {what} type {name!r}", hint=f"one of {', '.join(recipes)}")
    return recipe


def parse_overrides(overrides: Iterable[str]) -> tuple[tuple[re.Pattern[str], Type], ...]:
    """`REGEX=TYPE` strings, as `--tensor-type` takes them.

    Raises:
        InputError: no "=", a damaged expression, or an unknown type.
    """
    parsed = []
    for text in overrides:
        pattern, _, kind = text.rpartition("=")
        try:
            parsed.append((re.compile(pattern), parse_type(kind)))
        except re.error as error:
            raise InputError(f"tensor type {text!r}: {error}", hint="expected REGEX=TYPE") from error
        if not pattern:
            raise InputError(f"tensor type {text!r} names no tensor", hint="expected REGEX=TYPE")
    return tuple(parsed)


def parse_type(name: str) -> Type:
    """A ggml type by name: q4_k, f16, iq4_xs, ….

    Raises:
        InputError: unknown, or a type that weights cannot have here.
    """
    allowed = {kind.name.lower(): kind for kind in (*FLOATS, *SMALLER_BLOCKS, *SMALLER_BLOCKS.values(), Type.Q4_1)}
    if name.lower() not in allowed:
        raise InputError(f"unknown tensor type {name!r}", hint=f"one of {', '.join(sorted(allowed))}")
    return allowed[name.lower()]


def plan_text(
    tensors: Iterable[Mapped], recipe: Recipe, *, n_layer: int, gqa: int, choices: Choices | None = None
) -> tuple[Planned, ...]:
    """Types for the decoder's tensors."""
    tensors, choices = tuple(tensors), choices or Choices()
    tied = all(t.name != "output.weight" for t in tensors)

    def wanted(tensor: Mapped) -> Type:
        is_embedding = tensor.name == "token_embd.weight"
        is_head = tensor.name == "output.weight" or (tied and is_embedding)
        if is_embedding and choices.embedding is not None:
            return choices.embedding
        if is_head and choices.head is not None:
            return choices.head
        for pattern, kind in choices.overrides:
            if pattern.search(tensor.name):
                return kind
        if is_head and recipe.head is not None:
            fits = tensor.n_per_row % ggml.block_size(recipe.base) == 0
            return recipe.head if fits else Type.Q8_0
        if is_embedding:
            return recipe.embedding or recipe.base
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if match is not None:
            layer = Layer(int(match[1]), n_layer, gqa, choices.calibrated)
            for rule, kind in recipe.upgrades.get(match[2], ()):
                if rule(layer):
                    return kind
        return recipe.base

    return tuple(_plan(tensor, wanted) for tensor in tensors)


def plan_vision(
    tensors: Iterable[Mapped], recipe: Recipe, *, choices: Choices | None = None
) -> tuple[Planned, ...]:
    """Types for the image encoder's tensors: one for all, but for the patch embedding.

    Its rows (14 wide, 196 with both axes) divide by no block, and libmtmd takes F16 or F32 only.
    """
    choices = choices or Choices()

    def wanted(tensor: Mapped) -> Type:
        for pattern, kind in choices.overrides:
            if pattern.search(tensor.name):
                return kind
        return recipe.base

    return tuple(_plan(tensor, wanted) for tensor in tensors)


def _plan(tensor: Mapped, wanted: Callable[[Mapped], Type]) -> Planned:
    if len(tensor.shape) > 2:
        kind = Type.F16 if wanted(tensor) is Type.F16 else Type.F32
        return Planned(tensor, kind, kind)
    if len(tensor.shape) < 2 or tensor.name.endswith("_norm.weight"):
        return Planned(tensor, Type.F32, Type.F32)
    kind = wanted(tensor)
    return Planned(tensor, _fitting(kind, tensor.n_per_row), kind)


def _fitting(kind: Type, n_per_row: int) -> Type:
    for candidate in (kind, SMALLER_BLOCKS.get(kind, kind)):
        if n_per_row % ggml.block_size(candidate) == 0:
            return candidate
    return Type.F16
