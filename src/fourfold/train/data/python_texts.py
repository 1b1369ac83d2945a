"""Texts of installed Python packages: sources, documentation, and docstrings of long modules."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from fourfold.train.data.config import PackagesConfig
from fourfold.train.data.documents import TEXT_ENDINGS
from fourfold.train.data.texts import Package, Text, named_licence

_LONGEST_LICENCE = 60
"""Some packages give their licence's whole text instead of its name."""
_CLASSIFIER = "License :: "
_LICENCE_FILE = re.compile(r"\.dist-info/(?:licenses/)?(?:LICEN[CS]E|COPYING)[^/]*$")


def python_texts(config: PackagesConfig) -> Iterator[Text]:
    """The texts of all packages of some folders, and without these of Python's own library too, in
    an order that does not depend on the disk."""
    folders = config.python or tuple(dict.fromkeys(map(Path, _own_folders())))
    for folder in folders:
        found = importlib.metadata.distributions(path=[str(folder)])
        named = {(d.metadata["Name"] or "").lower(): d for d in found}
        for name in sorted(named):
            distribution = named[name]
            package = Package("python", name, distribution.version, _licence(distribution))
            files = [folder / str(file) for file in distribution.files or ()]
            yield from _texts(package, folder, files, config)
    if not config.python:
        library = Path(sysconfig.get_path("stdlib"))
        package = Package("python", "python", ".".join(map(str, sys.version_info[:3])), "PSF-2.0")
        installed = ("site-packages", "dist-packages")
        modules = library.rglob("*.py")
        files = [p for p in modules if not set(p.relative_to(library).parts) & {*installed}]
        yield from _texts(package, library, files, config)


def _own_folders() -> list[str]:
    return [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]


def _texts(
    package: Package, folder: Path, files: Sequence[Path], config: PackagesConfig
) -> Iterator[Text]:
    """Of a package's files, those outside its folder left out."""
    inside = {p: p.relative_to(folder).as_posix() for p in files if p.is_relative_to(folder)}
    for path, name in sorted(inside.items(), key=lambda item: item[1]):
        if ".." in name or not name.endswith((".py", *TEXT_ENDINGS)):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if name.endswith(".py") and len(text) > config.most_characters:
            text = docstrings(text)
        yield Text(package, name, text)


def docstrings(source: str) -> str:
    """The docstrings of a module, its classes and functions, under their names; empty for what is
    no Python."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    parts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            said = ast.get_docstring(node)
            if said:
                parts.append(said if isinstance(node, ast.Module) else f"{node.name}\n\n{said}")
    return "\n\n\n".join(parts)


def _licence(distribution: importlib.metadata.Distribution) -> str:
    """The name of a licence, from where a package may have it."""
    metadata = distribution.metadata
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    classifiers = metadata.get_all("Classifier") or []
    classified = ", ".join(c.split(" :: ")[-1] for c in classifiers if c.startswith(_CLASSIFIER))
    told = " ".join(metadata["License"].split()) if "License" in metadata else ""
    if told and told != "UNKNOWN" and len(told) <= _LONGEST_LICENCE:
        return told
    files = [f for f in distribution.files or () if _LICENCE_FILE.search(f.as_posix())]
    texts = [Path(str(f.locate())).read_text(errors="replace") for f in files]
    return classified or named_licence("\n".join([told, *texts]))
