"""A wheel carries configs/ and the embedded policy as the package's `repository/`; pyproject.toml says all else."""

from pathlib import Path
from shutil import copytree, ignore_patterns

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRepository(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        inside = Path(self.build_lib) / "qlibero" / "repository"
        for folder in ("configs", "examples/libero/embedded"):
            copytree(folder, inside / folder, dirs_exist_ok=True, ignore=ignore_patterns("__pycache__", "curves*"))


setup(cmdclass={"build_py": BuildWithRepository})
