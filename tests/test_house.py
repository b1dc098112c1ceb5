"""Enforce the house rules on the ASTs: imports, the method's size, bans.

Every rule is also tested on an example that breaks it.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(ROOT.glob("*.py"))
PACKAGE = sorted(ROOT.glob("rftt/**/*.py"))
TOOLS = sorted(ROOT.glob("tools/*.py"))
SOURCES = [*PACKAGE, *SCRIPTS, *TOOLS]
CODE = [*SOURCES, *sorted(ROOT.glob("tests/**/*.py")), *sorted(ROOT.glob("bench/**/*.py"))]
TEXTS = [
    *CODE,
    *(path for pattern in ("*.md", "docs/*.md", "*.txt", "*.toml") for path in ROOT.glob(pattern)),
    *(path for pattern in ("configs/**/*.yaml", "runs/*.sh") for path in ROOT.glob(pattern)),
    *(ROOT / name for name in ("Makefile", ".ci/run", ".github/workflows/ci.yml")),
]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), name_of(path))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported, the names taken from a module included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name of what is called, the call)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def inside(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


# ---- Imports go one way: rooms <- rooms above <- scripts <- tools ----

LAYERS = (
    ("types", "tokens", "prompts", "run.files"),
    ("mcts", "rl", "batch", "run.contract", "graders", "engines"),
    ("prompted", "curate", "rollout", "beam", "rewards", "update", "learner", "run"),
)
"""Rooms of rftt/, each of which may import its own layer and those before; the longest name counts.
run.files knows nothing but types.py: what is on disk may be read and written from anywhere."""
SEARCH = ("mcts", "prompted", "curate", "rollout", "beam")
LEARNER = ("rl", "batch", "update", "learner")
"""Neither of these two imports the other; scripts tie them."""


def module_of(path: Path) -> str:
    """`rftt/run/data.py` is run.data, `rftt/engines/__init__.py` is engines."""
    parts = path.relative_to(ROOT / "rftt").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NOT_ON_IMPORT = ("TYPE_CHECKING", "__name__ == '__main__'")


def on_import(tree: ast.Module) -> ast.Module:
    """`tree` without what importing it never executes: names for annotations, a command line."""
    silent = [
        n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) in NOT_ON_IMPORT
    ]
    return ast.Module([node for node in tree.body if node not in silent], [])


def layer_of(module: str) -> int:
    rooms = {room: i for i, layer in enumerate(LAYERS) for room in layer if inside(module, room)}
    assert rooms, f"rftt.{module} is in no room of the layer table"
    return rooms[max(rooms, key=len)]


def wrong_imports(module: str, tree: ast.Module) -> list[str]:
    found = []
    for name in imports(on_import(tree)):
        if inside(name, "tools", *(path.stem for path in SCRIPTS)):
            found.append(name)
        elif inside(name, "rftt"):
            room = name.removeprefix("rftt.")
            upwards = layer_of(room) > layer_of(module)
            one, other = inside(module, *SEARCH), inside(module, *LEARNER)
            across = (one and inside(room, *LEARNER)) or (other and inside(room, *SEARCH))
            found += [name] if upwards or across else []
    return [f"{module} imports {name}" for name in found]


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    if module := module_of(path):
        assert wrong_imports(module, tree_of(path)) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("curate", "from rftt.rl import gae"),
        ("batch", "from rftt import mcts"),
        ("learner.fsdp", "from rftt.rollout import sample"),
        ("mcts", "import rftt.run.data"),
        ("engines.hf", "from tools import tiny_world"),
        ("run.log", "from train_rl import train"),
        ("graders.prm", "from rftt.rewards import reward"),
        ("run.files", "from rftt.engines.chat import decode"),
    ],
)
def test_a_wrong_import_is_found(module: str, line: str) -> None:
    assert wrong_imports(module, ast.parse(line))


def circle(imported: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, in order; [] where none do."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module not in done:
            for other in sorted(imported.get(module, ())):
                if found := visit(other, [*path, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(imported) if (found := visit(module, []))), [])


def test_no_modules_import_one_another_in_a_circle() -> None:
    modules = {f"rftt.{module_of(path)}": path for path in PACKAGE}
    imported = {}
    for name, path in modules.items():
        found = set(imports(on_import(tree_of(path))))
        known = {max((m for m in modules if inside(f, m)), key=len, default="") for f in found}
        imported[name] = known - {"", "rftt."}
    assert circle(imported) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], ids=name_of)
def test_tools_are_imported_by_nobody(path: Path) -> None:
    assert [name for name in imports(tree_of(path)) if inside(name, "tools")] == []


ONLY_IN: dict[str, tuple[str, ...]] = {
    "vllm": ("rftt/engines/vllm.py",),
    "torch.distributed": ("rftt/learner/fsdp.py", "rftt/learner/checkpoint.py"),
    "peft": ("rftt/learner/lora.py",),
    "bitsandbytes": (),
    "torchao": ("rftt/learner/optim.py",),
    "datasets": ("rftt/run/tables.py",),
    "pyarrow": ("rftt/run/tables.py",),
    "openai": ("rftt/engines/openai.py",),
    "fastapi": ("tools/prm_serve.py",),
    "starlette": ("tools/prm_serve.py",),
    "uvicorn": ("tools/prm_serve.py",),
    "wandb": ("rftt/run/log.py",),
    "trackio": ("rftt/run/log.py",),
    "torch.utils.tensorboard": ("rftt/run/log.py",),
}
"""What only these files may know."""


def knows(tree: ast.AST, package: str) -> bool:
    attributes = (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return any(inside(name, package) for name in (*imports(tree), *attributes))


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_is_known_only_where_it_may_be(package: str) -> None:
    knowing = {name_of(path) for path in SOURCES if knows(tree_of(path), package)}
    assert knowing <= set(ONLY_IN[package])
    assert knows(ast.parse(f"import {package}"), package)
    assert knows(ast.parse(f"from {package} import x"), package)


def test_an_attribute_counts_as_knowing() -> None:
    assert knows(ast.parse("import torch\ntorch.distributed.get_rank()"), "torch.distributed")
    assert not knows(ast.parse("import torch\ntorch.distribution(1)"), "torch.distributed")


HEAVY = "sorted({'torch', 'transformers', 'vllm'} & set(sys.modules))"


def test_torch_free_modules_stay_torch_free() -> None:
    free = [
        "types",
        "tokens",
        "prompts",
        "mcts",
        "prompted",
        "curate",
        "rollout",
        "rewards",
        "beam",
    ]
    heavy = ("precision", "training")
    run = [path for path in ROOT.glob("rftt/run/*.py") if path.stem not in heavy]
    free += ["graders.math", *map(module_of, run)]
    lines = ["import sys", *(f"import rftt.{module}" for module in free), f"print({HEAVY})"]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
@pytest.mark.parametrize("argument", ["--help", "sede=1"])
def test_help_and_config_errors_come_before_torch(path: Path, argument: str) -> None:
    """A script's front answers them: `runpy` runs it as the command line does."""
    code = f"""
import runpy, sys
sys.argv = ["{path.name}", "{argument}"]
try:
    runpy.run_path("{path}", run_name="__main__")
except SystemExit as stopped:
    sys.stderr.write(f"{{stopped.code}} {{{HEAVY}}}")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.endswith({"--help": "0 []", "sede=1": "2 []"}[argument]), done.stderr


# ---- The method is read in one sitting ----

METHOD = (
    *("types", "tokens", "prompts", "mcts", "prompted", "curate"),
    *("rollout", "rewards", "rl", "batch", "update", "beam"),
)
"""The flat files of rftt/, in reading order."""
BUDGET = 2_700
"""Most physical lines of these and the three scripts that use them."""


def test_the_method_is_read_in_one_sitting() -> None:
    assert {path.stem for path in ROOT.glob("rftt/*.py")} == {*METHOD, "__init__"}
    names = [f"rftt/{name}.py" for name in METHOD] + ["search.py", "train_sft.py", "train_rl.py"]
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in names}
    assert sum(lines.values()) <= BUDGET, f"{sum(lines.values())} lines of method: {lines}"


# ---- Bans in rftt/, the scripts and the tools ----


def banned_calls(*names: str) -> Callable[[ast.Module], bool]:
    return lambda tree: any(name in names for name, _ in calls(tree))


def banned_imports(*names: str) -> Callable[[ast.Module], bool]:
    return lambda tree: any(inside(name, *names) for name in imports(tree))


def has_keyword(call: ast.Call, name: str, value: object) -> bool:
    return any(
        word.arg == name and isinstance(word.value, ast.Constant) and word.value.value is value
        for word in call.keywords
    )


def unsafe_load(tree: ast.Module) -> bool:
    loads = [call for name, call in calls(tree) if name == "torch.load"]
    return any(not has_keyword(call, "weights_only", True) for call in loads)


def keyword_true(name: str) -> Callable[[ast.Module], bool]:
    return lambda tree: any(has_keyword(call, name, True) for _, call in calls(tree))


def blind_except(tree: ast.Module) -> bool:
    """Catching everything is allowed only to clean up and raise again."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            names = ast.walk(node.type) if node.type else iter([ast.Name("Exception")])
            caught = {name.id for name in names if isinstance(name, ast.Name)}
            last = node.body[-1]
            raised = isinstance(last, ast.Raise) and last.exc is None
            if caught & {"Exception", "BaseException"} and not raised:
                return True
    return False


