"""The rules of the house: who may import whom, errors and their statuses, public names, stubs, file sizes."""

import ast
import importlib
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import grpc
import pytest

from bitneck import errors

ROOT = Path(__file__).resolve().parent.parent
COMPONENTS = {
    "shared": "bitneck", "edge": "bitneck_edge", "cloud": "bitneck_cloud", "models": "bitneck_models",
    "testing": "bitneck_testing",
}  # fmt: skip
PACKAGES = set(COMPONENTS.values())
TORCH = {"torch", "torchvision", "timm"}
WITH_TORCH = ROOT / "testing" / "bitneck_testing" / "networks.py"
"""The one module outside models that may import torch; serving tests do without it."""
ROOMS = (
    "networks", "units", "losses", "data", "spic", "zoo", "training", "fitting", "search", "measure", "learned",
    "export", "report", "cli",
)  # fmt: skip
"""Of `bitneck_models`, in order: each imports only from itself and from those before it."""


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
    """Testing may import all of them; none of them imports testing."""
    allowed = {"bitneck", COMPONENTS[component]} if component != "testing" else PACKAGES
    for path in sources(component):
        assert imported(path) & PACKAGES <= allowed, path
        if component != "models" and path != WITH_TORCH:
            assert not imported(path) & TORCH, path


def test_tests_benchmarks_and_scripts_do_not_import_one_another() -> None:
    """What they share stands in `bitneck_testing`."""
    folders = {name: sorted((ROOT / name).rglob("*.py")) for name in ("tests", "benchmarks", "scripts")}
    theirs = {path.stem for paths in folders.values() for path in paths}
    assert {"conftest", "oracle", "serving", "demo"} <= theirs
    for folder, paths in folders.items():
        allowed = {"oracle"} if folder == "tests" else set()
        for path in paths:
            assert imported(path) & theirs <= allowed, path


def test_helpers_of_tests_are_not_in_the_wheel() -> None:
    """A development install has them on its path all the same."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    product = [f"{folder}/{package}" for folder, package in COMPONENTS.items() if folder != "testing"]
    assert build["targets"]["wheel"]["packages"] == product
    assert build["dev-mode-dirs"] == list(COMPONENTS)
    for name in ("cloud", "edge"):
        assert "testing" not in (ROOT / name / "Dockerfile").read_text()


def test_only_the_commands_load_a_component_by_its_name() -> None:
    """`bitneck.commands` is the one place in shared that knows of the others: see docs/decisions/repository.md."""
    found = [
        p.name
        for p in sources("shared")
        if re.search(r"import_module|bitneck_(edge|cloud|models)\b.*import", p.read_text())
    ]
    assert found == ["commands.py", "moved.py"]


@pytest.mark.parametrize("component", COMPONENTS)
def test_what_is_imported_is_declared(component: str) -> None:
    """In the dependencies that everyone gets, or in the component's own extras: not in another one's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    further = {
        "shared": ("heif",),
        "cloud": ("traces",),
        "edge": ("video",),
        "testing": ("edge", "cloud", "models", "dev"),
    }
    wanted = list(project["dependencies"])
    for extra in (component, *further.get(component, ())):
        wanted += project["optional-dependencies"].get(extra, [])
    declared = {re.split(r"[<>=!~; \[]", line)[0].lower().replace("-", "_") for line in wanted}
    declared |= {"starlette"} if "fastapi" in declared else set()  # fastapi is a layer of it, and hands its types out
    provided_by = importlib.metadata.packages_distributions()
    for path in sources(component):
        for name in imported(path) - PACKAGES - sys.stdlib_module_names:
            assert {d.lower().replace("-", "_") for d in provided_by[name]} & declared, (
                f"{path}: {name} is not declared"
            )


PURE = (
    *(
        f"shared/bitneck/coding/{name}.py"
        for name in (
            "arrays", "class_map", "coarse_map", "colours", "conditional_model", "context_codec", "context_model",
            "factorized_codec", "factorized_model", "range_coder", "symbols",
        )
    ),
    *(
        f"shared/bitneck/{name}.py"
        for name in (
            "backoff", "errors", "ids", "intervals", "ladder", "manifest/entries", "onnx_file/cost", "onnx_file/parse",
            "text", "wire/compression", "wire/frames", "wire/link_bytes", "wire/messages", "wire/scores",
        )
    ),
    "models/bitneck_models/zoo/selection.py",
    *(f"cloud/bitneck_cloud/answers/{name}.py" for name in ("answered", "document", "filters", "hub")),
    *(f"cloud/bitneck_cloud/answers/sinks/{name}.py" for name in ("queue/seen", "queue/tail", "routing", "topics")),
    *(f"cloud/bitneck_cloud/engine/{name}.py" for name in ("batch_time", "chain_plan", "fair_queue")),
    *(f"cloud/bitneck_cloud/fleet/{name}.py" for name in ("patterns", "records", "rules")),
    *(
        f"cloud/bitneck_cloud/sessions/{name}.py"
        for name in ("acknowledging", "answering", "session", "settled", "rates")
    ),
    *(f"cloud/bitneck_cloud/{name}.py" for name in ("faults", "access/tokens", "access/limits", "engine/tally")),
    *(
        f"edge/bitneck_edge/{name}.py"
        for name in (
            "ratecontrol", "points", "answers/verify", "doctor/finding", "link/cost", "link/packing", "link/records",
            "link/wire", "observe/buckets", "observe/state", "spool/bounds", "spool/format", "spool/pace",
        )
    ),
)  # fmt: skip
"""Modules that take values and return values."""


