"""GPUs of compute capability 8.x, for tests."""

from fa3.launch import dispatch

LARGE, SMALL = (8, 0), (8, 9)  # shared memory: 164 and 100 KiB
ARCH = {LARGE: "sm_80", SMALL: "sm_89"}


def target_of(capability) -> dispatch.Target:
    name = f"emulated {ARCH[capability]}"
    return dispatch.Target("emulator", name, capability, dispatch.EMULATED_SMS, ARCH[capability])
