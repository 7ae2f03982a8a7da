"""What can go wrong: in the kernel (KernelError), in what is emulated (Unsupported), in the set-up.

Every KernelError and Unsupported raised while a kernel runs ends with the place it
came from: CTA, warps, the kernel's Python file and line, and the PTX instruction.
"""


class EmulatorError(RuntimeError):
    """Base of everything the emulator raises on purpose."""


class SetupError(EmulatorError):
    """The emulator cannot be installed here: DSL version, C compiler, order of imports."""


class Unsupported(EmulatorError, NotImplementedError):
    """A PTX instruction, modifier or tensor-map mode that is not emulated."""


class KernelError(EmulatorError):
    """The kernel did something that is wrong on the hardware.

    `source` is "file.py:line" of the kernel's Python source, "" where the PTX has no .loc lines.
    """

    source: str = ""


class OutOfBounds(KernelError):
    """An access outside shared memory, outside every registered tensor, or, by TMA, wholly outside
    of its tensor (check "box")."""


class Misaligned(KernelError):
    """An address that is not a multiple of what the instruction requires."""


class Uninitialized(KernelError):
    """Shared memory is read, or a register used, that nothing has written (check "uninit")."""


class MissingProxyFence(KernelError):
    """Generic-proxy writes reach the async proxy unfenced (check "proxy")."""


class RegisterInFlight(KernelError):
    """A register of an unfinished wgmma is used or overwritten (check "wgmma")."""


class MissingWgmmaFence(KernelError):
    """A wgmma uses registers that no wgmma.fence hands over to it (check "fence")."""


class Race(KernelError):
    """Accesses to shared memory that nothing orders (check "race")."""


class BarrierMisuse(KernelError):
    """An mbarrier or named barrier is used against its rules."""


class Deadlock(KernelError):
    """Nothing in the cluster can move; the message lists where each warp waits."""


class Runaway(KernelError):
    """More instructions than the limit in one cluster: probably an endless loop."""
