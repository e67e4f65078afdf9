"""What pyproject.toml cannot say: tools/, slurm/, configs/ and assets/ are installed below the launcher."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# Their own names would be too common beside other people's packages.
HOME = "launcher.home"
tools = ["tools", *(f"tools.{package}" for package in find_packages(str(HERE / "tools")))]
folders = ["slurm", "configs", "assets"]

setup(
    packages=[
        *find_packages(str(HERE), include=["wemmu*", "launcher*", "data_pipeline*"]),
        *(f"{HOME}.{package}" for package in tools),
        *(f"{HOME}.{folder}" for folder in folders),
    ],
    package_dir={f"{HOME}.{package}": package.replace(".", "/") for package in (*tools, *folders)},
)
