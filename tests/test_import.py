"""What `import fa3` does and does not do."""

import json
import re
import subprocess
import sys
from pathlib import Path

import fa3

ROOT = Path(__file__).parent.parent


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


FACTS = """
import importlib.util, json, sys, fa3, torch
torch.ops.fa3.forward
loaded = [m for m in ("cutlass", "fa3.emulator", "tvm_ffi") if m in sys.modules]
spec = importlib.util.find_spec("kernels")
is_theirs = spec is None or spec.origin is None or "site-packages" in spec.origin
installed = fa3.emulator.installed()
print(json.dumps([loaded, is_theirs, installed, "cutlass" in sys.modules]))
"""


def test_import_brings_neither_dsl_nor_emulator():
    """And the emulator, an attribute, does not bring the DSL.

    fa3's folder of kernels must not answer to the name of Hugging Face's package.
    """
    loaded, kernels_are_theirs, installed, has_dsl = json.loads(_python(FACTS))
    assert loaded == []
    assert kernels_are_theirs
    assert not installed
    assert not has_dsl


def test_device_code_does_not_import_torch():
    loaded = _python(
        "import importlib.util, sys, types;"
        "sys.modules['fa3'] = types.ModuleType('fa3'); sys.modules['fa3'].__path__ = ['fa3'];"
        "import fa3.kernels.signature, fa3.kernels.config;"
        "print([m for m in ('torch', 'cutlass') if m in sys.modules])"
    )
    assert loaded == "[]"


def test_version_is_that_of_the_project():
    text = (ROOT / "pyproject.toml").read_text()
    assert fa3.__version__ == re.search(r'^version = "(.+)"$', text, re.M).group(1)
