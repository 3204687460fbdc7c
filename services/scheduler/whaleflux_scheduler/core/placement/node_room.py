"""How many whole GPUs a few nodes can offer together: a bound that says without any search that a gang cannot fit. Pure."""

from __future__ import annotations

import numpy as np

from whaleflux_scheduler.core.placement.columns import Columns


class NodeRoom:
    """The free GPUs of each node as they are now, as if more and more of them came free; the columns are only read, once.

    Nodes are kept by how many GPUs they have free, so that a change costs nothing and `most` as much as a node has GPUs.
    """

    def __init__(self, columns: Columns, nodes: int) -> None:
        """`nodes`: of how many the most is asked; 0: of all."""
        self._rows, self._index, self._nodes = columns.rows, columns.index, nodes or columns.count
        self._free, self._width = list(columns.offered), columns.width
        self._nodes_with = np.bincount(columns.offer, minlength=columns.width + 1).tolist()
        self.total = columns.free

    def frees(self, node: str, gpus: int) -> None:
        """So many GPUs of the node come free; of one that takes no work that is nothing."""
        row = self._index.get(node)
        if row is None or not self._rows[row].schedulable:
            return
        before = self._free[row]
        after = self._free[row] = min(self._width, before + gpus)
        self._nodes_with[before] -= 1
        self._nodes_with[after] += 1
        self.total += after - before

    @property
    def most(self) -> int:
        """GPUs that the freest of the nodes offer together, as many nodes as were asked about."""
        left, found = self._nodes, 0
        for gpus in range(self._width, 0, -1):
            taken = min(left, self._nodes_with[gpus])
            found += taken * gpus
            left -= taken
            if not left:
                break
        return found
