"""What the tests change in Triton's interpreter: it rounds as compiled code does, and does nothing in vain."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


@contextmanager
def faithful_and_quick() -> Iterator[None]:
    """It rounds to bfloat16, where it would truncate. Work that takes most of its time to no effect is left out.

    A function that a kernel calls replaces all of the language's builtins, though the kernel has replaced them already.
    Sums and products of integers are computed again in 64 bits, for an assertion that is off. Each look at a type makes
    a table of all types, and each tile wraps and checks its shape anew.
    """
    convert, patch = interpreter._convert_float, interpreter._patch_lang
    builder, look_up, known = interpreter.interpreter_builder, interpreter._get_np_dtype, {}

    def rounded(values, source, target, mode):
        if target.name != "bf16":
            return convert(values, source, target, mode)
        return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()

    def patched_once(function):
        languages = [v for v in function.__globals__.values() if v is tl or v is tl.core]
        fresh = any(tl.core.is_builtin(language.load) for language in languages)
        return patch(function) if fresh else interpreter._LangPatchScope()

    def looked_up(kind):
        scalar = kind.scalar
        if scalar.name not in known:
            known[scalar.name] = look_up(scalar)
        return known[scalar.name]

    block_type, tensor, broadcast = tl.block_type.__init__, tl.tensor.__init__, TritonSemantic.broadcast_impl_value
    of_types, of_tensors = {}, {}

    def typed_once(self, element_type, shape):
        key = element_type.name, *(v.value if isinstance(v, tl.constexpr) else v for v in shape)
        if key not in of_types:
            block_type(self, element_type, shape)
            of_types[key] = vars(self).copy()
        vars(self).update(of_types[key], element_ty=element_type)

    def shaped_once(self, handle, kind):
        if kind.name not in of_tensors:
            tensor(self, handle, kind)
            of_tensors[kind.name] = vars(self).copy()
        vars(self).update(of_tensors[kind.name], handle=handle, type=kind, dtype=kind.scalar)

    def broadcast_where_needed(self, a, b):
        equal = a.type.is_block() and b.type.is_block() and a.type.shape.values == b.type.shape.values
        return (a, b) if equal else broadcast(self, a, b)

    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(interpreter, "_convert_float", rounded)
        changes.setattr(interpreter, "_patch_lang", patched_once)
        changes.setattr(interpreter, "_get_np_dtype", looked_up)
        changes.setattr(TritonSemantic, "broadcast_impl_value", broadcast_where_needed)
        changes.setattr(tl.block_type, "__init__", typed_once)
        changes.setattr(tl.tensor, "__init__", shaped_once)
        changes.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield


@pytest.fixture(scope="session", autouse=True)
def interpreted():
    # NumPy warns where a result is NaN or infinite; a GPU does not.
    with faithful_and_quick(), np.errstate(all="ignore"):
        yield
