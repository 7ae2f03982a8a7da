"""What an installed fa3 is made of, and which names it must leave alone."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_kernels_is_a_link_inside_the_package():
    link = ROOT / "fa3" / "kernels"
    assert link.is_symlink() and link.resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's kernels"


def test_kernels_has_one_name(tmp_path):
    """A real package called `kernels` wins over our folder, even from the repository's root."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("get_kernel = 'theirs'\n")
    script = (
        f"import sys; sys.path.append({str(tmp_path)!r}); import kernels, fa3.kernels.signature; "
        "print(kernels.get_kernel, fa3.kernels.signature.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["theirs", "fa3.kernels.signature"]


def test_extras_for_the_drivers():
    """`python -m fa3 doctor` names the extra of each toolkit that the DSL has libraries for."""
    from fa3.launch import toolkit

    text = (ROOT / "pyproject.toml").read_text()
    extras = dict(re.findall(r'^(\w+) = (\["nvidia-cutlass-dsl.*)$', text, re.M))
    versions = {re.search(r"~=[\d.]+", line)[0] for line in extras.values()}
    assert set(extras) == {f"cu{major}" for major in toolkit.KNOWN}
    assert versions == set(re.findall(r'^    "nvidia-cutlass-dsl(~=[\d.]+)"', text, re.M))


def test_a_wheel_says_that_it_is_typed():
    assert (ROOT / "fa3" / "py.typed").is_file()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text()
