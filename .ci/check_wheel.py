"""Is the installed wheel whole? Run where nothing else is installed."""

import importlib
import sys
from importlib.metadata import requires, version
from importlib.resources import files

needed = [r for r in requires("warpmap") or [] if "extra ==" not in r]
assert not needed, f"the wheel needs {needed} without an extra"

for package, file in [
    ("warpmap", "py.typed"),
    ("warpmap", "models/families/house/target/model.safetensors"),
    ("warpmap", "models/families/house/LICENSE"),
    ("warpmap", "models/families/house/NOTICE"),
    ("warpmap_site", "py.typed"),
    ("warpmap_site", "theme/main.html"),
    ("warpmap_site", "theme/assets/bundle/main.js"),
]:
    assert (files(package) / file).is_file(), (
        f"the wheel lacks {package}/{file}"
    )

importlib.import_module("warpmap.hardware.performance.roofline")
assert "torch" not in sys.modules, "a pure-Python topic imports torch"

try:
    importlib.import_module("warpmap.models.attention.grouped_query_attention")
    missing = None
except ModuleNotFoundError as error:
    missing = error.name
assert missing == "torch", f"without torch, {missing} is missing"

print(f"wheel of warpmap {version('warpmap')}: whole")
