"""A model of the L1 that one block sees: which of the sectors that it asks for have to come from further away."""

from collections import OrderedDict

import numpy as np

from .rounding import Array

SECTOR = 32


class SectorCache:
    """Holds ``size`` bytes in sectors, of which the least recently used one leaves first. Stores go through it and leave no trace."""

    def __init__(self, size: int) -> None:
        self.room = size // SECTOR
        self.held: OrderedDict[int, None] = OrderedDict()

    def misses(self, sectors: Array) -> Array:
        """Those of an instruction's sectors that are not there; now they are, as far as there is room."""
        missed = []
        for sector in np.unique(sectors).tolist():
            if sector in self.held:
                self.held.move_to_end(sector)
                continue
            missed.append(sector)
            self.held[sector] = None
            if len(self.held) > self.room:
                self.held.popitem(last=False)
        return np.array(missed, np.int64)
