"""Whether a call may hand its tensors' memory to a kernel, past torch's dispatcher."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_TYPES = {Tensor, Parameter}
_is_compiled = torch.compiler.is_dynamo_compiling
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_num_function_modes = torch._C._len_torch_function_stack
_functorch_layer = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state
_is_profiled = torch.autograd._profiler_enabled


def is_plain(*tensors) -> bool:
    """These tensors hold what their memory says, and nobody watches what becomes of them.

    Else the call goes through its operator, where torch.compile, torch.jit.trace, functorch,
    forward AD, modes, subclasses of Tensor, lazy negation and the profiler find it. Conjugation
    needs no test: it is for complex tensors, which no operator takes.
    """
    if (
        _is_compiled()  # first: torch.compile reads no further
        or _num_dispatch_modes()
        or _num_function_modes()
        or _functorch_layer() is not None
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
        or _is_profiled()
    ):
        return False
    for x in tensors:
        if type(x) not in _TYPES or x.is_neg():
            return False
    return True
