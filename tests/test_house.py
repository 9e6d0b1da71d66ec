"""The rules of the house: who may import whom, errors and their statuses, public names, stubs, file sizes."""

import ast
import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import grpc
import pytest

from bitneck import errors

ROOT = Path(__file__).resolve().parent.parent
COMPONENTS = {"shared": "bitneck", "edge": "bitneck_edge", "cloud": "bitneck_cloud", "models": "bitneck_models"}
PACKAGES = set(COMPONENTS.values())
TORCH = {"torch", "torchvision", "timm"}


def sources(component: str) -> list[Path]:
    return sorted((ROOT / component / COMPONENTS[component]).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("component", COMPONENTS)
def test_components_import_shared_and_nothing_else_of_ours(component: str) -> None:
    allowed = {"bitneck", COMPONENTS[component]}
    for path in sources(component):
        assert imported(path) & PACKAGES <= allowed, path
        if component != "models":
            assert not imported(path) & TORCH, path


def test_only_the_commands_load_a_component_by_its_name() -> None:
    """`bitneck.commands` is the one place in shared that knows of the others: see docs/decisions.md."""
    found = [
        p.name
        for p in sources("shared")
        if re.search(r"import_module|bitneck_(edge|cloud|models)\b.*import", p.read_text())
    ]
    assert found == ["commands.py"]


@pytest.mark.parametrize("component", COMPONENTS)
def test_what_is_imported_is_declared(component: str) -> None:
    """In the dependencies that everyone gets, or in the component's own extra: not in another one's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"].get(component, [])]
    on_demand = {"cloud": "traces", "edge": "video"}  # imported only if asked for
    wanted += project["optional-dependencies"].get(on_demand.get(component, ""), [])
    declared = {re.split(r"[<>=!~; \[]", line)[0].lower().replace("-", "_") for line in wanted}
    declared |= {"starlette"} if "fastapi" in declared else set()  # fastapi is a layer of it, and hands its types out
    provided_by = importlib.metadata.packages_distributions()
    for path in sources(component):
        for name in imported(path) - PACKAGES - sys.stdlib_module_names:
            assert {d.lower().replace("-", "_") for d in provided_by[name]} & declared, (
                f"{path}: {name} is not declared"
            )


def test_numerics_do_no_io() -> None:
    """Codec, tables, quantizer, ladder, batching, session and flow take values and return values."""
    coding = ("symbols", "factorized_model", "factorized_codec", "class_map")
    pure = [f"shared/bitneck/{n}.py" for n in (*(f"coding/{n}" for n in coding), "backoff", "ladder", "frames", "ids")]
    pure += [f"cloud/bitneck_cloud/{n}.py" for n in ("engine/batching", "sessions/session")]
    edge = ("ratecontrol", "points", "answers/verify", "link/records", "link/wire")
    pure += [f"edge/bitneck_edge/{n}.py" for n in edge]
    for name in pure:
        banned = {"socket", "time", "asyncio", "grpc", "pathlib", "os", "torch", "threading"}
        assert not imported(ROOT / name) & banned, name


def modules(component: str) -> list[str]:
    package = ROOT / component
    names = [".".join(p.relative_to(package).with_suffix("").parts) for p in sources(component)]
    return [n for n in names if ".v1" not in n and not n.endswith("__init__")]


@pytest.mark.parametrize("component", COMPONENTS)
def test_public_names_are_listed_and_exist(component: str) -> None:
    for name in modules(component):
        module = importlib.import_module(name)
        for public in module.__all__:
            assert hasattr(module, public), f"{name}.{public}"
            thing = getattr(module, public)
            if inspect.isclass(thing) or inspect.isroutine(thing):
                assert inspect.getdoc(thing), f"{name}.{public} has no docstring"


def test_what_shared_defines_in_public_is_listed() -> None:
    for path in sources("shared"):
        if path.parent.name == "v1" or path.name == "__init__.py":
            continue
        module = importlib.import_module(".".join(path.relative_to(ROOT / "shared").with_suffix("").parts))
        defined = {
            node.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        }
        assert defined <= set(module.__all__), path


@pytest.mark.parametrize("component", ["shared", "edge", "cloud"])
def test_serving_imports_no_torch_and_prints_nothing(component: str) -> None:
    lines = [f"import {name}" for name in modules(component)]
    code = ";".join(
        [*lines, "import sys", "bad = {'torch','torchvision','timm'} & set(sys.modules)", "assert not bad, bad"]
    )
    if component == "edge":
        code += ";bad = {'fastapi','uvicorn','bitneck_cloud'} & set(sys.modules);assert not bad, bad"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def error_classes() -> dict[str, type[errors.BitneckError]]:
    found = {n: c for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, errors.BitneckError)}
    assert set(found) <= set(errors.__all__)
    return found


def test_the_error_tree_is_as_drawn() -> None:
    drawn = {}
    parents: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([|` -]*)(\w+)\s+([A-Z_]+)\s+(\d{3})\s+(\d)", line)
        if match:
            depth, name = len(match[1]), match[2]
            while parents and parents[-1][0] >= depth:
                parents.pop()
            drawn[name] = (parents[-1][1] if parents else "Exception", match[3], int(match[4]), int(match[5]))
            parents.append((depth, name))
    real = {n: (c.__bases__[0].__name__, c.grpc_status, c.http_status, c.exit_code) for n, c in error_classes().items()}
    assert drawn == real


def test_grpc_codes_are_grpcs() -> None:
    assert {s.name: s.value[0] for s in grpc.StatusCode} == errors.GRPC_CODES
    for error in error_classes().values():
        assert errors.GRPC_CODES[error.grpc_status] == error("x").grpc_code


def test_an_error_survives_the_wire() -> None:
    for code in range(20):
        assert isinstance(errors.error_from_status(code, "text"), errors.BitneckError)
    assert isinstance(errors.error_from_status(15, "x"), errors.CorruptPayload)


def test_stubs_match_the_proto() -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts" / "generate_stubs.py"), "--check"], check=True)


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert files
    return files


def test_the_repository_stays_small() -> None:
    assert max(path.stat().st_size for path in tracked()) <= 10_000_000


def test_nothing_names_a_folder_of_one_machine() -> None:
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data:
            found = re.search(rb"(?<![\w.])/(?:work|root|home|Users)/\w+", data)
            assert found is None, f"{path}: {found}"


def test_documents_have_no_gaps_and_no_dead_links() -> None:
    documents = [path for path in tracked() if path.suffix == ".md"]
    assert ROOT / "README.md" in documents
    for path in documents:
        text = path.read_text()
        assert not re.findall(r"\bTO" + r"DO\b|\bTB" + r"D\b|\bFIX" + r"ME\b|@[A-Z_]+@|\?\?\?", text), path
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path}: {target}"
