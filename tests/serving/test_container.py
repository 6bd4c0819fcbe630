"""What can be said of the container without building it."""

import ast
import json
import re
from pathlib import Path

from serving.config import PriceServiceSettings
from training.settings import parse_settings

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
ALLOWED = re.findall(r"^!(\w+)(?:/\*\.py)?$", (ROOT / ".dockerignore").read_text("utf-8"), re.MULTILINE)
"""Folders that .dockerignore lets into the image."""


def test_the_image_holds_every_package_that_its_packages_import():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert "serving" in ALLOWED
    for name in packages & set(ALLOWED):
        for path in (ROOT / name).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Import):
                    imported = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    imported = [node.module or ""]
                else:
                    continue
                needed = {module.split(".")[0] for module in imported} & packages
                assert needed <= set(ALLOWED), f"{path.relative_to(ROOT)} imports {needed - set(ALLOWED)}"


def test_the_entry_command_is_understood():
    entry = json.loads(re.search(r"^ENTRYPOINT (\[.*\])$", DOCKERFILE, re.MULTILINE)[1])
    default = json.loads(re.search(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)[1])
    assert entry[:3] == ["python", "-m", "serving.api"]
    settings = parse_settings(PriceServiceSettings, [*entry[3:], *default], description="")
    assert (settings.host, settings.port) == ("0.0.0.0", 8000)
    assert (settings.model, settings.jobs) == ("/model", Path("/jobs"))
    assert "http://127.0.0.1:8000/ready" in DOCKERFILE


def test_the_service_is_not_root():
    user = re.search(r"^USER (\w+)$", DOCKERFILE, re.MULTILINE)
    assert user
    assert user[1] not in ("root", "0")