def has_node(kind: type[ast.AST]) -> Callable[[ast.Module], bool]:
    return lambda tree: any(isinstance(node, kind) for node in ast.walk(tree))


def silent_assert(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.Assert) and node.msg is None for node in ast.walk(tree))


PARENTS = {
    "nn.Module",
    "torch.optim.Optimizer",
    "Protocol",
    "Exception",
    "torch.autograd.Function",
    "NamedTuple",
    "httpx2.AsyncBaseTransport",
}


def other_parent(tree: ast.Module) -> bool:
    allowed = set(PARENTS)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            parents = [ast.unparse(base) for base in node.bases]
            if not set(parents) <= allowed:
                return True
            allowed |= {node.name} if "Exception" in parents else set()
    return False


def passes_kwargs_on(tree: ast.Module) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.args.kwarg:
            passed = [
                word.value
                for name, call in calls(node)
                for word in call.keywords
                if word.arg is None and name != "dataclasses.replace"
            ]
            if any(ast.unparse(value) == node.args.kwarg.arg for value in passed):
                return True
    return False


def no_module_docstring(tree: ast.Module) -> bool:
    return bool(tree.body) and ast.get_docstring(tree) is None


SCRIPT_NAMES = tuple(name_of(path) for path in SCRIPTS)
BANS: dict[str, tuple[Callable[[ast.Module], bool], str, tuple[str, ...]]] = {
    "pickle": (banned_imports("pickle", "cloudpickle", "dill", "shelve"), "import pickle", ()),
    "debugger": (banned_imports("pdb", "ipdb"), "import pdb", ()),
    "unsafe torch.load": (unsafe_load, "torch.load(path, weights_only=False)", ()),
    "unsafe YAML": (banned_calls("yaml.load", "yaml.unsafe_load"), "yaml.load(text)", ()),
    "eval": (banned_calls("eval", "exec", "breakpoint", "os.system"), "eval('1')", ()),
    "shell": (keyword_true("shell"), "subprocess.run('ls', shell=True)", ()),
    "remote code": (keyword_true("trust_remote_code"), "load(p, trust_remote_code=True)", ()),
    "hasattr": (banned_calls("hasattr"), "hasattr(model, 'score')", ()),
    "sleep": (banned_calls("time.sleep", "sleep"), "time.sleep(1)", ()),
    "print": (banned_calls("print"), "print('hello')", ("rftt/run/log.py", *SCRIPT_NAMES)),
    "bare except": (blind_except, "try:\n    f()\nexcept:\n    pass", ()),
    "blind except": (blind_except, "try:\n    f()\nexcept (KeyError, Exception):\n    x = 0.2", ()),
    "global": (has_node(ast.Global), "def f():\n    global n\n    n = 1", ()),
    "assert without a text": (silent_assert, "assert x > 0", ()),
    "inheritance": (other_parent, "class A(B): pass", ("rftt/run/config.py", "rftt/prompts.py")),
    "**kwargs passed on": (passes_kwargs_on, "def f(**kw):\n    return g(**kw)", ()),
    "no module docstring": (no_module_docstring, "x = 1", ()),
}
"""Rule -> (finder, what it must find, files it does not hold for)."""


