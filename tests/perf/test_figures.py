"""The pictures of docs/algorithm.md, which `python -m perf.figures` draws."""

from fa3.inspect.call import Lengths
from perf.figures import FOLDER, TIMELINES, Timeline


def test_the_document_shows_all_of_them():
    text = (FOLDER.parent / "algorithm.md").read_text()
    for timeline in TIMELINES:
        assert f"(figures/{timeline.name}.png)" in text
        assert (FOLDER / f"{timeline.name}.png").stat().st_size < 150_000
    names = {path.stem for path in FOLDER.glob("*.png")}
    assert names == {timeline.name for timeline in TIMELINES} | {"train_gpt", "ring"}


def test_a_picture_is_drawn(device, tmp_path):
    arguments = "--head-dim", "64", "--causal"
    path = Timeline("small", arguments, 500, 5000, Lengths(100, 300)).write(tmp_path)
    assert path == tmp_path / "small.png" and path.read_bytes()[:4] == b"\x89PNG"
