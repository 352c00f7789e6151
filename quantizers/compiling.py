"""What torch.compile does with long loops of integer arithmetic: one operator, compiled inside."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .functional import exporting


def opaque(fake: Callable) -> Callable:
    """Decorator: one operator in torch.compile, which would take minutes for its many loops.

    No gradient passes. The function has an argument `compiled`, which is True in such an operator:
    it may then call the compiled form of what it repeats (see `compiled_form`). Under torch.export
    and the transforms of torch.func it is traced through instead.

    `fake` takes the same arguments, tensors without values, and returns tensors of the shapes and
    dtypes of the result.
    """

    def decorate(function: Callable) -> Callable:
        name = f"{function.__module__.replace('.', '_')}::{function.__name__}"
        operator = torch.library.custom_op(name, function, mutates_args=())
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*args, **kwargs):
            compiling = torch.compiler.is_compiling() and not exporting()
            with torch.no_grad():
                if compiling:
                    return operator(*args, **kwargs, compiled=True)
                return function(*args, **kwargs)

        return call

    return decorate


@functools.cache
def compiled_form(function: Callable) -> Callable:
    """`function` compiled for any sizes, or as it is where there is no compiler for it."""
    from torch._dynamo.exc import TorchDynamoException  # not at the top: it takes seconds

    fast = torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def call(*args):
        nonlocal fast
        try:
            return fast(*args)
        except TorchDynamoException:
            # The model around may be compiled by a backend that needs no compiler of C++.
            fast = function
            return function(*args)

    return call