@pytest.mark.parametrize("rule", BANS)
def test_nothing_banned(rule: str) -> None:
    finder, bad, exempt = BANS[rule]
    assert finder(ast.parse(bad)), "the finder finds nothing"
    found = [name_of(p) for p in SOURCES if name_of(p) not in exempt and finder(tree_of(p))]
    assert found == []


@pytest.mark.parametrize(
    ("rule", "good"),
    [
        ("unsafe torch.load", "torch.load(path, weights_only=True)"),
        ("eval", "model.eval()"),
        ("bare except", "try:\n    f()\nexcept BaseException:\n    close()\n    raise"),
        ("blind except", "try:\n    f()\nexcept ValueError:\n    pass"),
        ("inheritance", "class A(nn.Module): pass"),
        ("**kwargs passed on", "def f(**shown):\n    return g(shown, **{'a': 1})"),
        ("remote code", "load(path, trust_remote_code=config.trust_remote_code)"),
    ],
)
def test_what_is_allowed_is_not_banned(rule: str, good: str) -> None:
    assert not BANS[rule][0](ast.parse(good))


# ---- Bans in every text of the repository ----

TEXT_BANS = {
    "machine path": (r"(?<![\w.$}])/(?:home|root|Users|work|mnt|data\d*)/\w", "/root" + "/x"),
    "package registry": (r"pypi\.org|pythonhosted|download\.pytorch|index-url", "pypi" + ".org"),
    "citation of a file that is not here": (r"PAPER §", "PAPER" + " §1"),
    "unfinished": (r"\b(?:TODO|FIXME|XXX)\b", "TO" + "DO"),
}


