"""The rules of the source tree: imports that run one way, few rooms, short files and pages, file names kept in one place.

A room is a folder of raydpo/ or a file at its root. Each room stands on a floor, named in pyproject.toml under
[tool.importlinter]. A room may import rooms on lower floors only. Imports inside functions and under TYPE_CHECKING count.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "raydpo"
ROOT_FILES = {"__init__.py", "errors.py", "version.py"}
INIT_WITH_CODE = {"raydpo", "raydpo/audits", "raydpo/cli", "raydpo/config", "raydpo/losses", "raydpo/reports"}
"""Packages whose ``__init__.py`` may export names. All others hold a docstring only."""
RUN_FILES = (
    "audit.html",
    "audit.json",
    "checkpoint_manager_snapshot.json",
    "eval.parquet",
    "evaluation.json",
    "metrics.parquet",
    "report.html",
    "run.json",
    "samples.parquet",
    "summary.json",
    "sweep.json",
    "training-pairs.parquet",
)
"""Names of files of a run directory. ``config.yaml`` is not among them: a user's own file has that name, too."""
KNOWS_RUN_FILES = ("*/directory.py", "submit/package.py")
MOST_ROOMS, MOST_LINES = 30, 600


# -- what is there --------------------------------------------------------------------------------------------------------


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Dotted name -> file of every module."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = [package.name, *file.relative_to(package).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def arrows(files: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> modules that it imports anywhere in its file, by absolute or relative import."""
    return {
        name: {target for target, _ in imported(name, file, files) if target in files and target != name}
        for name, file in files.items()
    }


def imported(name: str, file: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """(module of the package, line) of every import of a file; the module may not exist."""
    top = next(iter(known)).partition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            wanted = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        else:
            continue
        for module in wanted:
            if module.partition(".")[0] == top:
                yield module, node.lineno


def room(module: str) -> str:
    """``raydpo.config.load`` -> ``config``; the package itself is room ``__init__``."""
    return [*module.split("."), "__init__"][1]


def floors() -> list[set[str]]:
    """Rooms of each floor, the lowest first. ``raydpo/__init__.py`` stands beside ``cli``."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = [each for each in settings["contracts"] if each["type"] == "layers"]
    assert settings["root_package"] == "raydpo" and contract["containers"] == ["raydpo"] and contract["exhaustive"] is True
    assert settings["exclude_type_checking_imports"] is False and not contract.get("ignore_imports")
    found = [set(re.split(r"\s*\|\s*", layer)) for layer in reversed(contract["layers"])]
    return [floor | ({"__init__"} if "cli" in floor else set()) for floor in found]


def upward(imports: dict[str, set[str]], floors: list[set[str]]) -> list[str]:
    """Arrows to a room on the same floor or a higher one, one line each."""
    floor = {name: number for number, names in enumerate(floors, 1) for name in names}
    return [
        f"{one} (floor {floor.get(room(one), '?')}) -> {other} (floor {floor.get(room(other), '?')})"
        for one, others in sorted(imports.items())
        for other in sorted(others)
        if room(one) != room(other) and floor.get(room(other), 99) >= floor.get(room(one), 0)
    ]


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that import each other directly or through others."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for other in imports[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        return seen

    reach = {name: reached(name) for name in imports}
    groups = {
        tuple(sorted({other for other in reach[name] if name in reach[other]} | {name}))
        for name in imports
        if name in reach[name]
    }
    return [list(group) for group in sorted(groups)]


def texts(tree: ast.AST) -> Iterator[ast.Constant]:
    """String constants that are values: no docstrings."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    )


def shown(problems: list[str], what: str) -> None:
    assert not problems, f"{len(problems)} {what}:\n" + "\n".join(problems)


# -- the rules ------------------------------------------------------------------------------------------------------------


def test_every_module_that_is_imported_exists():
    """In the package, the jobs and the tests; inside functions, too, where an error shows only when they are called."""
    files = modules()
    others = {str(file): file for place in ("jobs", "tests") for file in (ROOT / place).rglob("*.py")}
    shown(
        [
            f"{file.relative_to(ROOT)}:{line}: {module}"
            for name, file in (files | others).items()
            for module, line in imported(name, file, files)
            if module not in files
        ],
        "import(s) of no module",
    )


def test_no_import_runs_upward():
    shown(upward(arrows(modules()), floors()), "import(s) of a room on the same floor or a higher one")


def test_every_room_has_a_floor():
    named, there = set().union(*floors()), {room(module) for module in modules()}
    shown(
        [f"{name}: no floor in pyproject.toml" for name in sorted(there - named)]
        + [f"{name}: a floor in pyproject.toml, but no such room" for name in sorted(named - there)],
        "room(s)",
    )


def test_no_files_import_each_other():
    imports = arrows(modules())
    shown(
        [
            f"{', '.join(group)}:\n  "
            + "\n  ".join(f"{one} -> {other}" for one in group for other in sorted(imports[one] & set(group)))
            for group in circles(imports)
        ],
        "circle(s) of imports",
    )


def test_few_rooms_and_no_loose_file():
    loose = {file.name for file in PACKAGE.glob("*.py")} - ROOT_FILES
    rooms = {room(module) for module in modules()}
    shown(sorted(loose), "loose file(s) at the root of the package; move them into a room")
    assert len(rooms) <= MOST_ROOMS, f"{len(rooms)} rooms, more than {MOST_ROOMS}: {sorted(rooms)}"


def test_no_docstring_begins_with_of():
    """In the package and in the tests; texts below a constant count."""
    problems = []
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
                and re.match(r"\s*Of\b", node.value.value)
            ):
                problems.append(f"{file.relative_to(ROOT)}:{node.lineno}: {node.value.value.strip().splitlines()[0]}")
    shown(problems, "docstring(s) that do not begin with what the thing is or does")


