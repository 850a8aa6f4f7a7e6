"""Flash attention over pages in plain XLA. (Interface only.)"""

from jax.sharding import Mesh


class DenseAttention:
    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