@pytest.mark.parametrize("rule", TEXT_BANS)
def test_no_text_holds(rule: str) -> None:
    pattern, bad = TEXT_BANS[rule]
    assert re.search(pattern, bad)
    texts = [path for path in TEXTS if path.exists() and path != Path(__file__)]
    assert [name_of(p) for p in texts if re.search(pattern, p.read_text(encoding="utf-8"))] == []


def ruff(arguments: list[str], text: str | None = None) -> str:
    command = [sys.executable, "-m", "ruff", "check", "--select", "ERA,T10,BLE,S113", *arguments]
    return subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True).stdout


def test_no_code_is_commented_out() -> None:
    assert "ERA001" in ruff(["--stdin-filename", "x.py", "-"], "x = 1\n# y = f(x)\n")
    assert ruff(["--quiet", *map(str, CODE)]) == ""


# ---- Documents name code that exists ----

REFERENCE = re.compile(r"\b((?:[\w-]+/)*[\w-]+\.py):([A-Za-z_]\w*)")


def dead_references(text: str) -> list[str]:
    """`file.py:name` in `text` where the file, or that function or class in it, does not exist."""
    dead = []
    for file, name in REFERENCE.findall(text):
        path = next((p for p in (ROOT / file, ROOT / "rftt" / file) if p.is_file()), None)
        known = {getattr(node, "name", None) for node in ast.walk(tree_of(path))} if path else set()
        dead += [] if name in known else [f"{file}:{name}"]
    return dead


def test_documents_name_code_that_exists() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    dead = {name_of(path): dead_references(path.read_text(encoding="utf-8")) for path in documents}
    assert {name: found for name, found in dead.items() if found} == {}
    assert dead_references("`types.py:Rollout` and rftt/types.py:seed_for") == []
    assert dead_references("types.py:Nothing, none.py:f") == ["types.py:Nothing", "none.py:f"]