def unencoded(tree: ast.AST) -> Iterator[int]:
    """Lines that open a text file in the encoding of the machine's locale."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else getattr(node.func, "id", "")
        mode = next((key.value for key in node.keywords if key.arg == "mode"), (*node.args, None, None)[1])
        binary = isinstance(mode, ast.Constant) and "b" in str(mode.value)
        text_of_path = method and ((name == "read_text" and not node.args) or (name == "write_text" and len(node.args) == 1))
        if text_of_path or (not binary and (name == "fdopen" or (name == "open" and not method))):
            yield node.lineno


def test_every_text_file_is_opened_as_utf_8():
    """On a machine with another locale, a file would otherwise be written or read in another encoding."""
    shown(
        [
            f"{file.relative_to(ROOT)}:{line}: no encoding="
            for place in (PACKAGE, ROOT / "jobs")
            for file in place.rglob("*.py")
            for line in unencoded(ast.parse(file.read_text(encoding="utf-8")))
        ],
        "text file(s) opened in the encoding of the locale",
    )


def test_the_readme_is_short_and_begins_with_a_command():
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = (number for number, line in enumerate(lines, 1) if re.match(r"(cd|git|make|pip|raydpo) ", line))
    first = next(commands, len(lines))
    words = sum(len(line.split()) for line in lines)
    assert len(lines) <= 220 and words <= 2500, f"README.md has {len(lines)} lines and {words} words, at most 220 and 2,500"
    assert first <= 30, f"the first command of README.md is in line {first}, expected in the first 30"


def test_each_page_of_the_guide_is_short():
    lengths = {file.name: len(file.read_text().splitlines()) for file in (PACKAGE / "guide").rglob("*.md")}
    assert lengths
    shown(
        [f"{name}: {length} lines" for name, length in sorted(lengths.items()) if length > 250],
        "page(s) of more than 250 lines",
    )


def test_tests_that_pages_name_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(PACKAGE / "guide").glob("*.md")]
    named = [(page, name) for page in pages for name in re.findall(r"`(tests/[\w/.]+)`", page.read_text())]
    assert len(named) > 10
    shown([f"{page.name}: {name}" for page, name in named if not (ROOT / name).exists()], "path(s) that do not exist")


def test_files_of_a_run_directory_are_named_in_one_place():
    name = re.compile(rf"(^|/)({'|'.join(map(re.escape, RUN_FILES))})$")
    assert any(file for file in PACKAGE.glob(KNOWS_RUN_FILES[0])), "no raydpo/*/directory.py that names them"
    shown(
        [
            f"{file.relative_to(ROOT)}:{text.lineno}: {text.value!r}"
            for file in modules().values()
            if not any(file.relative_to(PACKAGE).match(pattern) for pattern in KNOWS_RUN_FILES)
            for text in texts(ast.parse(file.read_text()))
            if name.search(text.value)
        ],
        "file name(s) of a run directory outside of raydpo/*/directory.py",
    )


def test_no_file_is_long():
    lengths = {file: len(file.read_text().splitlines()) for file in modules().values()}
    shown(
        [f"{file.relative_to(ROOT)}: {length} lines" for file, length in lengths.items() if length > MOST_LINES],
        f"file(s) of more than {MOST_LINES} lines",
    )


def test_packages_begin_empty():
    problems = []
    for file in PACKAGE.rglob("__init__.py"):
        body = ast.parse(file.read_text()).body
        docstring = len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        if not docstring and str(file.parent.relative_to(ROOT)) not in INIT_WITH_CODE:
            problems.append(str(file.relative_to(ROOT)))
    shown(problems, "__init__.py with more or less than a docstring")


def test_the_files_that_start_first_are_there():
    there = {file.stem for file in (ROOT / "tests").rglob("test_*.py")}
    wanted = ast.parse((ROOT / "tests" / "conftest.py").read_text())
    (longest,) = [
        ast.literal_eval(node.value)
        for node in wanted.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "LONGEST"
    ]
    shown(sorted(set(longest) - there), "name(s) in LONGEST of tests/conftest.py without a file")


# -- the rules can fail ---------------------------------------------------------------------------------------------------


@pytest.fixture
def house(tmp_path):
    """A package of two floors in which every kind of import is wrong."""
    sources = {
        "__init__": "",
        "low/__init__": "",
        "high/__init__": "",
        "side": "import house.low.b\n",
        "low/a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.high import c\n",
        "low/b": "def late():\n    from . import d\n",
        "low/d": "from .b import late\n",
        "high/c": "from house import low\nfrom house.low.a import x\nimport house.high\n",
    }
    for name, source in sources.items():
        file = tmp_path / "house" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return modules(tmp_path / "house")


def test_an_import_under_type_checking_and_one_within_a_floor_are_found(house):
    found = upward(arrows(house), [{"low", "side"}, {"high"}])
    assert found == ["house.low.a (floor 1) -> house.high.c (floor 2)", "house.side (floor 1) -> house.low.b (floor 1)"]
    assert "house.high.c (floor 1) -> house.low (floor ?)" in upward(arrows(house), [{"high"}]), "a room without a floor"


def test_a_circle_through_a_function_and_a_relative_import_is_found(house):
    assert circles(arrows(house)) == [["house.high.c", "house.low.a"], ["house.low.b", "house.low.d"]]


def test_an_import_of_nothing_is_found(house):
    file = house["house.low.a"]
    file.write_text("def late():\n    from house.low.gone import x\n    from . import x, b\n")
    assert list(imported("house.low.a", file, house)) == [("house.low.gone", 2), ("house.low", 3), ("house.low.b", 3)]


def test_docstrings_are_no_file_names():
    tree = ast.parse('"""run.json"""\nx = 1\n"""a/run.json"""\ny = f"{x}/run.json"\nz("run.json")')
    assert [text.value for text in texts(tree)] == ["/run.json", "run.json"]
