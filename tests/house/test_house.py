"""The house rules that a machine can check: layout, packaging, imports, public names, the size of the code."""

from __future__ import annotations

import ast
import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fedkit
import fedkit.errors
from fedkit import logs

ROOT = Path(__file__).parents[2]
FOLDERS = ("fedkit", "server", "client", "strategies", "protos")


def sources() -> list[Path]:
    found = []
    for folder in FOLDERS:
        for here, folders, files in os.walk(ROOT / folder, followlinks=False):
            folders[:] = [name for name in folders if not (Path(here) / name).is_symlink()]
            found += [Path(here) / name for name in files if name.endswith(".py") and not name.endswith("_pb2.py")]
    return sorted(found)


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_the_four_parts_are_linked_into_the_package() -> None:
    for name in FOLDERS[1:]:
        link = ROOT / "fedkit" / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"
        assert link.is_dir()


def test_nine_bodies_in_ten_fit_in_twenty_lines_and_none_is_long() -> None:
    lengths = {
        f"{path.relative_to(ROOT)}:{node.name}": body_lines(node)
        for path in sources()
        for node in functions(ast.parse(path.read_text()))
    }
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= 20
    assert sum(length > 30 for length in lengths.values()) <= 0.03 * len(lengths)
    assert max(lengths.values()) <= 60, max(lengths, key=lengths.get)


EDGES = {
    "fedkit/trainer/client.py": 1,
    "fedkit/simulation/workers.py": 1,
    "fedkit/deploy/convert.py": 1,
    "fedkit/deploy/quantize.py": 1,
    "fedkit/codec.py": 1,
    "fedkit/tracking/teller.py": 1,
    "server/runs.py": 1,
    "client/worker.py": 1,
}


def test_broad_excepts_stand_only_at_the_named_edges() -> None:
    found: dict[str, int] = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
            ):
                name = str(path.relative_to(ROOT))
                found[name] = found.get(name, 0) + 1
    assert found == EDGES


def test_only_the_command_line_prints() -> None:
    printing = [
        str(path.relative_to(ROOT))
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert set(printing) <= {"fedkit/cli/show.py"}


def test_every_event_that_an_audit_log_keeps_is_one_that_happens() -> None:
    texts = [path.read_text() for folder in ("server", "client") for path in (ROOT / folder).glob("*.py")]
    said = set(re.findall(r'log\.\w+\(\s*"([^"]+)"', "\n".join(texts)))
    assert said >= logs._AUDITED, f"nobody says {sorted(logs._AUDITED - said)}"


def test_each_module_says_what_it_offers_and_offers_only_what_it_has() -> None:
    for path in sources():
        tree = ast.parse(path.read_text())
        names = [
            n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"
        ]
        if not names:
            assert path.name == "__init__.py", f"{path} has no __all__"
            continue
        offered = ast.literal_eval(names[0])
        public = {n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)}
        missing = {name for name in public if not name.startswith("_")} - set(offered)
        assert not missing or path.parts[-2] == "cli", f"{path}: {missing}"


def test_public_names_are_documented_and_annotated() -> None:
    for path in sources():
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or not tree.body, f"{path} has no docstring"
        for node in functions(tree):
            if not node.name.startswith("_"):
                assert node.returns is not None, f"{path}:{node.name} has no return annotation"


def test_every_public_name_of_the_package_is_there() -> None:
    assert sorted(fedkit.__all__) == fedkit.__all__
    assert all(hasattr(fedkit, name) for name in fedkit.__all__)


def test_the_error_tree_in_the_docstring_is_the_real_one() -> None:
    drawn = re.findall(r"^[│ ]*[├└]── (\w+)", fedkit.errors.__doc__, re.MULTILINE)
    classes = [
        value
        for value in vars(fedkit.errors).values()
        if isinstance(value, type) and issubclass(value, fedkit.FedkitError)
    ]
    assert sorted([*drawn, "FedkitError"]) == sorted(kind.__name__ for kind in classes)
    depth = {
        name: len(prefix) // 4
        for prefix, name in re.findall(r"^([│ ]*)[├└]── (\w+)", fedkit.errors.__doc__, re.MULTILINE)
    }
    for kind in classes:
        if kind is not fedkit.FedkitError:
            assert depth[kind.__name__] == len([base for base in kind.__mro__ if base in classes]) - 2


