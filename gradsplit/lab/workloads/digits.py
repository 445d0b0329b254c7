"""scikit-learn's 1,797 real handwritten digits (8 x 8), split once: the images behind several workloads."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..task import DATA, MissingDataError, generator

NUM_TEST = 360


@lru_cache(maxsize=1)
def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, training labels, test images, test labels.

    Returns:
        images (1437, 8, 8) and (360, 8, 8) float32 in [0, 1]; labels int64. The split is a fixed permutation,
        the same for every seed, so that scores of different seeds are on the same images.

    Raises:
        MissingDataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as read
    except ImportError as error:
        raise MissingDataError(
            "load_digits(): expected the package scikit-learn, which carries the digits, found none. "
            "Run: pip install scikit-learn"
        ) from error
    bunch = read()
    images = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32) / 16.0)
    labels = torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))
    order = torch.randperm(len(labels), generator=generator(0, DATA))
    test, train = order[:NUM_TEST], order[NUM_TEST:]
    return images[train], labels[train], images[test], labels[test]
