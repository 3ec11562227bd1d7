"""A placed graph computed piece by piece, so that other work can be done in between."""

from __future__ import annotations

from collections.abc import Iterator

from qvl.runtime.ggml import library as ggml
from qvl.runtime.ggml.graph import Graph


class Pieces:
    """The nodes of a graph, cut after each whose name begins with "@".

    Only for a graph that lies on one backend as a whole: nothing is copied between devices here.
    """

    def __init__(self, graph: Graph) -> None:
        lib = ggml.lib()
        nodes = [lib.ggml_graph_node(graph.pointer, i) for i in range(lib.ggml_graph_n_nodes(graph.pointer))]
        cuts = [i + 1 for i, node in enumerate(nodes) if ggml.tensor(node).name.startswith(b"@")]
        parts = [nodes[i:j] for i, j in zip([0, *cuts], [*cuts, len(nodes)], strict=True) if i < j]
        size = sum(lib.ggml_graph_overhead_custom(len(part), False) for part in parts)
        self._context: int | None = lib.ggml_init(ggml.InitParams(size + (1 << 16), None, True))
        self._pointers: list[int] = []
        for part in parts:
            pointer = lib.ggml_new_graph_custom(self._context, len(part), False)
            for node in part:
                lib.ggml_graph_add_node(pointer, node)
            self._pointers.append(pointer)

    def __len__(self) -> int:
        return len(self._pointers)

    def __iter__(self) -> Iterator[int]:
        """The `ggml_cgraph *` of each piece, in order."""
        return iter(self._pointers)

    def close(self) -> None:
        """Free what describes the pieces. Doing it twice is harmless."""
        if self._context:
            ggml.lib().ggml_free(self._context)
            self._context = None
            self._pointers = []
