"""Compares Python and the libraries with the requirements of the installed distribution."""

import codecs
import importlib.metadata as metadata
import importlib.util
import locale
import platform
import sys

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from wemmu.diagnosis.findings import Call, Finding, short

# Their versions are shown; of the others only those that are wrong.
CHIEF = [
    "torch",
    "torchvision",
    "transformers",
    "diffusers",
    "mosaicml-streaming",
    "ray",
    "deepspeed",
    "megatron-core",
    "wandb",
]
INSTALL = "run `make install`, which takes the versions of requirements.lock"


def calls() -> list[Call]:
    # The installed distribution says what is needed; without one `python` says so, once.
    return [(python,), *[(libraries,)] * installed(), (torchvision_operators,), (toolchain,), (text_encoding,)]


def installed() -> bool:
    """Return whether wemmu is installed as a distribution; a checkout alone is not."""
    try:
        metadata.distribution("wemmu")
    except metadata.PackageNotFoundError:
        return False
    return True


def python() -> Finding:
    here = platform.python_version()
    if not installed():
        found = f"{here}; wemmu itself is not installed into {sys.prefix}, so its libraries are unchecked"
        return Finding("Python", "problem", found, INSTALL)
    required = metadata.metadata("wemmu")["Requires-Python"]
    if here in SpecifierSet(required):
        return Finding("Python", "ok", here)
    return Finding("Python", "problem", f"{here}, {required} is needed", "run `make install PYTHON=python3.11`")


def requirements() -> dict[str, Requirement]:
    """Return the requirements of the installed wemmu by name, without extras."""
    every = map(Requirement, metadata.requires("wemmu") or ())
    return {one.name: one for one in every if one.marker is None or one.marker.evaluate({"extra": ""})}


def libraries() -> Finding:
    needed = requirements()
    if absent := [name for name in CHIEF if name not in needed]:
        older = f"{', '.join(absent)}: not required by the installed wemmu, which is of an older state than this code"
        return Finding("libraries", "problem", older, INSTALL)
    if wrong := [f"{name}: {found}" for name, one in needed.items() if (found := unfit(one))]:
        return Finding("libraries", "problem", "; ".join(wrong), INSTALL)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in CHIEF)
    return Finding("libraries", "ok", f"{versions}, and {len(needed) - len(CHIEF)} others in their ranges")


def unfit(requirement: Requirement) -> str | None:
    """Return why the installed version is not `requirement`, or None."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"not installed, {requirement.specifier or 'any version'} is needed"
    # Local builds and release candidates count as their version.
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{version}, {requirement.specifier} is needed"


def torchvision_operators() -> Finding:
    """Check torchvision's compiled part, which is built for one build of torch; `import streaming` needs it."""
    name = "torchvision's compiled operators"
    try:
        import torch
        from torchvision.ops import nms

        kept = nms(torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]), torch.tensor([0.5, 1.0]), 0.5)
    except Exception as error:
        remedy = "torch and torchvision are of different builds (a CPU build of one of them?); " + INSTALL
        return Finding(name, "problem", short(error), remedy)
    assert kept.tolist() == [1], "of two equal boxes the better one is kept"
    return Finding(name, "ok", "load and run")


def toolchain() -> Finding:
    """Check what torch.compile and libraries with kernels built at first use need; compiles nothing."""
    import torch

    name = "torch.compile"
    from wemmu.kernels import compiler as find_compiler

    compiler = find_compiler()
    triton = importlib.util.find_spec("triton") is not None
    found = f"C++ compiler {compiler or 'not found'}, triton {'found' if triton else 'not found'}"
    if compiler is None:
        return Finding(
            name, "warning", found, "install a C++ compiler, or name one in CXX; only torch.compile needs it"
        )
    if torch.cuda.is_available() and not triton:
        return Finding(name, "warning", found, "install triton of torch's version; torch.compile on a GPU needs it")
    return Finding(name, "ok", found)


def text_encoding() -> Finding:
    files, names = locale.getpreferredencoding(False), sys.getfilesystemencoding()
    found = f"{files} in files, {names} in file names"
    if all(codecs.lookup(codec).name == "utf-8" for codec in (files, names)):
        return Finding("text encoding", "ok", found)
    remedy = "`export LC_ALL=C.UTF-8` or `export PYTHONUTF8=1`; captions would be read as other letters"
    return Finding("text encoding", "problem", found, remedy)
