"""How a fused operator is registered with `torch.library`: schema, implementation, fake implementation, autograd.

The one place where kernels meet autograd. `torch.compile` and `torch.library.opcheck` see each operator as one node;
what is exported, traced or scripted has none of them.

The named tuples of `operands` describe an operator; its schema, what is wanted and what is returned follow from them.
One with a derivative has a backward operator, which takes the results' gradients, what was kept, and a flag for each
argument of the forward operator; it gives the gradients of those that are flagged.

Operators that take running statistics update them in place, which `torch.library.custom_op` does not allow together
with an autograd formula. They are therefore defined on a `Library`, with the formula on the Autograd key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.autograd import forward_ad
from torch.autograd.profiler import record_function
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.library import Library, register_fake
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from resnet import backends, settings
from resnet.collectives import merge_sums
from resnet.kernels.host import facts
from resnet.kernels.host.facts import Known, is_plain
from resnet.operands import BlockBefore
from resnet.schema import leaves, pack, parameters, received, unpack, updates
from resnet.torch_backend.batch_norm import stats_of_moments

_NAMESPACE = "fused_residual"
_LIBRARY = Library(_NAMESPACE, "DEF")
_ops = getattr(torch.ops, _NAMESPACE)
_DIRECT: dict[str, tuple] = {}  # by name: what runs an operator, and its formula's `apply` or None
_GIVEN: dict[str, int] = {}  # by name, how many outputs an operator gives whoever calls it; 1 where it is not here
_LEGACY_LEVELS = 64  # of `vmap`s in one another, at most, in PyTorch's older implementation
_LINKED: dict[type, Callable] = {}  # by the class of a block's node in autograd's graph: see `link`


def _register(schema: str, implementation: Callable, fake: Callable) -> str:
    """Define the operator; its name."""
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return name


def _differentiate(name: str, formula: type[torch.autograd.Function], below: Callable) -> None:
    """`formula.apply(keyset, *args)` is the operator where a gradient is recorded, elsewhere `below(keyset, args)`."""

    def autograd(keyset: torch._C.DispatchKeySet, *args):
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return formula.apply(keyset, *args)
        return below(keyset, args)

    _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)


def _below_autograd(name: str, implementation: Callable) -> Callable[[torch._C.DispatchKeySet, Sequence], object]:
    """What follows an operator's autograd kernel: a function of the dispatch keys and of the arguments.

    Where a device's key is the next one, the implementation is called from here. PyTorch's dispatcher would pack and
    unpack the arguments once more, which takes 10 us.
    """
    op, of_devices = getattr(_ops, name).default, (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)

    def below(keyset: torch._C.DispatchKeySet, args: Sequence):
        with torch._C._AutoDispatchBelowAutograd():
            if (keyset & torch._C._after_ADInplaceOrView_keyset).highestPriorityTypeId() in of_devices:
                return implementation(*args)
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return below


def is_direct() -> bool:
    """Whether an operator may be called without PyTorch's dispatcher: it would only pass the call on to here."""
    plain = is_plain() and forward_ad._current_level < 0
    return plain and not torch._C._autograd._profiler_enabled()  # a profile names the operators


def _is_profiled() -> bool:
    """Whether a profiler is all that keeps `is_direct` from holding."""
    return torch._C._autograd._profiler_enabled() and is_plain() and forward_ad._current_level < 0


def is_transformed_or_recorded() -> bool:
    """Whether PyTorch's own operators have to run.

    Transforms of `torch.func` and forward-mode AD follow only them; and what a tool records (`torch.export`,
    `torch.jit.trace`, `torch.onnx`, `make_fx`) is to run without this library. `torch.compile` keeps the fused ones
    outside of such transforms.
    """
    # In a graph of torch.compile PyTorch 2.11 takes the call of is_exporting() for true.
    if torch.compiler._is_exporting_flag or torch.compiler.is_compiling():
        return torch.compiler._is_exporting_flag or torch._C._are_functorch_transforms_active()
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or get_proxy_mode() is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL) is not None  # precedes the proxies
    )


