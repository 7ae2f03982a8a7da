"""The operations of atom, red and cp.reduce.async.bulk by their PTX names."""

import numpy as np

REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
