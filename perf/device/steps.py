"""STEPS: the rows of the table, in the order in which they run."""

from pathlib import Path

from .runner import Step


def _of(module: str, function: str):
    """A summary whose module is imported when it is needed: some of them import torch and fa3."""

    def summarise(items: list[dict], folder: Path) -> tuple[bool, str]:
        import importlib

        return getattr(importlib.import_module(f"{__package__}.{module}"), function)(items, folder)

    return summarise


def _row(  # noqa: PLR0913
    name: str, what: str, work: str, limit: float, patience: float, summary: str = "summarise"
) -> Step:
    module = work.partition(":")[0]
    return Step(name, what, f"{__package__}.{work}", limit, patience, _of(module, summary))


# By value: what is learned first where seconds count.
STEPS = (
    _row(
        "environment",
        "GPU, driver, clocks, versions",
        "environment:report",
        20,
        15,
        "summarise_report",
    ),
    _row("first", "a small case of every pass, which peers run", "first:work", 75, 60),
    _row("build", "compile every kernel", "compiling:build", 150, 90, "summarise_build"),
    _row(
        "accuracy", "cases of every pass beside fp32", "accuracy:values", 90, 30, "summarise_values"
    ),
    _row("outputs", "outputs of small cases, to commit", "outputs:work", 60, 50),
    _row("sweep", "speed beside every peer, what decides", "speed:work", 240, 60),
    _row("serving", "steps of generation beside every peer", "serving:work", 90, 45),
    _row("probe", "constants of the timing model", "probe:work", 40, 30),
    _row("tune", "candidate configs, the furthest behind first", "tune:work", 150, 60),
    _row("sanitizer", "compute-sanitizer on small cases", "sanitize:work", 240, 110),
    _row("repeat", "the same bits in 200 runs", "steady:repeat", 60, 30, "summarise_repeat"),
    _row("rest", "the rest of the sweep", "speed:rest", 300, 90, "summarise_rest"),
    _row("tests", "the tests on the GPU", "accuracy:tests", 300, 60, "summarise_tests"),
    _row(
        "ceilings",
        "matrix products and a copy",
        "environment:ceilings",
        60,
        60,
        "summarise_ceilings",
    ),
    _row(
        "quantise", "fa3.quantize_fp8 beside a copy", "speed:quantise", 60, 30, "summarise_quantise"
    ),
    _row("host", "host time per call", "speed:host_overhead", 60, 50, "summarise_host"),
    _row(
        "compile",
        "first calls with a cold and a warm cache",
        "compiling:first_calls",
        150,
        90,
        "summarise_first_calls",
    ),
    _row("memory", "memory to 1M tokens", "steady:memory", 60, 40, "summarise_memory"),
)