def wrapper(values: Sequence) -> str | None:
    """What keeps the fused operators from taking the values: the class of a wrapper, or a layout without strides.

    A tensor that wraps others may know PyTorch's own operators alone, as a `DTensor` does, or run another operator once
    for each that it wraps. So may a class with a `__torch_function__` of its own. None where there is no such tensor.
    """
    for value in values:
        if isinstance(value, Tensor):
            if is_traceable_wrapper_subclass(value) or _has_functions_of_its_own(type(value)):
                return type(value).__name__
            if value.layout is not torch.strided:
                return f"tensor of layout {value.layout}"
    return None


def _has_functions_of_its_own(kind: type[Tensor]) -> bool:
    """Whether a class of tensors may replace what PyTorch's functions do with them."""
    if kind is Tensor or kind is torch.nn.Parameter:  # of which torch.compile need not trace the question
        return False
    found = kind.__torch_function__  # a class method, of which each class makes another object
    usual = Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl
    return getattr(found, "__func__", found) not in usual


def function_mode() -> str | None:
    """The class of a mode that may replace PyTorch's functions; None while torch.compile traces."""
    return None if torch.compiler.is_compiling() else facts.function_mode()


def call(name: str, flat: Sequence, known: Known | None) -> Tensor | tuple[Tensor, ...]:
    """What the operator `fused_residual::name` gives: its result, or several and what another operator needs of it.

    Args:
        known: the facts of `flat` where `is_direct` holds, else None.
    """
    if known is None:
        outputs, given = getattr(_ops, name)(*flat), _GIVEN.get(name, 1)
        if isinstance(outputs, Tensor):
            return outputs
    else:
        operator, apply = _DIRECT[name]
        given = operator.given
        grad = apply is not None and torch.is_grad_enabled()
        if grad and any(isinstance(a, Tensor) and a.requires_grad for a in flat):
            return apply(known, *flat)
        outputs = operator.run(flat, known)
    return outputs[0] if given == 1 else tuple(outputs[:given])


def like_of(t: Tensor) -> Tensor:
    """An empty gradient or activation for t, in the layout of t where it has four axes."""
    return torch.empty_like(t, memory_format=torch.preserve_format if t.dim() == 4 else torch.contiguous_format)


