"""Risk: the policy loads another CUDA's libraries, a kernel is compiled against another CUDA's header, or simulators
render on a device that is not there. Tried on fabricated installations: no GPU and no nvcc are needed."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qlibero.machine import environment, record
from qlibero.machine.cuda_toolkit import Toolkit, check_agreement, find_toolkit, library_directories, torch_cuda
from qlibero.machine.environment import egl_device, policy_environment, simulator_environment

GPUS = [{"index": str(i), "uuid": f"GPU-{c * 8}-1234"} for i, c in enumerate("abcd")]


def touch(path: Path, text: str = "", executable: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if executable:
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def torch(site: Path, cuda: str | None) -> None:
    touch(
        site / "torch" / "version.py",
        f"__version__ = '2.13.0'\ncuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n",
    )


def layout_12(site: Path) -> None:
    """CUDA 12 as pip installs it: a directory per component, cuDNN and NCCL with version numbers of their own."""
    for component, library in (
        ("cublas", "libcublas.so.12"),
        ("cuda_runtime", "libcudart.so.12"),
        ("cudnn", "libcudnn.so.9"),
        ("nvjitlink", "libnvJitLink.so.12"),
        ("nccl", "libnccl.so.2"),
    ):
        touch(site / "nvidia" / component / "lib" / library)
        touch(site / f"nvidia_{component}_cu12-1.0.dist-info" / "METADATA")


def layout_13(site: Path, nvcc: bool = False) -> None:
    """CUDA 13 as pip installs it: one directory for all."""
    touch(site / "nvidia" / "cu13" / "lib" / "libcudart.so.13")
    if nvcc:
        touch(site / "nvidia" / "cu13" / "bin" / "nvcc", "#!/bin/sh\n", executable=True)


def names(directories: tuple[Path, ...]) -> list[str]:
    return [directory.parent.name for directory in directories]


def test_torchs_cuda_is_read_without_importing_it(tmp_path: Path) -> None:
    assert torch_cuda([tmp_path]) is None
    torch(tmp_path, None)
    assert torch_cuda([tmp_path]) is None
    torch(tmp_path, "12.8")
    assert torch_cuda([tmp_path / "absent", tmp_path]) == "12.8"


def test_both_pip_layouts_are_found_and_only_torchs_major_is_taken(tmp_path: Path) -> None:
    layout_12(tmp_path)
    layout_13(tmp_path)
    assert names(library_directories([tmp_path], 13)) == ["cu13"]
    assert names(library_directories([tmp_path], 12)) == ["cublas", "cuda_runtime", "cudnn", "nccl", "nvjitlink"]


def test_without_package_metadata_the_libraries_names_decide(tmp_path: Path) -> None:
    touch(tmp_path / "nvidia" / "cublas" / "lib" / "libcublas.so.11")
    touch(tmp_path / "nvidia" / "cudnn" / "lib" / "libcudnn.so.9")
    touch(tmp_path / "nvidia" / "empty" / "lib" / "readme.txt")
    assert names(library_directories([tmp_path], 12)) == ["cudnn"]


@pytest.mark.parametrize(
    ("cuda", "environ", "home", "why"),
    [
        (None, {}, None, "CPU build"),
        ("13.0", {}, "site/nvidia/cu13", "pip"),
        ("13.0", {"CUDA_HOME": "mine"}, "mine", "CUDA_HOME"),
        ("13.0", {"CUDA_PATH": "mine"}, "mine", "which has no bin/nvcc"),
        ("12.8", {"PATH": "toolkit/bin"}, "toolkit", "PATH"),
        ("12.8", {}, "system", "system"),
    ],
)
def test_where_the_toolkit_comes_from(
    tmp_path: Path, cuda: str | None, environ: dict[str, str], home: str | None, why: str
) -> None:
    site = tmp_path / "site"
    layout_12(site)
    layout_13(site, nvcc=True)
    for place in ("toolkit", "system"):
        touch(tmp_path / place / "bin" / "nvcc", "#!/bin/sh\n", executable=True)
    environ = {"PATH": "", **{name: str(tmp_path / value) for name, value in environ.items()}}
    toolkit = find_toolkit([site], environ, cuda, system=tmp_path / "system")
    assert toolkit.home == (tmp_path / home if home else None)
    assert why in toolkit.why
    assert names(toolkit.libraries) == (
        [] if cuda is None else ["cu13"] if cuda == "13.0" else ["cublas", "cuda_runtime", "cudnn", "nccl", "nvjitlink"]
    )


def fake_nvcc(home: Path, release: str, preprocessed: str | None) -> None:
    """An nvcc that tells its version, and preprocesses to `preprocessed` (None: it cannot)."""
    touch(
        home / "bin" / "nvcc",
        f"""#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release {release}, V{release}.88"; exit 0; fi
{f"cat <<'END'{chr(10)}{preprocessed}{chr(10)}END" if preprocessed else "exit 1"}
""",
        executable=True,
    )


def header(path: Path, number: int) -> None:
    touch(path, f"#ifndef __cuda_cuda_h__\n#define CUDA_VERSION {number}\n#endif\n")


def preprocessed(path: str, number: int) -> str:
    return (
        f'# 1 "<stdin>"\n# 1 "{path}" 1\n# 5 "{path}"\ntypedef int CUdevice;\n'
        f'# 2 "<stdin>" 2\nqlibero_cuda_version {number}'
    )


def test_a_toolkit_that_agrees_raises_no_alarm(tmp_path: Path) -> None:
    fake_nvcc(tmp_path, "13.0", preprocessed("/pip/include/cuda.h", 13000))
    found = check_agreement(tmp_path, os.environ)
    assert (found.nvcc, found.header, found.header_path, found.problem) == (
        (13, 0),
        (13, 0),
        Path("/pip/include/cuda.h"),
        None,
    )
    assert check_agreement(None, os.environ).problem is None
    assert check_agreement(tmp_path / "nothing", os.environ).problem is None


def test_an_older_header_in_front_is_named_with_the_error_it_would_cause(tmp_path: Path) -> None:
    fake_nvcc(tmp_path, "13.0", preprocessed("/usr/include/cuda.h", 11080))
    header(tmp_path / "include" / "cuda.h", 13000)
    found = check_agreement(tmp_path, os.environ)
    assert found.problem and "nvcc is 13.0 but the cuda.h it includes is 11.8 (/usr/include/cuda.h)" in found.problem
    assert "CU_TENSOR_MAP_SWIZZLE_128B" in found.problem
    assert found.hint and "NVCC_PREPEND_FLAGS" in found.hint and "CUDA_HOME" in found.hint


def test_headers_of_one_toolkit_under_the_compiler_of_another_are_found(tmp_path: Path) -> None:
    """CUDA_HOME without a compiler, nvcc on PATH: what the fork's author probably had."""
    header(tmp_path / "old" / "include" / "cuda.h", 11080)
    fake_nvcc(tmp_path / "new", "13.0", preprocessed(f"{tmp_path}/old/include/cuda.h", 11080))
    found = check_agreement(tmp_path / "old", {"PATH": f"{tmp_path}/new/bin:/usr/bin:/bin"})
    assert found.problem and "nvcc is 13.0" in found.problem and "11.8" in found.problem
    assert check_agreement(tmp_path / "old", {"PATH": "/nowhere"}).problem is None, "nothing compiles, nothing breaks"


