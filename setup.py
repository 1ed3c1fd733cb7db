"""Builds csrc/ with CMake and ninja; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configures and builds `moeinf._core` and libmoeinf.so in a build folder that persists."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        # Passed at every configure: with build isolation each of these lies in an environment
        # that is gone by the next build.
        configure = [
            "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_MAKE_PROGRAM={ninja_program()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(
            ["cmake", "--build", str(folder), "--target", "_core", "moeinf_c"], check=True
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["cmake", "--install", str(folder), "--prefix", str(target.parent)], check=True
        )

    def copy_extensions_to_source(self) -> None:
        """In a source checkout the C library lies beside the Python module too."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "moeinf" / "lib"
        shutil.copytree(built, ROOT / "moeinf" / "lib", dirs_exist_ok=True)


def ninja_program() -> str:
    try:
        import ninja
    except ImportError:
        return "ninja"
    return str(Path(ninja.BIN_DIR) / "ninja")


setup(ext_modules=[Extension("moeinf._core", sources=[])], cmdclass={"build_ext": CMakeBuild})
