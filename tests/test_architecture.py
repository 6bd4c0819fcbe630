"""Rules of the repository that hold for every file: who may import whom, and what is never called."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = (
    "data", "clip_finetune", "siglip_extract", "qwen3_finetune", "fusion", "word_models", "ensemble",
    "product_matching",
)  # fmt: skip
MAY_IMPORT = {
    "contracts": set(),
    "training": {"contracts"},
    **{stage: {"contracts", "training"} for stage in STAGES},
    "pricing": {"contracts", "training", *STAGES},
    "pipeline": {"contracts", "training", "pricing", *STAGES},
    "studies": {"contracts", "training", "pricing", "pipeline", *STAGES},
}
FUSION_ORDER = (
    "blocks", "config", "int8", "loss_functions", "dataset", "evaluation", "processes", "target", "step", "loop",
    "experiment", "explanation", "commands",
)  # fmt: skip
BANNED_NAMES = {"utils", "common", "helpers", "misc"}
SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_sources_are_found():
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_stages_meet_only_through_files(path):
    package = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        top = name.split(".")[0]
        if top in MAY_IMPORT and top != package:
            assert top in MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {name}"


def test_fusion_modules_import_downwards():
    for rank, module in enumerate(FUSION_ORDER):
        for name in imports(ROOT / "fusion" / f"{module}.py"):
            if name.startswith("fusion."):
                assert name.split(".")[1] in FUSION_ORDER[:rank], f"fusion.{module} imports {name}"


def test_contracts_import_torch_only_inside_functions():
    light = {"numpy", "pandas", "contracts"}
    for path in (ROOT / "contracts").glob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                top = node.module.split(".")[0]
            elif isinstance(node, ast.Import):
                top = node.names[0].name.split(".")[0]
            else:
                continue
            assert top in light or top in __import__("sys").stdlib_module_names, f"{path.name} imports {top}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_unsafe_loading_and_no_catch_all_modules(path):
    assert path.stem not in BANNED_NAMES
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert name not in ("pickle.load", "pickle.loads", "joblib.load", "pd.read_pickle"), name
        assert settings.get("allow_pickle") != "True"
        assert settings.get("weights_only") != "False"
        if name == "torch.load":
            assert settings.get("weights_only") == "True"
        assert not (isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec")), name