def dense(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _is_dense(t: Tensor | None) -> bool:
    return t is not None and t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Differentiable:
    """An operator and its backward operator, by the classes of `operands` and functions of their instances."""

    name: str
    arguments: type[tuple]
    output: type[tuple]  # the first fields are the results, the others are for backward
    kept: type[tuple]
    fake: Callable  # (arguments) -> an output of uninitialised memory
    forward: Callable  # (arguments) -> the output
    keep: Callable  # (arguments, output) -> what is kept
    keep_moves: bool  # whether `keep` leaves out and moves values alone, whatever they are
    like: Callable  # (kept) -> arguments of the shapes of their gradients
    backward: Callable  # (the results' gradients, kept, needs) -> the gradients, in the arguments' places
    norms: Callable  # (arguments, output) -> each norm and its stats, in the order of `forward`
    summed: Callable  # (kept, needs) -> the norms and stats whose sums `backward` takes, in its order
    same: Callable | None = None  # (kept) -> arguments whose gradient is another's, or "dout", by name
    results: int = 1  # how many outputs have a gradient
    given: int = 1  # how many are given to whoever calls: the results, and constants that another operator needs
    like_results: Callable | None = None  # (kept) -> tensors of the results' shapes, where there are several
    linked: Callable | None = None  # `backward` in a chain of blocks: see `link`

    def register(self) -> None:
        results = ", ".join(f"{leaf.type} {leaf.name}" for leaf in leaves(self.output))
        _register(f"{self.name}({parameters(self.arguments)}) -> ({results})", self._forward, self._fake)
        grads = ", ".join(f"Tensor d{leaf.name}" for leaf in leaves(self.output)[: self.results])
        schema = f"{self.name}_backward({grads}, {parameters(self.kept, updates=False)}, bool[] needs) -> Tensor[]"
        backward = _register(schema, self._backward, self._backward_fake)
        below, below_backward = _below_autograd(self.name, self._forward), _below_autograd(backward, self._backward)
        formula = self._formula(below)
        _differentiate(self.name, formula, below)
        _differentiate(backward, _once(backward, below_backward), below_backward)
        # What `Function.apply` does before this one is for functorch.
        _DIRECT[self.name] = self, super(torch.autograd.Function, formula).apply
        if self.given > 1:
            _GIVEN[self.name] = self.given
        if self.linked is not None:
            _LINKED[formula._backward_cls] = self._before()

    def _fake(self, *flat) -> Tensor | tuple[Tensor, ...]:
        return _returned(pack(self.fake(unpack(self.arguments, flat))))

    def _forward(self, *flat) -> Tensor | tuple[Tensor, ...]:
        return _returned(self.run(received(flat)))

    def run(self, flat: Sequence, known: Known | None = None) -> tuple:
        if flat[0].numel() == 0:
            return self._run_empty(flat)
        outputs = backends.implementation(flat[0]).run(self._compute, flat, known)
        # A kernel's write to the running statistics is not counted in their versions.
        torch.autograd.graph.increment_version(
            [flat[i] for i, training in updates(self.arguments) if flat[training] and flat[i] is not None]
        )
        return tuple(outputs)

    def _run_empty(self, flat: Sequence) -> tuple:
        """Zeros. An empty batch counts, and other processes of a norm's group may have rows and wait for this one."""
        outputs = tuple(t.zero_() for t in pack(self.fake(unpack(self.arguments, flat))))
        for norm, stats in self.norms(unpack(self.arguments, flat), unpack(self.output, outputs)):
            if norm.training and norm.group:
                with torch._C._AutoDispatchBelowAutograd():
                    stats.copy_(stats_of_moments(stats[0], stats[1], 0, norm))
            elif norm.counted is not None:
                norm.counted.add_(1)
        return outputs

    def _compute(self, *flat) -> list[Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return pack(self.forward(unpack(self.arguments, flat)))

    def _backward_fake(self, *flat) -> list[Tensor]:
        *kept, needs = flat[self.results :]
        like = pack(self.like(unpack(self.kept, kept)))
        return [like_of(t) for t, need in zip(like, needs, strict=True) if need]

    def _backward(self, *flat) -> list[Tensor]:
        return self._run_backward(received(flat))

    def _run_backward(self, flat: Sequence, known: Known | None = None) -> list[Tensor]:
        if flat[0].numel() == 0:
            return self._run_empty_backward(flat)
        return backends.implementation(flat[0]).run(self._compute_grads, flat, known)

    def _run_empty_backward(self, flat: Sequence) -> list[Tensor]:
        *kept, needs = flat[self.results :]
        for norm, stats in self.summed(unpack(self.kept, kept), unpack(self.arguments, needs)):
            if norm.training and norm.group:
                merge_sums(torch.zeros_like(stats[:2]), 0, norm.group)
        return [t.zero_() for t in self._backward_fake(*flat)]

    def _compute_grads(self, *flat) -> list[Tensor]:
        *kept, needs = flat[self.results :]
        with torch._C._AutoDispatchBelowAutograd():
            grads = self.backward(*flat[: self.results], unpack(self.kept, kept), unpack(self.arguments, needs))
        return [grad for grad, need in zip(pack(grads), needs, strict=True) if need]

    def _run_linked(self, ctx: object, flat: Sequence, direct: bool) -> list[Tensor]:
        """See `_compute_linked`. A profile has it under the name of the backward operator."""
        run = backends.implementation(flat[0]).run
        if direct:
            return run(self._compute_linked, flat, ctx.recent.known(flat))
        with record_function(f"{_NAMESPACE}::{self.name}_backward"):
            return run(self._compute_linked, flat)

    def _compute_linked(self, *flat) -> list[Tensor]:
        """The gradients that are wanted, and where there is a block before, the partial sums for it."""
        dout, *kept, y, stats, z, z_stats, sums, needs = flat
        before = None if y is None else BlockBefore(y, stats, z, z_stats)
        with torch._C._AutoDispatchBelowAutograd():
            grads, handed = self.linked(dout, unpack(self.kept, kept), unpack(self.arguments, needs), before, sums)
        found = [grad for grad, need in zip(pack(grads), needs, strict=True) if need]
        return found if before is None else [*found, handed]

    def _before(self) -> Callable[[object], tuple]:
        """A function of a block's node that gives the fields of its `BlockBefore`, without the rest of what is kept."""
        every = leaves(self.kept)
        saved = [i for i, leaf in enumerate(every) if leaf.read]
        places = [None if i is None else saved.index(i) for i in BlockBefore.of(unpack(self.kept, range(len(every))))]
        pick = itemgetter(*[len(saved) if place is None else place for place in places])
        return lambda node: pick((*node.saved_tensors, None))

    def _keeper(self) -> Callable[[Sequence, Sequence], Sequence]:
        """`keep` as a function of flat values. Where it only moves them, it is called once, with their places."""
        count = len(leaves(self.arguments))
        if not self.keep_moves:
            return lambda flat, outputs: pack(self.keep(unpack(self.arguments, flat), unpack(self.output, outputs)))
        output = unpack(self.output, range(count, count + len(leaves(self.output))))
        places = pack(self.keep(unpack(self.arguments, range(count)), output))
        move = itemgetter(*[-1 if place is None else place for place in places])
        return lambda flat, outputs: move((*flat, *outputs, None))

    def _in_full(self, douts: Sequence[Tensor | None], kept: Sequence) -> list[Tensor]:
        """The gradients of several results, dense: zeros where nothing reached one."""
        if any(dout is None for dout in douts):
            like = self.like_results(unpack(self.kept, kept))
            douts = [torch.zeros_like(t) if dout is None else dout for dout, t in zip(douts, like, strict=True)]
        return [dense(dout) if dout.dim() == 4 else dout.contiguous() for dout in douts]

    def _formula(self, below: Callable) -> type[torch.autograd.Function]:
        names = [leaf.name for leaf in leaves(self.arguments)]
        results, given = self.results, self.given
        backward_op = getattr(_ops, f"{self.name}_backward").default
        # What is not read is not saved as autograd saves: who writes to it before backward changes nothing.
        tensors = [leaf.read for leaf in leaves(self.kept)]
        pick_tensors, pick_settings, in_order = _split(tensors)
        keep = self._keeper()

        def forward(ctx, by, *flat):
            direct = type(by) is Known
            ctx.recent = by.facts.recent if direct else None
            ctx.before = ctx.handed = None
            if direct:
                outputs = self.run(flat, by)
            else:
                outputs = below(by, flat)
                outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
                ctx.mark_non_differentiable(*outputs[results:])
            kept = keep(flat, outputs)
            ctx.chosen = settings.in_force()
            ctx.settings = pick_settings(kept)
            saved = pick_tensors(kept)
            ctx.save_for_backward(*saved)
            ctx.dense = None if _top_saved_tensors_default_hooks(True) is None else tuple(map(_is_dense, saved))
            ctx.set_materialize_grads(False)
            if not direct:
                return _returned(outputs)
            if given == 1:
                return outputs[0]
            ctx.mark_non_differentiable(*outputs[results:given])
            return tuple(outputs[:given])

        def backward(ctx, *douts):
            if torch.compiler.is_dynamo_compiling():  # compiled autograd would trace what runs below the operator
                return torch.compiler.disable(backward)(ctx, *douts)
            douts = douts[:results]
            reached = douts[0] if results == 1 else next((dout for dout in douts if dout is not None), None)
            if reached is None:
                return (None,) * len(ctx.needs_input_grad)
            if ctx.chosen == settings.in_force():
                return gradients(ctx, *douts)
            with settings.both(ctx.chosen):  # a GPU's backward has a thread of its own, without our context
                return gradients(ctx, *douts)

        def gradients(ctx, *douts):
            saved = ctx.saved_tensors
            if ctx.dense:  # a hook may have copied them as it likes
                saved = [dense(t) if was_dense else t for t, was_dense in zip(saved, ctx.dense, strict=True)]
            kept = in_order((*saved, *ctx.settings))
            same = self.same and self.same(unpack(self.kept, kept))
            wanted = ctx.needs_input_grad[1:]
            needs = wanted
            if same:
                others = {same[name] for name, need in zip(names, wanted) if need and name in same}
                needs = tuple(name not in same and (need or name in others) for name, need in zip(names, wanted))
            try:
                grads = (dense(douts[0]),) if results == 1 else self._in_full(douts, kept)
                flat = (*grads, *kept, needs)
            except RuntimeError:  # a batch of gradients has no layout
                return _of_each(douts, partial(gradients, ctx))
            recorded = torch.is_grad_enabled()
            direct, links = ctx.recent and not recorded and is_direct(), None
            # Compiled autograd has a stand-in for the node, and keeps apart what each node has saved.
            in_chain = type(ctx) in _LINKED and (ctx.before is not None or ctx.handed is not None)
            if in_chain and (direct or (not recorded and _is_profiled())):
                links = _links(ctx, douts[0], kept[0], needs[0])
            if links is not None:
                grads = self._run_linked(ctx, (*flat[:-1], *links, needs), direct)
                if links.y is not None:
                    *grads, sums = grads
                    ctx.before.handed = grads[0], grads[0]._version, sums
            else:
                known = ctx.recent.known(flat) if direct else None
                grads = backward_op(*flat) if known is None else self._run_backward(flat, known)
            placed = _in_places(needs)((None, *grads))
            if same:
                found = {"dout": douts[0], **dict(zip(names, placed, strict=True))}
                placed = [found[same.get(name, name)] if need else None for name, need in zip(names, wanted)]
            return None, *placed

        name = self.name.title().replace("_", "")  # ResidualBlock: what a user sees in grad_fn
        return type(name, (torch.autograd.Function,), {f.__name__: staticmethod(f) for f in (forward, backward)})


class Inference:
    """An operator without a derivative."""

    given = 1

    def __init__(self, name: str, arguments: type[tuple], fake: Callable, implementation: Callable):
        self._arguments, self._fake, self._implementation = arguments, fake, implementation
        schema = f"{name}({parameters(arguments, updates=False)}) -> Tensor"
        _register(schema, lambda *flat: self.run(received(flat))[0], lambda *flat: fake(unpack(arguments, flat)).out)
        _DIRECT[name] = self, None

    def run(self, flat: Sequence, known: Known | None = None) -> list[Tensor]:
        if flat[0].numel() == 0:
            return [self._fake(unpack(self._arguments, flat)).out]
        return backends.implementation(flat[0]).run(self._compute, flat, known)

    def _compute(self, *flat) -> list[Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return [dense(self._implementation(unpack(self._arguments, flat)))]


# ---- a chain of blocks -------------------------------------------------------------------------------------------


def link(node: object, before: object) -> None:
    """Let a block's backward give what the backward of the block before it begins with: see `BlockBefore`.

    `node` and `before` are the blocks' nodes in autograd's graph; other nodes are ignored. It is for whoever calls both
    blocks and knows that nobody else has, or looks at, what lies between them: the gradient that arrives there is the
    one behind the ReLU. Where another gradient arrives after all, since something was added to it, the block takes its
    sums itself.
    """
    if type(node) in _LINKED and type(before) in _LINKED:
        node.before = before


class _Links(NamedTuple):
    """What a block's backward takes beside its own: the fields of a `BlockBefore`, and sums from the block after."""

    y: Tensor | None
    stats: Tensor | None
    z: Tensor | None
    z_stats: Tensor | None
    sums: Tensor | None


def _links(ctx: object, dout: Tensor, x: Tensor, needs_x: bool) -> _Links | None:
    """Those of a block's node for this call; it forgets the sums that were handed to it."""
    handed, before, ctx.handed = ctx.handed, ctx.before, None
    if not dout.numel() or dout.is_neg() or not backends.implementation(x).LINKS_BLOCKS:
        return None
    sums = handed[2] if handed and handed[0] is dout and handed[1] == dout._version else None
    if before is not None and needs_x and x.grad_fn is before and _will_run(before):
        return _Links(*_LINKED[type(before)](before), sums)
    return None if sums is None else _Links(None, None, None, None, sums)


def _will_run(node: object) -> bool:
    """Whether the backward that is running will still execute this node.

    It will not where it is of other inputs' gradients alone, has executed the node, or is the call of a single node.
    """
    return torch._C._current_graph_task_id() >= 0 and torch._C._will_engine_execute_node(node)


def _returned(outputs: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Outputs as PyTorch's dispatcher takes them: one alone is no tuple."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


@cache
def _in_places(needs: tuple[bool, ...]) -> Callable[[Sequence], tuple]:
    """A function of None and values: the values in the places that `needs` marks, None in the others."""
    counts = accumulate(needs)
    return itemgetter(*[count if need else 0 for need, count in zip(needs, counts)])


def _of_each(
    given: Sequence[Tensor | None], function: Callable[..., Sequence[Tensor | None]]
) -> tuple[Tensor | None, ...]:
    """What a function gives for each entry of batches of `vmap`, as batches; tensors that are none go with each entry.

    The batches are those of `torch.func.vmap`, or of the older `vmap` behind `is_grads_batched` and
    `jacobian(vectorize=True)`. What was recorded outside of a `vmap` meets them where its backward runs inside. To be
    called while the error is handled that a batch has raised: without a batch that is raised again.
    """
    functorch = torch._C._functorch
    tensors = [t for t in given if t is not None]
    batched = next(filter(functorch.is_batchedtensor, tensors), None)
    legacy = next(filter(functorch.is_legacy_batchedtensor, tensors), None)
    if batched is not None:
        add, level = functorch._add_batch_dim, functorch.maybe_get_level(batched)
        size = functorch.get_unwrapped(batched).shape[functorch.maybe_get_bdim(batched)]

        def each_of(t: Tensor) -> Tensor:
            if functorch.is_batchedtensor(t):
                return functorch.get_unwrapped(t).movedim(functorch.maybe_get_bdim(t), 0)
            return t.expand(size, *t.shape)
    elif legacy is not None:
        # The level is known in the thread of `vmap` alone, and a GPU's backward has another. At a level that the tensor
        # does not have, an axis of the given size is made, here of 0.
        sizes = {level: len(torch._remove_batch_dim(legacy, level, 0, 0)) for level in range(1, _LEGACY_LEVELS + 1)}
        add, level = torch._add_batch_dim, max(level for level, size in sizes.items() if size)
        size = sizes[level]

        def each_of(t: Tensor) -> Tensor:
            return torch._remove_batch_dim(t, level, size, 0)
    else:
        raise
    parts = [[None] * size if t is None else each_of(t) for t in given]
    results = zip(*map(function, *parts))
    return tuple(None if each[0] is None else add(_stacked(each), 0, level) for each in results)


def _stacked(each: Sequence[Tensor]) -> Tensor:
    """`torch.stack`, with the strides of the first. Where an axis has one value it would set others, of which PyTorch's
    BatchNorm concludes another layout: its gradients of one image would be wrong.
    """
    stacked, strides = torch.stack(each), torch.empty_like(each[0]).stride()
    if all(n == 1 or s == t for n, s, t in zip(each[0].shape, stacked.stride()[1:], strides, strict=True)):
        return stacked.as_strided(stacked.shape, (stacked.stride(0), *strides))
    return stacked


def _split(first: Sequence[bool]) -> tuple[Callable, Callable, Callable]:
    """Three functions of tuples: pick what `first` marks; pick the rest; put both, concatenated, back in order."""
    places = (
        [i for i, is_first in enumerate(first) if is_first],
        [i for i, is_first in enumerate(first) if not is_first],
    )
    back = sorted(range(len(first)), key=lambda place: (places[0] + places[1])[place])
    return _getter(places[0]), _getter(places[1]), _getter(back)


def _getter(places: Sequence[int]) -> Callable[[Sequence], Sequence]:
    """`itemgetter`, which of one place gives a tuple, too."""
    return itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))


def _once(name: str, below: Callable) -> type[torch.autograd.Function]:
    """The autograd of a backward operator: it may be recorded (`create_graph=True`), not differentiated."""

    class NoDoubleBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, *args):
            return tuple(below(keyset, args))

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(
                f"{_NAMESPACE}::{name} has no derivative: double backward through the fused operators is not "
                "supported. Where it is needed call resnet.unfuse(model), or use resnet.Residual, the eager block with "
                "the same state_dict."
            )

    return NoDoubleBackward
