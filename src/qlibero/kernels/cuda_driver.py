"""CUDA source to a running kernel without a compiler on the machine: NVRTC, which torch brings, and the driver API.

`Kernel` compiles one instance for the GPU at hand the first time it is launched (a few seconds; the machine code is
kept in ~/.cache/qlibero/cubin under a hash of source, compiler and architecture), loads it once per device, and
launches it on torch's current stream, so it can be captured in a CUDA graph. Everything through ctypes: two libraries
that are there wherever torch runs on an NVIDIA GPU, and nothing to build.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from qlibero.cache import cache_directory, keep
from qlibero.errors import WorkFailed

TYPES = "typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned int uint32_t;\n" + (
    "typedef unsigned long long uint64_t;\n"
)
MAX_DYNAMIC_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


def missing() -> str | None:
    """Why nothing can be compiled and launched here, or None."""
    try:
        nvrtc()
    except WorkFailed as problem:
        return str(problem)
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None


@cache
def nvrtc() -> ctypes.CDLL:
    """The runtime compiler. WorkFailed, naming what to install, when there is none."""
    for path in _nvrtc_candidates():
        try:
            for builtins in sorted(path.parent.glob("libnvrtc-builtins.so*")):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)  # which the compiler looks for by its bare name
            library = ctypes.CDLL(str(path))
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    major = (torch.version.cuda or "13").split(".")[0]
    package = "nvidia-cuda-nvrtc" if int(major) >= 13 else f"nvidia-cuda-nvrtc-cu{major}"
    raise WorkFailed(f"no NVRTC library (libnvrtc.so) was found: pip install {package}, or set CUDA_HOME")


def _nvrtc_candidates() -> Iterator[Path]:
    """Beside torch's other CUDA libraries first: of the version that the driver must know anyway."""
    spec = find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        yield from sorted(Path(root).glob("*/lib/libnvrtc.so*"), reverse=True)
    for home in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")):
        yield from sorted(Path(home).glob("lib64/libnvrtc.so*"), reverse=True)
    yield Path("libnvrtc.so")


@cache
def nvrtc_version() -> str:
    """Of the compiler, such as 13.0."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _ask(nvrtc().nvrtcVersion, ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_source(source: str, architecture: str, name: str = "kernel.cu") -> bytes:
    """Machine code (a cubin) of `source` for an architecture such as sm_90a; needs no GPU.

    WorkFailed with the compiler's log when it does not compile.
    """
    library, program = nvrtc(), ctypes.c_void_p()
    _ask(library.nvrtcCreateProgram, ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    try:
        options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
        failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if failed:
            log = _fetch(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            raise WorkFailed(f"NVRTC {nvrtc_version()} cannot compile {name} for {architecture}: {log.decode()[:2000]}")
        return _fetch(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _fetch(size_of: Callable[..., int], read: Callable[..., int], program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _ask(size_of, program, ctypes.byref(size))
    content = ctypes.create_string_buffer(size.value)
    _ask(read, program, content)
    return content.raw


def _ask(function: Callable[..., int], *arguments: Any) -> None:
    if status := function(*arguments):
        raise WorkFailed(f"NVRTC: {function.__name__}: {nvrtc().nvrtcGetErrorString(status).decode()}")


def cubin(source: str, architecture: str, name: str) -> bytes:
    """`compile_source`, from the cache where it is there. A file that is not a cubin is compiled again."""
    facts = "\0".join((architecture, nvrtc_version(), source))
    path = cache_directory("cubin") / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.cubin"
    try:
        code, digest = path.read_bytes()[32:], path.read_bytes()[:32]
        if hashlib.sha256(code).digest() == digest:
            return code
    except OSError:
        pass
    code = compile_source(source, architecture, name)
    keep(path, hashlib.sha256(code).digest() + code)
    return code


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    if status := getattr(_driver(), name)(*arguments):
        said = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(said))
        raise WorkFailed(f"CUDA driver: {name}: {said.value.decode() if said.value else status}")


class Kernel:
    """One kernel of a source that includes nothing, `name` an extern "C" function whose one argument is a struct."""

    def __init__(self, source: str, name: str, *, threads: int, shared: int):
        self.source, self.name, self.threads, self.shared = TYPES + source, name, threads, shared
        self._functions: dict[int, ctypes.c_void_p] = {}

    def launch(self, parameters: ctypes.Structure, blocks: int, device: torch.device, *, overlap: bool) -> None:
        """On torch's current stream of `device`. `overlap`: the kernel may start before its predecessor ends
        (programmatic dependent launch) and waits inside."""
        with torch.cuda.device(device):
            function = self._function(torch.cuda.current_device())
            attribute = _Attribute(id=PROGRAMMATIC_STREAM_SERIALIZATION)
            attribute.value[0] = 1
            config = _Config(blocks, 1, 1, self.threads, 1, 1, self.shared)
            config.stream = torch.cuda.current_stream().cuda_stream
            config.attributes, config.count = ctypes.pointer(attribute), int(overlap)
            arguments = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
            _call("cuLaunchKernelEx", ctypes.byref(config), function, arguments, None)

    def prepare(self, device: torch.device) -> None:
        """Compile and load, so that a failure shows before anything depends on it."""
        with torch.cuda.device(device):
            self._function(torch.cuda.current_device())

    def _function(self, index: int) -> ctypes.c_void_p:
        if index not in self._functions:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            code = cubin(self.source, architecture(index), self.name)
            _call("cuModuleLoadData", ctypes.byref(module), code)
            _call("cuModuleGetFunction", ctypes.byref(function), module, self.name.encode())
            _call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_MEMORY, self.shared)
            self._functions[index] = function
        return self._functions[index]


def architecture(index: int) -> str:
    """What to compile for: sm_90a on a Hopper."""
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def structure(name: str, fields: Sequence[tuple[str, type]]) -> type[ctypes.Structure]:
    """A parameter struct laid out as C lays it out."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})
