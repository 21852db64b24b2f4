"""A numpy array that `torch.save` wrote, as LIBERO's initial states were before they were packaged; without torch."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from qlibero.errors import WorkFailed

_OF_ARRAYS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


def array_in(path: Path) -> np.ndarray:
    """(m, n) float64; a single row is (1, n). Raises WorkFailed for a file that holds anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(pickled) as file:
                array = np.atleast_2d(np.asarray(_Unpickler(file).load(), dtype=np.float64))
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as problem:
        raise WorkFailed(f"{path}: no array of numbers: {problem}") from None
    if array.ndim != 2:
        raise WorkFailed(f"{path}: an array of shape {array.shape}, not (m, n)")
    return array


class _Unpickler(pickle.Unpickler):
    """Builds arrays and nothing else: an unpickler runs whatever its file names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _OF_ARRAYS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, no part of an array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
