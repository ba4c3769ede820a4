"""``make docs``: one page for each module, from its docstrings, and one for each Markdown file of this folder.

A warning of pdoc, a name in ``__all__`` without a docstring, and a broken link of a guide page are errors.
"""

from __future__ import annotations

import functools
import importlib
import operator
import pkgutil
import posixpath
import re
import shutil
import sys
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic_core import PydanticUndefined

import raydpo
from raydpo.errors import RaydpoError

if TYPE_CHECKING:
    import pdoc

__all__ = ["build_pages", "guide_text", "module_names"]

GUIDE = Path(__file__).parent
PACKAGE = GUIDE.parent


def module_names() -> list[str]:
    """Names of all modules of raydpo, sorted."""
    return ["raydpo", *sorted(found.name for found in pkgutil.walk_packages(raydpo.__path__, "raydpo."))]


def build_pages(directory: Path) -> int:
    """Write the pages to ``directory``, and return how many.

    Raises:
        RaydpoError: listing pdoc's warnings, missing docstrings and broken links.
    """
    import pdoc

    for name in module_names():
        importlib.import_module(name)
    for name in raydpo.__all__:  # while ``raydpo.audit`` is not looked up yet, pdoc would take the package for it
        getattr(raydpo, name)
    pdoc.render.configure(
        docformat="google", show_source=False, template_directory=GUIDE, footer_text=f"raydpo {raydpo.__version__}"
    )
    modules = {name: pdoc.doc.Module(sys.modules[name]) for name in module_names()}
    broken: list[str] = []
    for file in sorted(GUIDE.glob("*.md")):
        name = "raydpo.guide" if file.stem == "index" else f"raydpo.guide.{file.stem}"
        modules[name] = pdoc.doc.Module(_page(name, guide_text(file, broken)))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        for variable in _variables(modules.values()):
            variable.annotation, variable.default_value = map(_plain, (variable.annotation, variable.default_value))
            if variable.default_value is PydanticUndefined:
                variable.default_value = pdoc.doc_types.empty
        for name, module in modules.items():
            _write(directory / f"{name.replace('.', '/')}.html", pdoc.render.html_module(module, modules))
        _write(directory / "index.html", pdoc.render.html_index(modules))
        _write(directory / "search.js", pdoc.render.search_index(modules))
    for picture in GUIDE.glob("*.svg"):
        shutil.copy(picture, directory / "raydpo" / "guide")
    problems = [*dict.fromkeys(str(each.message) for each in warned), *broken, *_undocumented(modules)]
    if problems:
        raise RaydpoError("\n".join(problems))
    return len(modules)


def guide_text(file: Path, broken: list[str]) -> str:
    """The text of a guide page, with its links changed to lead from web page to web page.

    A link to another guide page, or to a module or package of raydpo, becomes a link to its web page. A link to a file
    outside the package, which has no web page, becomes its plain text.

    Args:
        broken: one line is appended for each link to a file that does not exist.
    """
    start = "raydpo" if file.stem == "index" else "raydpo/guide"

    def changed(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        there = (GUIDE / target).resolve()
        if not there.exists() or there == GUIDE:
            broken.append(f"{file.name}: there is no file {target}")
        if not there.is_relative_to(PACKAGE):
            return text
        inside = f"raydpo/{there.relative_to(PACKAGE).as_posix()}"
        page = re.sub(r"(/__init__)?\.(md|py)$", "", inside)
        page = "raydpo/guide" if inside == "raydpo/guide/index.md" else page
        return f"[{text}]({posixpath.relpath(f'{page}.html', start)}{anchor})"

    return re.sub(r"(?<!!)\[([^\]]+)\]\((?![a-z]+:|#)([^)#]+)(#[^)]*)?\)", changed, file.read_text(encoding="utf-8"))


def _page(name: str, text: str) -> types.ModuleType:
    """A module without names, since pdoc makes pages of modules only."""
    made = types.ModuleType(name, text)
    made.__all__ = []
    return made


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def _variables(modules: Iterable[pdoc.doc.Module]) -> Iterator[pdoc.doc.Variable]:
    """Constants of modules and fields of classes; settings are such fields."""
    for module in modules:
        yield from module.variables
        for each in module.classes:
            yield from (member for member in each.members.values() if member.kind == "variable")


def _plain(kind: Any) -> Any:
    """Remove pydantic's annotations from a type; anything else is returned unchanged."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _plain(inner[0])
    if origin in (Union, types.UnionType):
        return functools.reduce(operator.or_, map(_plain, inner))
    if origin in (dict, list, tuple):
        return origin[tuple(map(_plain, inner))]
    return kind


def _undocumented(modules: Mapping[str, pdoc.doc.Module]) -> Iterator[str]:
    """A constant that a package re-exports is documented in the module that defines it."""
    public = [(module, name) for module in modules.values() for name in getattr(module.obj, "__all__", ())]
    explained = {(name, id(getattr(module.obj, name))) for module, name in public if module.members[name].docstring}
    yield from (f"{name} has no docstring" for name, module in modules.items() if not module.docstring)
    yield from (
        f"{module.modulename}.{name} has no docstring"
        for module, name in public
        if (name, id(getattr(module.obj, name))) not in explained
    )


if __name__ == "__main__":
    try:
        print(f"{build_pages(Path(sys.argv[1]))} pages: {sys.argv[1]}/index.html")
    except RaydpoError as error:
        sys.exit(f"error: {error}")
