"""Interface of a vision tower: the functions of a module `qvl.runtime.families.NAME.tower`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from qvl.runtime.ggml.devices import Device
from qvl.runtime.ggml.gguf import GGUFFile
from qvl.runtime.ggml.graph import Graph, Tensor
from qvl.runtime.ggml.weights import Weights
from qvl.runtime.vision.grid import Grid
from qvl.runtime.vision.layers import Layers
from qvl.runtime.vision.preprocess import Preprocessor

PIXELS = "pixels"  # the input that holds `pixel_values`


@dataclass(frozen=True)
class TowerGraph:
    """A graph with its inputs and output.

    Attributes:
        inputs: by name: "pixels", float32 [n_patch_in, n_patches], and those of the module's `inputs` that
            the graph reads.
        output: float32 [n_out, n_tokens].
    """

    graph: Graph
    inputs: Mapping[str, Tensor]
    output: Tensor


@dataclass(frozen=True)
class Operations:
    """Multiplications and additions that encoding a picture takes.

    Attributes:
        products: in products with weights.
        attention: in attention's products.
    """

    products: float
    attention: float


class Config(Protocol):
    """Configuration that all towers have in common; a family adds its own."""

    @property
    def n_layer(self) -> int: ...
    @property
    def n_embd(self) -> int:
        """Width of the tower."""

    @property
    def n_out(self) -> int:
        """Width of an embedding row."""

    @property
    def head_dim(self) -> int: ...
    @property
    def merge_size(self) -> int:
        """Patches merged along each side into one token."""

    @property
    def n_patch_in(self) -> int:
        """Values of a patch."""

    def operations(self, patches: int) -> Operations:
        """The work of encoding one picture of so many patches."""


class Tower(Protocol):
    """A family's module."""

    PREPROCESSOR: Preprocessor  # as published; a file's metadata may say otherwise

    def read_config(self, file: GGUFFile) -> Any:
        """The tower's dimensions from a file's metadata and shapes: the family's `Config`.

        Raises:
            GGUFError: a missing key, or an impossible value.
        """

    def load(self, file: GGUFFile, config: Any, device: Device) -> Weights:
        """The tower's weights on a device.

        Raises:
            GGUFError: tensors are missing, or have another shape or type.
            BackendError: the device has too little memory.
        """

    def inputs(self, config: Any, grids: Sequence[Grid]) -> dict[str, NDArray[Any]]:
        """The graph's inputs beside the pixels, for pictures of these grids packed one after the other."""

    def build(self, config: Any, weights: Weights, grids: Sequence[Grid], layers: Layers) -> TowerGraph:
        """The graph for pictures of these grids."""

    def stored(self, name: str) -> tuple[Sequence[str], float]:
        """The names in the file of a weight of the graph, and the factor by which its inputs are enlarged."""
