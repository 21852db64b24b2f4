"""Which CUDA toolkit and libraries the policy process should use, and whether the toolkit agrees with itself.

CUDA comes as pip packages in two layouts, `nvidia/<component>/lib` (12) and `nvidia/cu13/lib` (13 and later), or as an
installed toolkit. Kernels compiled at run time need nvcc and headers of one version: an nvcc 12 that finds the cuda.h
of CUDA 11 first fails deep inside a library with `CU_TENSOR_MAP_SWIZZLE_128B is undefined`, which names neither. No
torch import here: the answer is needed before the process that imports torch starts.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Version = tuple[int, int]

# Libraries whose file name carries CUDA's own major version; cuDNN, NCCL and others count for themselves.
VERSIONED = ("cudart", "cublas", "cublasLt", "nvrtc", "nvJitLink", "cusparse", "cupti")
FIRST_WITH_TENSOR_MAPS = (12, 0)
PROBE = "#include <cuda.h>\nqlibero_cuda_version CUDA_VERSION\n"


@dataclass(frozen=True)
class Toolkit:
    """What the policy process gets. `home` holds bin/nvcc; `why` says how it was chosen."""

    home: Path | None
    libraries: tuple[Path, ...]
    why: str


@dataclass(frozen=True)
class Agreement:
    """nvcc's version, and that of the cuda.h it finds. `problem` is None when they agree or could not be compared."""

    nvcc: Version | None
    header: Version | None
    header_path: Path | None
    problem: str | None
    hint: str | None


def site_packages() -> list[Path]:
    """The directories packages are installed in, as this interpreter searches them."""
    return [Path(p) for p in sys.path if p.endswith(("site-packages", "dist-packages"))]


def torch_cuda(packages: Iterable[Path]) -> str | None:
    """`torch.version.cuda` of the installed torch ("12.8"), None for a CPU build or no torch; read, not imported."""
    for directory in packages:
        try:
            text = (directory / "torch" / "version.py").read_text()
        except OSError:
            continue
        found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
        return found.group(1) if found else None
    return None


def find_toolkit(
    packages: Sequence[Path], environ: Mapping[str, str], cuda: str | None, system: Path = Path("/usr/local/cuda")
) -> Toolkit:
    """The toolkit of torch's CUDA major: the user's CUDA_HOME, else pip's, else nvcc on PATH, else `system`.

    `cuda` is `torch_cuda`'s answer; with None (CPU torch) nothing is chosen.
    """
    if cuda is None:
        return Toolkit(None, (), "torch is a CPU build")
    major = int(cuda.split(".")[0])
    libraries = library_directories(packages, major)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            home = Path(environ[variable])
            has = "" if _executable(home / "bin" / "nvcc") else ", which has no bin/nvcc"
            return Toolkit(home, libraries, f"{variable} of your environment{has}")
    for directory in packages:
        for home in (directory / "nvidia" / f"cu{major}", directory / "nvidia" / "cuda_nvcc"):
            if _executable(home / "bin" / "nvcc"):
                return Toolkit(home, libraries, "pip packages")
    nvcc = shutil.which("nvcc", path=environ.get("PATH", ""))
    if nvcc:
        return Toolkit(Path(nvcc).resolve().parent.parent, libraries, "nvcc on PATH")
    if _executable(system / "bin" / "nvcc"):
        return Toolkit(system, libraries, str(system))
    return Toolkit(None, libraries, "no nvcc found; kernels that compile at run time are not available")


def library_directories(packages: Iterable[Path], major: int) -> tuple[Path, ...]:
    """pip's CUDA library directories of that major version, `cuNN/lib` first."""
    found = []
    for directory in packages:
        for lib in sorted((directory / "nvidia").glob("*/lib")):
            if not any(lib.glob("lib*.so*")):
                continue
            component = lib.parent.name
            versioned = re.fullmatch(r"cu(\d+)", component)
            majors = {int(versioned.group(1))} if versioned else _majors_of(directory, component, lib)
            if not majors or major in majors:
                found.append((not versioned, lib))
    return tuple(lib for _, lib in sorted(found))


