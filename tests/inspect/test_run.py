"""The inspected kernel on the emulator; test_cli has the command line of it."""

import json
import sys
from types import SimpleNamespace

import pytest

from fa3.inspect import cli, run
from fa3.inspect.call import Call, Lengths
from fa3.kernels.bwd_config import DELTA_DEPTH

SMALL = Lengths(s_q=100, s_k=300)


@pytest.fixture
def ran(device):
    """(inspection, profile of its launch); `device` installs the emulator."""

    def run_it(*arguments: str, lengths: Lengths = SMALL):
        args = cli.arguments(["inspect", *arguments])
        inspection = cli.inspect(
            cli.signature_of(args), cli.config_of(cli.signature_of(args), args.config)
        )
        return inspection, run.run(inspection, Call.of(args), lengths)

    return run_it


def test_a_config_of_ones_own_runs_too(ran):
    inspection, launch = ran(
        "--head-dim", "64", "--causal", "--config", "tile_n=112", "num_stages=2"
    )
    assert launch.total.flops == 2 * 192 * 112 * (64 + 64) * 3  # one tile, three key blocks
    assert inspection.config.tile_n == 112


def test_one_byte_inputs_and_the_names_of_their_events(ran, tmp_path):
    inspection, launch = ran("--head-dim", "64", "--dtype", "e4m3", "--scales", "head")
    tile_m, tile_n = inspection.config.tile_m, inspection.config.tile_n
    assert launch.total.flops == 2 * tile_m * tile_n * (64 + 64 + 8) * -(-SMALL.s_k // tile_n)
    assert set(launch.counters) == {"mma", "load", "other"}
    run.write_timeline(inspection, launch, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"Q", "K", "V", "Q K\u1d40", "P V"} <= {e["name"] for e in events}
    run.write_timeline(inspection, launch, tmp_path / "cta.png")
    assert (tmp_path / "cta.png").read_bytes()[:4] == b"\x89PNG"


def test_a_picture_says_what_it_shows(monkeypatch, tmp_path):
    """The one of the command line as those of the documents."""
    seen = {}
    launch = SimpleNamespace(events=[], write_png=lambda path, **view: seen.update(view))
    args = cli.arguments(["inspect", "--head-dim", "64"])
    signature = cli.signature_of(args)
    inspection = SimpleNamespace(signature=signature, config=cli.config_of(signature, []))
    monkeypatch.setattr(run, "names_of", lambda launch, is_backward: {"a": "Q"})
    run.write_timeline(inspection, launch, tmp_path / "x.png", start=5)
    title = seen.pop("title")
    assert title.startswith("bf16, head dim 64, 3 consumer warpgroups, 192 queries x 128 keys, 4 s")
    assert title.endswith("nominal times of the emulator, not measured")
    assert seen == {"labels": {"a": "Q"}, "start": 5}


def test_progress_is_told_by_tenths_or_in_place(capsys, monkeypatch):
    for done in range(1, 101):
        run._show(done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"emulated {n} of 100 CTAs" for n in range(10, 101, 10)]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for done in (1, 2):
        run._show(done, 2)
    assert capsys.readouterr().err == "\remulated 1 of 2 CTAs\remulated 2 of 2 CTAs\n"


def test_a_call_that_needs_another_kernel_is_refused():
    causal, full = (
        cli.arguments(["inspect", "--head-dim", "64", *mask]) for mask in (["--causal"], [])
    )
    inspection = SimpleNamespace(signature=cli.signature_of(causal))
    with pytest.raises(ValueError, match="needs another kernel: Signature"):
        run.run(inspection, Call.of(full), SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seqlen-k", "0"), "--seqlen-k is 0, expected at least 1"),
        (("--timeline", "x.svg"), "--timeline x.svg: expected a name that ends in .json or .png"),
    ],
)
def test_what_cannot_be_run_is_refused(capsys, arguments, message):
    assert cli.main(["inspect", "--head-dim", "64", "--run", *arguments]) == 2
    assert capsys.readouterr() == ("", f"fa3 inspect: {message}\n")


@pytest.mark.parametrize(
    ("head_dim", "products"),
    [("64", {"S\u1d40", "dP\u1d40", "dV, dK", "dQ"}), ("256", {"S\u1d40, dP\u1d40", "dV, dK, dQ"})],
)
def test_a_backward_pass_and_the_names_of_its_events(ran, head_dim, products, tmp_path):
    lengths = Lengths(s_q=100, s_k=130)
    inspection, launch = ran("--backward", "--head-dim", head_dim, lengths=lengths)
    c, d = inspection.config, int(head_dim)
    tiles = -(-130 // c.tile_n)
    depth = (5 * d + DELTA_DEPTH * c.delta_in_parts) * tiles * -(-100 // c.tile_m)
    depth += d * tiles * c.splits_keys  # dQ of no block, ahead of a tile's first one
    assert launch.total.flops == 2 * c.tile_m * c.tile_n * depth
    assert set(run.names_of(launch, True).values()) == {
        *("Q", "K", "V", "dO", "lse, delta"),
        *products,
    }
    run.write_timeline(inspection, launch, tmp_path / "cta.png")
    assert (tmp_path / "cta.png").read_bytes()[:4] == b"\x89PNG"
