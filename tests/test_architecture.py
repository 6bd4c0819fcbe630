"""Rules of the repository that hold for every file: who may import whom, and what is never called."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = (
    "data", "clip_finetune", "siglip_extract", "qwen3_finetune", "fusion", "word_models", "ensemble",
    "product_matching", "attributes",
)  # fmt: skip
MAY_IMPORT = {
    "contracts": set(),
    "training": {"contracts"},
    **{stage: {"contracts", "training"} for stage in STAGES},
    "pricing": {"contracts", "training", *STAGES},
    "pipeline": {"contracts", "training", "pricing", *STAGES},
    "serving": {"contracts", "training", "pricing", *STAGES},
    "studies": {"contracts", "training", "pricing", "pipeline", "serving", "text_tabular", *STAGES},
}
# what every service stands on; the service of a stage imports these, so they import no stage
SERVING_BASE = (
    "app",
    "batching",
    "config",
    "deadlines",
    "headers",
    "limits",
    "matches",
    "metrics",
    "schemas",
)
# the designs that join a text and a table have one implementation, and fusion has it
MAY_IMPORT["text_tabular"] = {"contracts", "training", "fusion"}
MAY_IMPORT["product_matching"] = MAY_IMPORT["product_matching"] | {"serving"}
FUSION_ORDER = (
    "blocks", "config", "loss_functions", "tabular", "target", "seeds", "dataset", "processes", "step", "loop",
    "evaluation", "int8", "finished", "explanation", "fitting", "experiment", "commands",
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


def test_the_base_of_the_services_imports_no_stage():
    for module in SERVING_BASE:
        for name in imports(ROOT / "serving" / f"{module}.py"):
            top, *below = name.split(".")
            assert top not in (*STAGES, "pricing"), f"serving.{module} imports {name}"
            assert top != "serving" or below[0] in SERVING_BASE, f"serving.{module} imports {name}"


def test_the_matching_service_stands_on_the_base_only():
    for path in (ROOT / "product_matching").glob("*.py"):
        for name in imports(path):
            assert not name.startswith("serving.") or name.split(".")[1] in SERVING_BASE, (
                f"{path.name} imports {name}"
            )


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
