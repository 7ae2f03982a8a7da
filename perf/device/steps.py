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


STEPS = (
    _row(
        "environment",
        "GPU, driver, clocks, versions",
        "environment:report",
        30,
        20,
        "summarise_report",
    ),
    _row(
        "ceilings",
        "matrix products, a copy, which peers run",
        "environment:ceilings",
        90,
        60,
        "summarise_ceilings",
    ),
    _row("build", "compile every kernel", "compiling:build", 240, 120, "summarise_build"),
    _row("accuracy", "the accuracy suite on the GPU", "accuracy:work", 300, 60),
    _row("sanitizer", "compute-sanitizer on small cases", "sanitize:work", 240, 110),
    _row("sweep", "speed beside every peer", "speed:work", 300, 90),
    _row(
        "quantise", "fa3.quantize_fp8 beside a copy", "speed:quantise", 60, 30, "summarise_quantise"
    ),
    _row("tune", "candidate configs, the furthest behind first", "tune:work", 300, 90),
    _row("host", "host time per call", "speed:host_overhead", 60, 50, "summarise_host"),
    _row(
        "compile",
        "first calls with a cold and a warm cache",
        "compiling:first_calls",
        150,
        90,
        "summarise_first_calls",
    ),
    _row("repeat", "the same bits in 200 runs", "steady:repeat", 60, 30, "summarise_repeat"),
    _row("memory", "memory to 1M tokens", "steady:memory", 60, 40, "summarise_memory"),
    _row("outputs", "outputs of small cases, to commit", "outputs:work", 90, 80),
)
