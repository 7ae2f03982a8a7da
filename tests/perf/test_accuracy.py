"""The command that rewrites docs/accuracy.md; tests/test_fp8_accuracy.py has the numbers."""

from perf import accuracy
from perf.document import insert


def test_each_row_is_printed_before_the_next_is_computed(monkeypatch, capsys):
    monkeypatch.setenv("FA3_CPU", "")  # main() sets it: so that it is restored
    seen = []

    def rows(*length):
        for i in range(2):
            seen.append(capsys.readouterr().out)
            yield f"row {i} of {length}", "1.0"

    monkeypatch.setattr(accuracy, "main_rows", rows)
    monkeypatch.setattr(accuracy, "accumulator_rows", rows)
    assert accuracy.main(["--check"]) == 0
    seen.append(capsys.readouterr().out)
    assert f"Computed with torch {accuracy.torch.__version__}" in seen[0]
    lengths = [(n,) for n in accuracy.LENGTHS] + [()]
    for i, printed in enumerate(seen[1:]):
        assert f"| row {i % 2} of {lengths[i // 2]} | 1.0 |\n" in printed
        assert printed.count("| row") == 1
    text = "".join(seen).rstrip("\n")
    before, after = f"above\n\n{accuracy.BEGIN}\n", f"\n{accuracy.END}\nbelow\n"
    assert insert(f"{before}old{after}", text) == f"above\n\n{text}\nbelow\n"
    document = accuracy.DOCUMENT.read_text()
    titles = [line for line in text.splitlines() if line.startswith("###")]
    assert titles and all(line in document for line in titles)
