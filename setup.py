"""All but one step is in pyproject.toml: wheels have the files of conf/ as nemo_kd/conf."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConf(build_py):
    """An editable installation needs no copy: `nemo_kd.cli.jobs` finds conf/ beside the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "nemo_kd" / "conf"
            self.mkpath(str(target))
            for source in sorted(Path("conf").glob("*.yaml")):
                self.copy_file(str(source), str(target / source.name))


setup(cmdclass={"build_py": BuildWithConf})
