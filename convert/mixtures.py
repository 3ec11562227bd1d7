"""llama.cpp's mixtures as data: a base type and a table of upgrades for each type that users name.

Learned from src/llama-quant.cpp (`llama_tensor_get_type_impl`), and held to it by a test of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from qvl.runtime.ggml.library import Type


@dataclass(frozen=True)
class Layer:
    """A layer, as far as rules depend on it.

    Attributes:
        i: the layer's number.
        n: how many layers there are.
        gqa: query heads to a key/value head.
        calibrated: an importance matrix is at hand.
        n_expert: experts in a layer, 0 without.
    """

    i: int
    n: int
    gqa: int
    calibrated: bool
    n_expert: int = 0


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


def middle(layer: Layer) -> bool:
    """All but the first and the last eighth."""
    return layer.n // 8 <= layer.i < 7 * layer.n // 8


def wide_groups(layer: Layer) -> bool:
    """Few key/value heads: their matrices are small, and more bits cost little."""
    return layer.gqa >= 4


def wide_or_mixed(layer: Layer) -> bool:
    """Few key/value heads, or several experts, beside which attention is small."""
    return layer.gqa >= 4 or layer.n_expert >= 4


def eight_experts(layer: Layer) -> bool:
    """The one count of experts that llama.cpp has rules of its own for."""
    return layer.n_expert == 8


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
        needs_imatrix: without an importance matrix the result is noise, and is refused.
    """

    name: str
    file_type: int
    base: Type
    upgrades: Mapping[str, Upgrades] = field(default_factory=dict)
    head: Type | None = Type.Q6_K
    embedding: Type | None = None
    needs_imatrix: bool = False


_K_M: Final[Mapping[str, Upgrades]] = {
    "attn_v": ((more_bits, Type.Q6_K),),
    "ffn_down": ((more_bits, Type.Q6_K),),
}
_LOW_V: Final = ((wide_groups, Type.Q4_K),)
_LEGACY: Final = _all(_calibrated, first_part(8))
_IQ4: Final[Mapping[str, Upgrades]] = {
    "attn_v": ((wide_groups, Type.Q5_K),),
    "ffn_down": ((_all(_uncalibrated, first_part(8)), Type.Q5_K),),
}


def _two_bits(
    name: str,
    file_type: int,
    base: Type,
    *,
    more: Type,
    attn_output: Type | None = Type.IQ3_S,
    embedding: Type = Type.Q2_K,
) -> Recipe:
    """The types of about two bits have one scheme."""
    upgrades: dict[str, Upgrades] = {
        "attn_v": ((wide_or_mixed, Type.Q4_K), (always, more)),
        "ffn_down": ((first_part(8), more),),
    }
    if attn_output is not None:
        upgrades["attn_output"] = ((always, attn_output),)
    return Recipe(name, file_type, base, upgrades, head=Type.Q5_K, embedding=embedding, needs_imatrix=True)


# Types that give a mixture of eight experts five bits for attn_output.
_FIVE_BITS: Final = frozenset(
    (
        "q2_k",
        "q3_k_s",
        "q3_k_m",
        "q4_k_s",
        "q4_k_m",
        "iq3_xxs",
        "iq3_xs",
        "iq3_s",
        "iq3_m",
        "iq4_nl",
        "iq4_xs",
    )
)


def of_eight_experts(recipe: Recipe, part: str) -> Type | None:
    """The type of a part of attention in a mixture of eight experts; None where the recipe's own rules
    decide."""
    two_bits = recipe.name.startswith(("iq2", "iq1"))
    if part == "attn_k":
        return Type.Q4_K if two_bits else Type.Q8_0
    if part == "attn_v":
        return None if two_bits else Type.Q8_0
    if part == "attn_output":
        return Type.Q5_K if two_bits or recipe.name in _FIVE_BITS else recipe.base
    return None


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
        Recipe("q2_k_s", 21, Type.Q2_K, {"attn_v": _LOW_V, "ffn_down": ((first_part(8), Type.Q4_K),)},
               needs_imatrix=True),
        Recipe("iq4_nl", 25, Type.IQ4_NL, _IQ4),
        Recipe("iq4_xs", 30, Type.IQ4_XS, _IQ4),
        Recipe("iq3_m", 27, Type.IQ3_S, {"attn_v": ((always, Type.Q4_K),),
                                         "ffn_down": ((first_part(8), Type.Q4_K),
                                                      (_all(eight_experts, more_bits), Type.Q4_K)),
                                         "attn_output": ((always, Type.Q4_K),)}),
        Recipe("iq3_s", 26, Type.IQ3_S, {"attn_v": _LOW_V}),
        Recipe("iq3_xs", 22, Type.IQ3_S, {"attn_v": _LOW_V,
                                          "attn_q": ((always, Type.IQ3_XXS),),
                                          "attn_k": ((always, Type.IQ3_XXS),),
                                          "ffn_gate": ((middle, Type.IQ3_XXS),),
                                          "ffn_up": ((middle, Type.IQ3_XXS),)}),
        Recipe("iq3_xxs", 23, Type.IQ3_XXS, {"attn_v": _LOW_V,
                                             "attn_q": ((always, Type.IQ2_S),),
                                             "attn_k": ((always, Type.IQ2_S),),
                                             "attn_output": ((always, Type.IQ3_S),)},
               head=Type.Q5_K, embedding=Type.IQ3_S, needs_imatrix=True),
        _two_bits("iq2_m", 29, Type.IQ2_S, more=Type.IQ3_S, embedding=Type.IQ3_S),
        _two_bits("iq2_s", 28, Type.IQ2_XS, more=Type.IQ3_S, embedding=Type.IQ3_S),
        _two_bits("iq2_xs", 20, Type.IQ2_XS, more=Type.Q2_K, attn_output=None),
        _two_bits("iq2_xxs", 19, Type.IQ2_XXS, more=Type.Q2_K, attn_output=None),
        _two_bits("iq1_m", 31, Type.IQ1_M, more=Type.Q2_K, attn_output=Type.IQ2_XXS),
        _two_bits("iq1_s", 24, Type.IQ1_S, more=Type.Q2_K, attn_output=Type.IQ2_XXS),
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
        Recipe("iq4_nl", 25, Type.IQ4_NL),
        Recipe("iq4_xs", 30, Type.IQ4_XS),
        Recipe("q3_k", 11, Type.Q3_K),
        Recipe("iq3_s", 26, Type.IQ3_S),
        Recipe("iq3_xxs", 23, Type.IQ3_XXS, needs_imatrix=True),
        Recipe("q2_k", 10, Type.Q2_K),
    )
}
