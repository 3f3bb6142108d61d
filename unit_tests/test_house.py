"""The rules of the house that a program can check: who imports whom, how tests are laid out, and how big things are."""

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("server", "models", "kernels", "benchmarks")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_MEDIAN_LINES = 450, 60, 10
NO_TORCH = ("torch", "transformers", "safetensors", "triton")

# What each room may import of ours besides itself. The most specific name rules.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "kernels": (),
    "models": ("kernels",),
    "server": (),
    "server.errors": (),
    "server.control": (),
    "server.messages": ("server.control", "server.errors"),
    "server.config": ("server.errors",),
    "server.tokenizer": ("server.messages", "server.errors"),
    "server.flags": ("server.config", "server.errors"),
    "server.flag_aliases": ("server.flags", "server.config", "server.errors"),
    "server.command_line": (
        "server.flags",
        "server.flag_aliases",
        "server.versions",
        "server.config",
        "server.errors",
    ),
    "server.cache_ops": (),
    "server.router": ("server.request", "server.cache_ops", "server.messages", "server.config", "server.errors"),
    "server.request": ("server.cache_ops", "server.messages"),
    "server.backend": (
        "kernels",
        "models",
        "server.request",
        "server.cache_ops",
        "server.tokenizer",
        "server.control",
        "server.messages",
        "server.config",
        "server.errors",
    ),
    "server.engine": (
        "server.engine_control",
        "server.router",
        "server.backend",
        "server.request",
        "server.control",
        "server.messages",
        "server.config",
        "server.errors",
    ),
    "server.engine_control": (
        "server.router",
        "server.backend",
        "server.request",
        "server.control",
        "server.messages",
        "server.errors",
    ),
    # Makes the engine from a name it is given, in the child process: importing this file alone loads no torch.
    "server.engine_process": (
        "server.channel",
        "server.logs",
        "server.control",
        "server.messages",
        "server.config",
        "server.errors",
    ),
    "server.llm": (
        "server.engine",
        "server.tokenizer",
        "server.control",
        "server.messages",
        "server.config",
        "server.errors",
    ),
    "server.channel": ("server.control", "server.messages", "server.config", "server.errors"),
    "server.api": (
        "server.channel",
        "server.tokenizer",
        "server.logs",
        "server.versions",
        "server.control",
        "server.messages",
        "server.config",
        "server.errors",
    ),
    "server.http_server": ("server.api", "server.config", "server.errors"),
    # Looks at a checkpoint as the engine would: `--check` alone imports it.
    "server.check": (
        "models",
        "server.backend",
        "server.api.sampling",
        "server.api.tracing",
        "server.http_server",
        "server.tokenizer",
        "server.config",
        "server.errors",
    ),
    "server.launch": (
        "server.api",
        "server.check",
        "server.http_server",
        "server.logs",
        "server.versions",
        "server.channel",
        "server.command_line",
        "server.engine_process",
        "server.tokenizer",
        "server.messages",
        "server.config",
        "server.errors",
    ),
    "server.__main__": ("server.launch", "server.command_line", "server.config", "server.errors"),
    "benchmarks": ("kernels", "server.llm", "server.config", "server.messages"),
}
WITHOUT_TORCH = (
    "server.api",
    "server.router",
    "server.request",
    "server.cache_ops",
    "server.channel",
    "server.launch",
    "server.engine_process",
    "server.command_line",
    "server.flags",
    "server.flag_aliases",
    "server.http_server",
    "server.logs",
    "server.versions",
    "server.control",
    "server.messages",
    "server.config",
    "server.errors",
    "server.tokenizer",
    "server.__main__",
)
# Files without logic of their own (messages and commands are plain dataclasses: test_channel sends them), and
# scripts that are tested by running them.
NEEDS_NO_TEST = (
    "models.errors",
    "server.errors",
    "server.control",
    "server.messages",
    "server.cache_ops",
    "server.__main__",
    "benchmarks",
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def source_files() -> list[Path]:
    return sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


def modules() -> list[Path]:
    return [path for path in source_files() if path.name != "__init__.py"]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports, wherever they stand; `from a import b` gives a.b when that is a module of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrows"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = (ROOT / whole.replace(".", "/")).with_suffix(".py").exists()
                yield whole if is_module else str(node.module)


def room_of(name: str) -> str:
    """The most specific entry of MAY_IMPORT that contains the module."""
    return max((room for room in MAY_IMPORT if is_inside(name, room)), key=len)


def is_inside(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def violations(path: Path) -> list[str]:
    name = module_name(path)
    room = room_of(name)
    allowed = (room, *MAY_IMPORT[room])
    found = []
    for target in imports(parse(path)):
        is_ours = target.split(".")[0] in (*FLOORS, "unit_tests")
        if is_ours and not any(is_inside(target, other) for other in allowed):
            found.append(f"{name} imports {target}")
    return found


def functions(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """(name, lines, is a Triton kernel) of every function and method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_kernel = any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1, is_kernel


def public_definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def assert_none(found: list[str]) -> None:
    assert not found, "\n" + "\n".join(found)


def test_arrows_between_rooms_point_down_only():
    assert_none([line for path in modules() for line in violations(path)])


def test_no_module_of_the_http_process_or_the_router_reaches_torch():
    """Imports them one by one in a fresh interpreter, up to the first that brings torch along."""
    names = [module_name(path) for path in modules()]
    names = [name for name in names if any(is_inside(name, room) for room in WITHOUT_TORCH)]
    code = f"import importlib, sys\nfor name in {names}:\n    importlib.import_module(name)\n"
    code += f"    for heavy in {NO_TORCH}:\n        if heavy in sys.modules: sys.exit(name + ' loads ' + heavy)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert len(names) > len(WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr


def test_the_engine_needs_neither_fastapi_nor_zeromq():
    code = "import sys, server.llm; sys.exit(', '.join({'fastapi', 'uvicorn', 'zmq'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_init_files_are_empty():
    assert_none([str(path) for path in source_files() if path.name == "__init__.py" and path.read_text().strip()])


def test_every_package_has_an_init_file():
    folders = {path.parent for path in source_files()} | {path.parent for path in (ROOT / "unit_tests").rglob("*.py")}
    assert_none([str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()])


def test_files_are_short():
    paths = [*source_files(), *(ROOT / "unit_tests").rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert_none([f"{name}: {length}" for name, length in lengths.items() if length > MAX_FILE_LINES])


def test_functions_are_short():
    paths = [*modules(), *(ROOT / "unit_tests").rglob("*.py")]
    found = [
        f"{module_name(path)}.{name}: {length}"
        for path in paths
        for name, length, is_kernel in functions(parse(path))
        if length > MAX_FUNCTION_LINES and not is_kernel
    ]
    assert_none(found)


def test_the_median_function_is_small():
    lengths = [length for path in modules() for _, length, is_kernel in functions(parse(path)) if not is_kernel]
    assert statistics.median(lengths) <= MAX_MEDIAN_LINES


def test_public_modules_classes_and_functions_say_what_they_give():
    found = []
    for path in modules():
        tree = parse(path)
        if ast.get_docstring(tree) is None:
            found.append(module_name(path))
        found += [
            f"{module_name(path)}.{node.name}" for node in public_definitions(tree) if ast.get_docstring(node) is None
        ]
    assert_none(found)


def test_every_kernel_file_starts_with_its_public_operations_tested():
    """Each public function of kernels/x.py and kernels/gpu/x.py is named in the test file that mirrors it."""
    found = []
    for path in (path for path in modules() if path.parent in (ROOT / "kernels", ROOT / "kernels" / "gpu")):
        test = ROOT / "unit_tests" / path.parent.relative_to(ROOT) / f"test_{path.name}"
        text = test.read_text(encoding="utf-8") if test.exists() else ""
        names = [node.name for node in public_definitions(parse(path)) if not isinstance(node, ast.ClassDef)]
        found += [f"{module_name(path)}.{name}" for name in names if name not in text]
    assert_none(found)


def test_every_source_file_has_its_test_file():
    expected = [path for path in modules() if not any(is_inside(module_name(path), room) for room in NEEDS_NO_TEST)]
    missing = [module_name(path) for path in expected if not (folder_of_test(path) / f"test_{path.stem}.py").exists()]
    assert_none(missing)


def folder_of_test(path: Path) -> Path:
    return ROOT / "unit_tests" / path.parent.relative_to(ROOT)


def test_broad_excepts_stand_at_the_process_boundary_only():
    found = []
    for path in modules():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            ):
                found.append(module_name(path))
    # tokenizers raises bare Exception for a broken file; it is renamed on the spot.
    assert set(found) <= {"server.engine_process", "server.tokenizer"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch", ["torch"]),
        ("def f():\n    import server.engine", ["server.engine"]),
        ("from models import weights", ["models.weights"]),
        ("from models.weights import load_weights", ["models.weights"]),
    ],
)
def test_imports_are_found_wherever_they_stand(source, expected):
    assert list(imports(ast.parse(source))) == expected