def test_numerics_do_no_io() -> None:
    banned = {"socket", "time", "asyncio", "grpc", "pathlib", "os", "torch", "threading"}
    for name in PURE:
        assert not imported(ROOT / name) & banned, name


def test_a_module_that_calls_itself_pure_is_held_to_it() -> None:
    for component in COMPONENTS:
        for path in sources(component):
            if re.search(r"\bPure\b", ast.get_docstring(ast.parse(path.read_text())) or ""):
                assert str(path.relative_to(ROOT)) in PURE, path


def dotted(path: Path, component: str) -> str:
    parts = path.relative_to(ROOT / component).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """Which module of ours imports which, inside functions too; imports for type checkers alone do not count."""
    paths = {dotted(path, component): path for component in COMPONENTS for path in sources(component)}
    graph: dict[str, set[str]] = {name: set() for name in paths}
    for name, path in paths.items():
        tree = ast.parse(path.read_text())
        for block in [node for node in ast.walk(tree) if isinstance(node, ast.If)]:
            if isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING":
                block.body = []
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
                graph[name] |= {target if target in paths else node.module for target in targets}
            elif isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names}
        graph[name] &= paths.keys()
    return graph


def test_no_import_runs_in_a_circle() -> None:
    """Take away modules that import nothing of what is left, until nothing can be taken away."""
    graph = import_graph()
    assert len(graph) > 100
    while free := [name for name, targets in graph.items() if not targets & graph.keys() - {name}]:
        for name in free:
            del graph[name]
    circle = {name for name in graph if any(name in targets for targets in graph.values())}
    assert not circle, sorted(circle)


@pytest.mark.parametrize("component", COMPONENTS)
def test_folders_and_modules_stay_small(component: str) -> None:
    for path in sources(component):
        if path.parent.name == "v2":  # generated
            continue
        assert len(list(path.parent.glob("*.py"))) <= 15, path.parent
        assert len(path.read_text().splitlines()) <= 400, path


def modules(component: str) -> list[str]:
    package = ROOT / component
    names = [".".join(p.relative_to(package).with_suffix("").parts) for p in sources(component)]
    return [n for n in names if ".v2" not in n and not n.endswith("__init__")]


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
        if path.parent.name == "v2" or path.name == "__init__.py":
            continue
        module = importlib.import_module(".".join(path.relative_to(ROOT / "shared").with_suffix("").parts))
        defined = {
            node.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        }
        assert defined <= set(module.__all__), path


@pytest.mark.parametrize("component", ["shared", "edge", "cloud", "testing"])
def test_serving_imports_no_torch_and_prints_nothing(component: str) -> None:
    lines = [f"import {name}" for name in modules(component) if name != "bitneck_testing.networks"]
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


def test_pillow_opens_named_formats_only() -> None:
    """Others start programs (EPS) or read further files, whatever a file's name says."""
    for component in COMPONENTS:
        for path in sources(component):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                    assert "formats" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"


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


def names_imported(path: Path) -> set[str]:
    """Modules that a file imports, also inside functions, and names that may be modules."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_rooms_of_models_import_only_from_rooms_above() -> None:
    package = ROOT / "models" / "bitneck_models"
    folders = {p.name for p in package.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert folders == set(ROOMS)
    listed = importlib.import_module("bitneck_models").__doc__ or ""
    assert tuple(re.findall(r"^    (\w+) ", listed, flags=re.M)) == ROOMS
    for path in sources("models"):
        place = path.relative_to(package).parts
        allowed = set(ROOMS[: ROOMS.index(place[0]) + 1]) if len(place) > 1 else set()
        for name in names_imported(path):
            parts = name.split(".")
            if parts[0] == "bitneck_models" and len(parts) > 1 and parts[1] in ROOMS:
                assert parts[1] in allowed, f"{path}: {name}"


def test_the_registry_of_networks_imports_none() -> None:
    code = (
        "import sys, bitneck_models.networks.registry as registry;"
        "bad = {'torch', 'torchvision', 'timm'} & set(sys.modules); assert not bad, bad;"
        "places = [*registry.BACKBONES.values(), *registry.TRAINED_HERE.values()];"
        "bad = {place.partition(':')[0] for place in places} & set(sys.modules); assert not bad, bad"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    from bitneck_models.networks import registry

    for place in (*registry.BACKBONES.values(), *registry.TRAINED_HERE.values()):
        module, _, function = place.partition(":")
        assert function in importlib.import_module(module).__all__, place


def test_prose_wraps_at_100_columns() -> None:
    """Outside tables, code, pictures and what a command writes."""
    generated = {ROOT / "docs" / "results.md", ROOT / "docs" / "settings.md"}
    for path in tracked():
        if path.suffix == ".md" and path not in generated and path.name != "commands.md":
            text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
            for line in text.splitlines():
                assert len(line) <= 100 or line.startswith(("|", "#", "!", "<!--")), f"{path}: {line}"


def test_onnx_runtime_sends_no_usage_data(tmp_path: Path) -> None:
    """It would, from version 1.29 on, outside CI: it keeps an id and a queue of events in the user's cache folder."""
    code = "import bitneck.runtime, onnxruntime, time; onnxruntime.SessionOptions(); time.sleep(1)"
    paths = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if key in os.environ}
    subprocess.run([sys.executable, "-c", code], check=True, env=paths | {"HOME": str(tmp_path)})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    for component in ("bitneck", "bitneck_edge", "bitneck_cloud", "bitneck_models"):
        code = f"import os, {component}; assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'"
        subprocess.run([sys.executable, "-c", code], check=True, env=paths | {"HOME": str(tmp_path)})
