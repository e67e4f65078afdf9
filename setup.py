"""What pyproject.toml cannot say: tools/ and slurm/ are installed below the launcher, which starts what is in them."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# Their own names would be too common beside other people's packages.
HOME = "launcher.home"
tools = ["tools", *(f"tools.{package}" for package in find_packages(str(HERE / "tools")))]

setup(
    packages=[
        *find_packages(str(HERE), include=["wemmu*", "launcher*", "data_pipeline*"]),
        *(f"{HOME}.{package}" for package in tools),
        f"{HOME}.slurm",
    ],
    package_dir={f"{HOME}.{package}": package.replace(".", "/") for package in (*tools, "slurm")},
)
