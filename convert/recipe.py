"""Types of all tensors: by a mixture (mixtures.py), the caller's choices, and the length of rows.

The two files follow one rule for what is quantized at all: matrices, not norms, biases or the patch
embedding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from qvl.convert.mixtures import TEXT_RECIPES, VISION_RECIPES, Layer, Recipe, of_eight_experts
from qvl.convert.rows import Mapped
from qvl.runtime.errors import InputError, check_text, shown
from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.library import Type

__all__ = ["TEXT_RECIPES", "VISION_RECIPES", "Choices", "Planned", "Recipe", "plan_text", "plan_vision"]

# Fallbacks for rows that are not a multiple of the block: a type with smaller blocks, then F16
# (llama-quant.cpp, `tensor_type_fallback`).
SMALLER_BLOCKS: Final[dict[Type, Type]] = {
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
    **dict.fromkeys((Type.IQ4_XS, Type.IQ3_S, Type.IQ3_XXS), Type.IQ4_NL),
    **dict.fromkeys((Type.IQ2_S, Type.IQ2_XS, Type.IQ2_XXS, Type.IQ1_M, Type.IQ1_S), Type.IQ4_NL),
}
FLOATS: Final = (Type.F32, Type.F16, Type.BF16)


@dataclass(frozen=True)
class Planned:
    """A tensor with its type.

    Attributes:
        wanted: the recipe's type, before the length of its rows is checked.
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
    """The caller's choices beside the name of a type.

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


def _known(name: str, names: Iterable[str]) -> str:
    """Hint with names close to a wrong one, and all there are."""
    plain = {known.replace("_", ""): known for known in names}
    word = re.sub(r"[-_ ]", "", name.lower())
    close = [word] if word in plain else get_close_matches(word, plain, n=2, cutoff=0.75)
    meant = f"did you mean {' or '.join(plain[each] for each in close)}? There are" if close else "one of"
    return f"{meant} {', '.join(plain.values())}"


def find_recipe(name: str, recipes: Mapping[str, Recipe], what: str) -> Recipe:
    """The recipe of a name, whatever its case.

    Raises:
        InputError: no such type; the hint lists those there are.
    """
    recipe = recipes.get(name.lower())
    if recipe is None:
        raise InputError(f"unknown {what} type {name!r}", hint=_known(name, recipes))
    return recipe


def parse_overrides(overrides: Iterable[str]) -> tuple[tuple[re.Pattern[str], Type], ...]:
    """`REGEX=TYPE` strings, as `--tensor-type` takes them.

    Raises:
        InputError: no "=" or nothing before it, a damaged expression, or an unknown type.
    """
    if isinstance(overrides, str | bytes) or not isinstance(overrides, Iterable):
        raise InputError(f"tensor_types are {shown(overrides)}, expected a list of REGEX=TYPE")
    parsed = []
    for text in overrides:
        check_text("a tensor type", text)
        pattern, _, kind = text.rpartition("=")
        if not pattern:
            raise InputError(f"tensor type {text!r} names no tensor", hint="expected REGEX=TYPE")
        try:
            parsed.append((re.compile(pattern), parse_type(kind)))
        except re.error as error:
            raise InputError(f"tensor type {text!r}: {error}", hint="expected REGEX=TYPE") from error
    return tuple(parsed)


def check_overrides(choices: Choices, tensors: Iterable[Mapped]) -> None:
    """Refuse an override that no tensor has the name for.

    Raises:
        InputError: such a one.
    """
    names = [tensor.name for tensor in tensors]
    for pattern, kind in choices.overrides:
        if not any(map(pattern.search, names)):
            layers = (name for name in names if re.match(r"(v\.)?blk\.0\..*weight", name))
            raise InputError(
                f"tensor type '{pattern.pattern}={kind.name.lower()}': no tensor has such a name",
                hint=f"there are {', '.join(layers)}, other layers' and {len(names)} in all",
            )


def parse_type(name: str) -> Type:
    """A ggml type by name: q4_k, f16, iq4_xs, ….

    Raises:
        InputError: unknown, or a type that weights cannot have here.
    """
    allowed = {
        kind.name.lower(): kind for kind in (*FLOATS, *SMALLER_BLOCKS, *SMALLER_BLOCKS.values(), Type.Q4_1)
    }
    if name.lower() not in allowed:
        raise InputError(f"unknown tensor type {name!r}", hint=_known(name, sorted(allowed)))
    return allowed[name.lower()]


def plan_text(
    tensors: Iterable[Mapped],
    recipe: Recipe,
    *,
    n_layer: int,
    gqa: int,
    n_expert: int = 0,
    choices: Choices | None = None,
) -> tuple[Planned, ...]:
    """Types for the decoder's tensors.

    Args:
        n_layer, gqa, n_expert: of the model, as `Layer` has them.
    """
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
            layer = Layer(int(match[1]), n_layer, gqa, choices.calibrated, n_expert)
            part = match[2].removesuffix("_exps")
            if n_expert == 8 and recipe.base not in FLOATS and (own := of_eight_experts(recipe, part)):
                return own
            for rule, kind in recipe.upgrades.get(part, ()):
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
    if len(tensor.shape) > 3:  # a convolution
        kind = Type.F16 if wanted(tensor) is Type.F16 else Type.F32
        return Planned(tensor, kind, kind)
    if tensor.keep or len(tensor.shape) < 2 or tensor.name.endswith("_norm.weight"):
        return Planned(tensor, Type.F32, Type.F32)
    kind = wanted(tensor)
    return Planned(tensor, _fitting(kind, tensor.n_per_row), kind)


def _fitting(kind: Type, n_per_row: int) -> Type:
    for candidate in (kind, SMALLER_BLOCKS.get(kind, kind)):
        if n_per_row % ggml.block_size(candidate) == 0:
            return candidate
    return Type.F16
