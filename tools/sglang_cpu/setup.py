"""setup.cfg holds the package; this adds the one file that has to stand beside it rather than in it."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPth(build_py):
    """Python reads `.pth` files at its start, and only those in site-packages itself."""

    def run(self) -> None:
        super().run()
        self.copy_file(str(Path(__file__).with_name("r1mega_sglang_cpu.pth")), self.build_lib)


setup(cmdclass={"build_py": BuildWithPth})