def _majors_of(directory: Path, component: str, lib: Path) -> set[int]:
    """CUDA majors a component directory belongs to: by its package's name (…_cu12), else by its libraries' names."""
    packages = directory.glob(f"nvidia_{component}_cu*.dist-info")
    named = {int(m.group(1)) for p in packages if (m := re.search(r"_cu(\d+)-", p.name))}
    files = (re.fullmatch(rf"lib({'|'.join(VERSIONED)})\.so\.(\d+).*", path.name) for path in lib.iterdir())
    return named or {int(m.group(2)) for m in files if m}


def check_agreement(home: Path | None, environ: Mapping[str, str], timeout_s: float = 20.0) -> Agreement:
    """Ask nvcc its version and which cuda.h it includes when a library compiles with `-I<home>/include`, as they do.

    nvcc is `home`'s, or where that has none the one on PATH. Never raises; without any nvcc there is nothing to check.
    """
    nvcc_path = compiler(home, environ)
    if home is None or nvcc_path is None:
        return Agreement(None, None, None, None, None)
    said = _output([str(nvcc_path), "--version"], environ, timeout_s)
    release = re.search(r"release (\d+)\.(\d+)", said or "")
    if not release:
        return Agreement(None, None, None, f"{nvcc_path} --version does not answer", "reinstall the CUDA toolkit")
    nvcc = (int(release.group(1)), int(release.group(2)))
    header, header_path = _header_nvcc_finds(nvcc_path, home / "include", environ, timeout_s)
    if header is None:
        header_path = home / "include" / "cuda.h"
        header = _header_version(header_path)
    if header is None:
        return Agreement(
            nvcc,
            None,
            None,
            f"nvcc {_v(nvcc)} finds no cuda.h",
            f"pip install nvidia-cuda-runtime nvidia-cuda-cccl of CUDA {nvcc[0]}, or install one whole toolkit",
        )
    if header == nvcc:
        return Agreement(nvcc, header, header_path, None, None)
    problem = f"nvcc is {_v(nvcc)} but the cuda.h it includes is {_v(header)} ({header_path})"
    if header < FIRST_WITH_TENSOR_MAPS <= nvcc:
        problem += "; BitBLAS and CUTLASS will fail with `CU_TENSOR_MAP_SWIZZLE_128B is undefined`"
    elif header[0] == nvcc[0]:
        problem += "; usually harmless within one major version"
    hint = (
        "use one toolkit: set CUDA_HOME to the directory above nvcc's bin, "
        "and take -I options out of NVCC_PREPEND_FLAGS"
    )
    return Agreement(nvcc, header, header_path, problem, hint)


def compiler(home: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The nvcc that will be run: `home`'s own, else the one on PATH."""
    if home is not None and _executable(home / "bin" / "nvcc"):
        return home / "bin" / "nvcc"
    found = shutil.which("nvcc", path=environ.get("PATH", ""))
    return Path(found) if found else None


def _header_nvcc_finds(
    nvcc: Path, include: Path, environ: Mapping[str, str], timeout_s: float
) -> tuple[Version | None, Path | None]:
    """Preprocess a file that includes cuda.h, exactly as a compiled kernel would. Needs the host compiler."""
    text = _output([str(nvcc), "-E", f"-I{include}", "-x", "cu", "-"], environ, timeout_s, stdin=PROBE) or ""
    number = re.search(r"^qlibero_cuda_version (\d+)", text, re.MULTILINE)
    path = re.search(r'^# \d+ "([^"]*/cuda\.h)"', text, re.MULTILINE)
    return (_split(int(number.group(1))) if number else None, Path(path.group(1)) if path else None)


def _header_version(path: Path) -> Version | None:
    try:
        number = re.search(r"^\s*#\s*define\s+CUDA_VERSION\s+(\d+)", path.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return _split(int(number.group(1))) if number else None


def _split(number: int) -> Version:
    return number // 1000, number % 1000 // 10


def _v(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def _executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _output(command: list[str], environ: Mapping[str, str], timeout_s: float, stdin: str = "") -> str | None:
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=timeout_s, env=dict(environ)
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
