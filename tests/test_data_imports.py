"""Importing `data` loads no heavy package, so that commands that only read a recipe or its data start fast."""

import pkgutil
import subprocess
import sys

import data


def test_importing_data_loads_no_heavy_package(root):
    modules = [m.name for m in pkgutil.walk_packages(data.__path__, "data.")]
    assert "data.encode" in modules and "data.load" in modules
    heavy = ("torch", "transformers", "tokenizers", "datasets", "pyarrow", "numpy", "jinja2")
    code = f"import sys, {', '.join(modules)}; print([h for h in {heavy!r} if h in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
