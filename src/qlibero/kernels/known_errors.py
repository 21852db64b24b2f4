"""Errors that GPU kernel packages are known to raise, what they really mean, and the hint.

The two that started this project are here: a BitBLAS build that died on `CU_TENSOR_MAP_SWIZZLE_128B` behind a missing
`torch_func`, and an int4 kernel whose output columns were all identical. Neither message says what is wrong.
"""

from __future__ import annotations

import re

_KNOWN = (
    (
        r"CU_TENSOR_MAP_SWIZZLE_128B|CUtensorMap",
        "CUDA headers of two versions are mixed: nvcc is 12 or newer, but an older cuda.h (11.x) comes first on its "
        "include path, where CUtensorMap does not exist. It is not about the GPU. Hint: use one CUDA toolkit of 12 or "
        "newer; unset CPATH, C_INCLUDE_PATH and CPLUS_INCLUDE_PATH, remove old toolkits from them, set CUDA_HOME to "
        "the new one, and check that `echo '#include <cuda.h>' | nvcc -x cu -E - | grep -m1 cuda.h` names it",
    ),
    (
        r"has no attribute 'torch_func'",
        "BitBLAS swallowed a failed build (its library is None) and the first call fell over it. Hint: run with "
        "bitblas.set_log_level('DEBUG') to see the compiler's error; a CU_TENSOR_MAP_SWIZZLE_128B there is a mix of "
        "CUDA headers (see `qlibero doctor`)",
    ),
    (
        r"undefined symbol: init\b",
        "BitBLAS went on after nvcc had failed and loaded this program instead of its library. nvcc's own message is "
        "above in the log; a CU_TENSOR_MAP_SWIZZLE_128B there is a mix of CUDA headers (see `qlibero doctor`)",
    ),
    (
        r"No such file or directory: 'nvcc'",
        "the package compiles its kernels with nvcc. Hint: put a CUDA toolkit of 12 or newer on PATH",
    ),
    (
        r"libnvrtc\.so\.12|libcudart\.so\.12",
        "the package is linked against CUDA 12 and this system has only CUDA 13; a symlink fails on symbol versions. "
        "Hint: pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12",
    ),
    (
        r"libcuda\.so\.1",
        "the NVIDIA driver's library is missing: this package can only be imported on a machine with a GPU",
    ),
    (r"Cannot find cuda device", "the package looks for a GPU when it is imported, and found a driver but no device"),
    (
        r"out of resource: shared memory|OutOfResources",
        "the kernel's tile needs more shared memory than this GPU has. Hint: report the GPU and the layer's shape; run "
        "with another backend meanwhile",
    ),
    (
        r"no kernel image is available",
        "the package was not built for this GPU's architecture. Hint: install a build of torch (or of the "
        "kernel package) for it",
    ),
)


def diagnose(error: BaseException | str) -> str | None:
    """The explanation and hint of a known error, or None. Looks through the whole chain of causes."""
    for text in _chain(error):
        for pattern, meaning in _KNOWN:
            if re.search(pattern, text):
                return meaning
    return None


def diagnose_shape(n: int, k: int) -> str | None:
    """What a layer's shape does to int4 kernels that do not check it, or None."""
    if k % 8 == 0:
        return None
    return (
        f"K = {k} is not a multiple of 8. Packed int4 storage is (N, K // 8 · 4) bytes in BitBLAS, so rows get "
        "a wrong stride"
        + (" of 0 and every output column is identical" if k < 8 else "")
        + f". Hint: leave this layer unquantized (exclude it), or test with K = {-(-k // 8) * 8}; "
        "no pi0.5 layer has this problem"
    )


def explain(error: BaseException) -> str:
    """One line for a verdict: the error, and its diagnosis when it is a known one."""
    first = (str(error).strip() or repr(error)).splitlines()[0][:300]
    meaning = diagnose(error)
    return f"{type(error).__name__}: {first}" + (f". That is: {meaning}" if meaning else "")


def _chain(error: BaseException | str) -> list[str]:
    if isinstance(error, str):
        return [error]
    texts: list[str] = []
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        texts.append(f"{type(link).__name__}: {link}")
        link = link.__cause__ or link.__context__
    return texts