def without_marker(text: str, marker: str) -> list[str]:
    """`tests/file.py:test_name` in `text` where that test, or its file, lacks the marker."""
    found = []
    for file, name in re.findall(r"(tests/\w+\.py):(test_\w+)", text):
        tree = tree_of(ROOT / file)
        marks = [
            ast.unparse(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        ]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                marks += map(ast.unparse, node.decorator_list)
        if not any(re.search(rf"\bpytest\.mark\.{marker}\b", mark) for mark in marks):
            found.append(f"{file}:{name}")
    return found


def test_the_tests_of_the_cases_have_their_marker() -> None:
    text = (ROOT / "docs/cases.md").read_text(encoding="utf-8")
    assert without_marker(text, "cases") == []
    unmarked = "tests/test_house.py:test_imports_go_one_way"
    assert without_marker(f"`{unmarked}`", "cases") == [unmarked]
    assert without_marker("tests/test_cases_text.py:test_foreign_text_is_read", "cases") == []


def logged_keys(tree: ast.AST) -> set[str]:
    """Keys of dict literals that become metrics: `metrics |= {…}`, `totals.add({…})`, `lap("…")`,
    `metrics["…"] = x`, and all in functions that return Metrics or are named *_metrics."""
    keys: set[str] = set()
    sources: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            returns = ast.unparse(node.returns) if node.returns else ""
            sources += [node] if "Metrics" in returns or node.name.endswith("_metrics") else []
        elif isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            keys |= set(re.findall(r"^metrics\['([^']+)'\]$", ast.unparse(targets[0])))
            sources += [node.value] if ast.unparse(targets[0]) == "metrics" else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".add", ".lap")):
            keys |= {
                str(x.value)
                for x in node.args
                if isinstance(x, ast.Constant) and str(x.value).endswith("_seconds")
            }
            sources += node.args
    dicts = [node for source in sources for node in ast.walk(source) if isinstance(node, ast.Dict)]
    return keys | {
        key.value
        for node in dicts
        for key in node.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }


def test_documented_metrics_are_the_logged_ones() -> None:
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)) - {
        "acts/<act>",
        "rewards/<function>",
    }
    rooms = ("rl", "update", "rewards", "run/stats", "learner/offline", "learner/model")
    names = ("train_rl.py", "train_sft.py", *(f"rftt/{room}.py" for room in rooms))
    logged = set().union(*(logged_keys(tree_of(ROOT / name)) for name in names))
    assert documented == logged
    code = "metrics |= {'a': 1} | clock.lap('b_seconds')\nmetrics['c/d'] = 1\ntotals.add({'e': 2})"
    assert logged_keys(ast.parse(code)) == {"a", "b_seconds", "c/d", "e"}


# ---- Pins ----

LOCKED = re.compile(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}")


def pins(name: str) -> dict[str, str]:
    """Package -> version in a requirements file and in those that it includes."""
    found: dict[str, str] = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            found |= pins(line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            package, _, version = line.partition("==")
            found[canonicalize_name(package)] = version
    return found


def requirements_of(packages: set[str]) -> set[str]:
    """Names of all installed packages that `packages` require, with their own requirements."""
    found, left = set[str](), {(package, "") for package in packages}
    done = set[tuple[str, str]]()
    while left - done:
        package, extra = (left - done).pop()
        done.add((package, extra))
        for text in requires(package) or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                name = canonicalize_name(needed.name)
                found.add(name)
                left |= {(name, ""), *((name, one) for one in needed.extras)}
    return found


@pytest.mark.cases
def test_the_lock_has_a_hash_for_every_package_but_those_of_torch() -> None:
    """`make env LOCKED=1` installs these lines alone, so that none may be missing."""
    _, *lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    matches = [LOCKED.fullmatch(line) for line in lines]
    assert all(matches)
    locked = dict(match.groups() for match in matches if match)
    pinned = pins("requirements.txt") | pins("requirements-dev.txt")
    assert {name: locked.get(name) for name in pinned} == pinned | {"torch": None}
    needed = {*pinned, *requirements_of(set(pinned))}
    of_torch = {name for name in needed if re.match("torch$|triton$|nvidia-|cuda-", name)}
    assert set(locked) == needed - of_torch