def test_the_toolkits_own_compiler_comes_first_on_path(tmp_path: Path) -> None:
    fake_nvcc(tmp_path / "cuda", "13.0", None)
    policy = policy_environment({"PATH": "/usr/bin"}, Toolkit(tmp_path / "cuda", (), ""))
    assert policy["PATH"] == f"{tmp_path}/cuda/bin:/usr/bin"
    assert policy_environment(policy, Toolkit(tmp_path / "cuda", (), "")) == policy


def test_without_a_host_compiler_the_toolkits_own_header_is_read(tmp_path: Path) -> None:
    fake_nvcc(tmp_path, "12.4", None)
    found = check_agreement(tmp_path, os.environ)
    assert found.problem == "nvcc 12.4 finds no cuda.h" and found.hint
    header(tmp_path / "include" / "cuda.h", 12040)
    assert check_agreement(tmp_path, os.environ).problem is None
    header(tmp_path / "include" / "cuda.h", 12060)
    problem = check_agreement(tmp_path, os.environ).problem
    assert problem and "12.6" in problem and "usually harmless" in problem


def test_a_dead_nvcc_is_a_finding_not_a_crash(tmp_path: Path) -> None:
    touch(tmp_path / "bin" / "nvcc", "#!/bin/sh\nexit 1\n", executable=True)
    assert "does not answer" in (check_agreement(tmp_path, os.environ).problem or "")
    touch(tmp_path / "bin" / "nvcc", "#!/bin/sh\nsleep 60\n", executable=True)
    assert "does not answer" in (check_agreement(tmp_path, os.environ, timeout_s=0.2).problem or "")


