"""The emulator patches the DSL of its process: where the run uses a GPU, its tests stay out."""

import pytest

from ..conftest import HOPPER


@pytest.fixture(scope="session")
def emulator():
    """The installed emulator."""
    if HOPPER:
        pytest.skip("this run is on a GPU; the emulator would patch the DSL under its kernels")
    from fa3 import emulator

    emulator.install()
    emulator.configure(processes=1)  # as in the device fixture
    return emulator


@pytest.fixture(scope="session")
def compiled(emulator):
    """(function or its name in kernels.py, example tensors, **constants) -> function of tensors,
    compiled once."""
    import cutlass.cute as cute
    from cutlass.cute.runtime import from_dlpack, make_fake_stream

    from . import kernels

    cache = {}

    def get(function, *tensors, **constants):
        if isinstance(function, str):
            function = getattr(kernels, function)
        key = (
            function,
            tuple((t.dtype, t.shape, t.stride()) for t in tensors),
            tuple(constants.items()),
        )
        if key not in cache:
            stream = make_fake_stream(use_tvm_ffi_env_stream=True)
            examples = [from_dlpack(t, enable_tvm_ffi=True, assumed_align=16) for t in tensors]
            extra = [constants.pop("scalar")] if "scalar" in constants else []
            cache[key] = cute.compile(
                function,
                *examples,
                *extra,
                stream,
                **constants,
                options="--enable-tvm-ffi",
            )
        return cache[key]

    return get


@pytest.fixture
def unchecked(emulator):
    """Run without checks, whatever the session's default is."""
    with emulator.options(checks=()):
        yield emulator