def test_importing_fedkit_loads_nothing_heavy() -> None:
    code = "import sys, fedkit, fedkit.strategies; print(*{name.partition('.')[0] for name in sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(found.stdout.split())
    heavy = {
        "grpc",
        "opacus",
        "tenseal",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "flwr",
        "ray",
        "torchmetrics",
        "matplotlib",
        "loky",
        "mlflow",
        "tensorboard",
    }
    assert not loaded & heavy


def test_no_file_of_the_repository_names_a_machine_or_a_registry() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = re.compile("|".join(["pypi" + r"\.org", "python" + "hosted", r"(?<![\w.])/(?:wo" + "rk|ro" + "ot)/"]))
    for name in listed.stdout.split("\n"):
        path = ROOT / name
        if path.is_file() and not path.is_symlink() and path.suffix in {".py", ".md", ".toml", ".txt", ".json", ""}:
            assert not names.search(path.read_text(errors="ignore")), name


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--sdist",
        "--outdir",
        str(folder),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


def test_the_wheel_holds_exactly_the_package(built: dict[str, Path]) -> None:
    names = {name for name in zipfile.ZipFile(built["wheel"]).namelist() if ".dist-info/" not in name}
    expected = set()
    for folder in FOLDERS:
        for here, folders, files in os.walk(ROOT / folder, followlinks=False):
            folders[:] = [name for name in folders if name != "__pycache__" and not (Path(here) / name).is_symlink()]
            inside = Path(here).relative_to(ROOT)
            target = inside if folder == "fedkit" else Path("fedkit") / inside
            expected |= {str(target / name) for name in files if not name.endswith(".pyc")}
    assert names == expected
    assert {"fedkit/server/__init__.py", "fedkit/demo/data/split.json", "fedkit/py.typed"} <= names


def test_the_sdist_holds_what_is_needed_to_test_it(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "README.md",
        "SECURITY.md",
        "LICENSE",
        "Makefile",
        "constraints.txt",
        "tests/conftest.py",
        "strategies/averaging.py",
    } <= names
    assert {"examples/heart/main.py", "docs/quickstart.md", "bench/figures.py", "fedkit/demo/data/split.json"} <= names


@pytest.fixture(scope="module")
def site(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*install, str(built["wheel"])], check=True, capture_output=True)
    return folder


def test_the_installed_wheel_passes_the_unit_tests(site: Path, tmp_path: Path) -> None:
    modules = [
        str(ROOT / "tests" / "unit" / f"test_{name}.py") for name in ("weights", "codec", "config", "rng", "task")
    ]
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-cov", "-p", "no:xdist"]
    options = ["--rootdir", str(tmp_path), "-c", str(ROOT / "pyproject.toml"), *modules]
    code = "import fedkit; print(fedkit.__file__)"
    where = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert where.stdout.startswith(str(site))
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_the_installed_wheel_runs_the_demo_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    here = tmp_path / "empty"
    here.mkdir()
    code = (
        "import fedkit, sys; assert fedkit.__file__.startswith(sys.argv[1]), fedkit.__file__; "
        "from fedkit.cli import app; app(['demo', '--strategy', 'FedAvg', '--json'])"
    )
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)], capture_output=True, text=True, cwd=here, env=environment
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert {row["name"] for row in facts["accuracy"]} == {"Each hospital alone", "All rows pooled", "FedAvg"}
    assert sorted(path.name for path in (here / "fedkit-demo").iterdir()) == [
        "bundle",
        "curves.png",
        "federation",
        "run",
        "signer",
    ]