def test_cuda_goes_to_the_policy_process_alone(tmp_path: Path) -> None:
    toolkit = Toolkit(Path("/cuda"), (Path("/pip/cu13/lib"),), "pip packages")
    policy = policy_environment({"LD_LIBRARY_PATH": "/mesa:/pip/cu13/lib", "CUDA_VISIBLE_DEVICES": "1"}, toolkit)
    assert policy["LD_LIBRARY_PATH"] == "/pip/cu13/lib:/mesa" and policy["CUDA_HOME"] == "/cuda"
    assert policy_environment({"A": "b"}, Toolkit(None, (), "")) == {"A": "b"}
    policy[environment.ENTERED] = "/mesa"
    assert simulator_environment(policy, GPUS)["LD_LIBRARY_PATH"] == "/mesa"
    policy[environment.ENTERED] = ""
    assert "LD_LIBRARY_PATH" not in simulator_environment(policy, GPUS)


def test_the_policy_process_starts_again_once_with_its_libraries(tmp_path: Path) -> None:
    """In a real process: exec with the libraries in front, the same arguments, and no second time."""
    layout_13(tmp_path / "site-packages")
    fake_nvcc(tmp_path / "site-packages" / "nvidia" / "cu13", "13.0", preprocessed("/usr/include/cuda.h", 11080))
    torch(tmp_path / "site-packages", "13.0")
    script = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from qlibero.machine import environment
environment.enter_policy_environment()
names = "LD_LIBRARY_PATH", "CUDA_HOME", environment.ENTERED
print(json.dumps([*(os.environ[name] for name in names), sys.argv[2:]]))
"""
    path = touch(tmp_path / "again.py", script)
    done = subprocess.run(
        [sys.executable, str(path), str(tmp_path / "site-packages"), "--set", "a=b c"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("CUDA")}, "LD_LIBRARY_PATH": "/mesa"},
    )
    root = tmp_path / "site-packages" / "nvidia" / "cu13"
    assert json.loads(done.stdout) == [f"{root}/lib:/mesa", str(root), "/mesa", ["--set", "a=b c"]], done.stderr
    assert done.stderr.count("CU_TENSOR_MAP_SWIZZLE_128B") == 1, "the toolkit's disagreement is named at start, once"


@pytest.mark.slow
def test_a_command_that_starts_again_still_speaks_on_its_stdout(tmp_path: Path) -> None:
    """The whole command line, with a torch built for CUDA on the path: one JSON line on stdout, after one new start."""
    site = tmp_path / "site-packages"
    layout_13(site)
    torch(site, "13.0")
    touch(
        site / "sitecustomize.py",
        "import os, sys\nprint('started', os.environ.get('LD_LIBRARY_PATH'), file=sys.stderr)\n",
    )
    environ = {k: v for k, v in os.environ.items() if not k.startswith("CUDA") and k != "LD_LIBRARY_PATH"}
    done = subprocess.run(
        [sys.executable, "-m", "qlibero.cli", "quantize", str(tmp_path / "none.yaml")],
        capture_output=True,
        text=True,
        timeout=300,
        env=environ | {"PYTHONPATH": str(site)},
    )
    assert json.loads(done.stdout)["error"]["exit_status"] == done.returncode == 2, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("started")] == [
        "started None",
        f"started {site}/nvidia/cu13/lib",
    ]


@pytest.mark.parametrize(
    ("visible", "gpus", "index"),
    [
        (None, [], None),
        ("0", [], None),  # no GPU: software rendering chooses for itself
        (None, GPUS, 0),
        ("", GPUS, 0),
        ("2", GPUS, 2),
        ("3,1", GPUS, 3),
        ("GPU-cccccccc-1234", GPUS, 2),
        ("GPU-cccc", GPUS, 2),
        ("GPU-ffff", GPUS, 0),
        ("3", GPUS[3:], 0),
        ("7", GPUS[:1], 0),  # a container that shows one GPU of several
    ],
)
def test_simulators_render_on_the_gpu_the_policy_was_given(
    visible: str | None, gpus: list[dict[str, str]], index: int | None
) -> None:
    assert egl_device(visible, gpus) == index
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert simulator_environment(environ, gpus).get("MUJOCO_EGL_DEVICE_ID") == (None if index is None else str(index))


def test_what_the_user_set_for_rendering_is_kept() -> None:
    assert "MUJOCO_EGL_DEVICE_ID" not in simulator_environment({"MUJOCO_EGL_DEVICE_ID": "5"}, GPUS)
    assert "MUJOCO_EGL_DEVICE_ID" not in simulator_environment({"MUJOCO_GL": "osmesa"}, GPUS)


def test_environment_json_says_what_ran() -> None:
    found = record.describe()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["mujoco"] == "3.2.3" and found["host"]["cores"] >= 1
    assert found["gl"].get("renderer"), found["gl"]
    assert len(found["git"].get("commit", "0" * 40)) == 40
    assert "CUDA_VISIBLE_DEVICES" not in found["simulator_processes"]
    assert not any("key" in name.lower() or "token" in name.lower() for name in json.dumps(found).split('"'))
