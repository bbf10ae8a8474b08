from typing import Final

import numpy as np
from numpy.typing import NDArray

MAX_DIMENSION: Final[int]

def lattice_embed(features: NDArray[np.float64]) -> tuple[NDArray[np.int32], NDArray[np.float64]]: ...
