"""Under transforms of `torch.func` and forward-mode AD PyTorch's operators run, with the eager modules' values."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch._vmap_internals import _vmap
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, jacrev, jvp, vjp, vmap

from resnet import reference
from resnet.functional import batch_norm_add_relu
from tests.conftest import DEVICE
from tests.helpers.blocks import draw
from tests.helpers.fused_cases import images, inference_trio, kinds, train_and_eval

pytestmark = pytest.mark.core

SIZE = (3, 5, 4)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def loss(module: nn.Module, p: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(module, p, (x,)).square().sum()


TRANSFORMS = {
    "jvp": lambda m, x: jvp(m, (x,), (torch.ones_like(x),)),
    "jvp of the parameters": lambda m, x: jvp(
        lambda p: functional_call(m, p, (x,)), (parameters(m),), ({k: v + 1 for k, v in parameters(m).items()},)
    ),
    "vjp": lambda m, x: vjp(m, x)[1](torch.ones_like(vjp(m, x)[0]))[0],
    "grad": lambda m, x: grad(lambda p: loss(m, p, x))(parameters(m)),
    "grad of grad": lambda m, x: grad(lambda x: grad(lambda x: loss(m, {}, x))(x).square().sum())(x),
    "jacrev": lambda m, x: jacrev(m)(x[:1, :, :3, :2]),
    "functionalize": lambda m, x: functionalize(m)(x),
    "vmap": lambda m, x: vmap(m)(x[:, None]),
    "gradients of each image": lambda m, x: vmap(grad(lambda p, x: loss(m, p, x[None])), (None, 0))(parameters(m), x),
}


@kinds
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_of_an_evaluation_gives_eagers_values(any_backend, name, kind):
    t = inference_trio(kind, dtype=torch.float64)
    x = images(kind, SIZE, dtype=torch.float64)
    torch.testing.assert_close(TRANSFORMS[name](t.fused, x), TRANSFORMS[name](t.exact, x), atol=1e-9, rtol=1e-7)


@kinds
def test_a_transform_of_a_training_step_is_refused_as_in_eager(any_backend, kind):
    """It would count the batch in a buffer that the transform does not know."""
    t = inference_trio(kind, dtype=torch.float64)
    for module in (t.exact.train(), t.fused.train()):
        with pytest.raises(RuntimeError, match="in-place operation"):
            TRANSFORMS["grad"](module, images(kind, SIZE, dtype=torch.float64))


@kinds
@train_and_eval
def test_dual_tensors_have_eagers_tangent(any_backend, train, kind):
    t = inference_trio(kind, dtype=torch.float64)
    x = images(kind, SIZE, dtype=torch.float64)
    tangents = []
    for module in (t.fused, t.exact):
        with forward_ad.dual_level():
            out = module.train(train)(forward_ad.make_dual(x, torch.ones_like(x)))
            tangents.append(forward_ad.unpack_dual(out).tangent)
    assert tangents[0].abs().max() > 0
    torch.testing.assert_close(*tangents, atol=1e-9, rtol=1e-7)


def in_another_thread(out: Tensor, x: list[Tensor], v: Tensor) -> tuple:
    """What `is_grads_batched` does, with backward in a thread of its own, as it has on a GPU."""

    def gradients(v: Tensor) -> tuple:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(torch.autograd.grad, out, x, v).result()

    return _vmap(gradients, 0, 0)(v)


GRADIENTS = {
    "is_grads_batched": lambda out, x, v: torch.autograd.grad(out, x, v, is_grads_batched=True),
    "in another thread": in_another_thread,
    "vmap": lambda out, x, v: vmap(lambda v: torch.autograd.grad(out, x, v))(v),
    "vmap of vmap": lambda out, x, v: vmap(vmap(lambda v: torch.autograd.grad(out, x, v)), 1)(v[:, None]),
}


@kinds
@train_and_eval
@pytest.mark.parametrize("name", GRADIENTS)
def test_a_batch_of_gradients_goes_backward_as_in_eager(any_backend, name, train, kind):
    """What is recorded outside of `vmap` may have its backward in it."""
    t = inference_trio(kind, dtype=torch.float64)
    x = images(kind, SIZE, dtype=torch.float64).requires_grad_()
    found = []
    for module in (t.fused.train(train), t.exact.train(train)):
        out = module(x)
        v = draw(2, *out.shape, dtype=torch.float64)
        found.append(GRADIENTS[name](out, [x, *module.parameters()], v))
    torch.testing.assert_close(*found, atol=1e-9, rtol=1e-7)


@train_and_eval
def test_the_operation_has_eagers_tangent_and_per_sample_gradients(any_backend, train):
    x, shortcut = (draw(3, 4, 5, 4, seed=seed, dtype=torch.float64) for seed in range(2))
    mean, var = torch.zeros(4, dtype=torch.float64, device=DEVICE), torch.ones(4, dtype=torch.float64, device=DEVICE)

    def run(function) -> tuple:
        call = lambda x: function(x, mean.clone(), var.clone(), shortcut=shortcut, training=train)  # noqa: E731
        alone = lambda x: function(x[None], mean, var).sum()  # noqa: E731
        return jvp(call, (x,), (torch.ones_like(x),)), vmap(grad(alone))(x)

    torch.testing.assert_close(run(batch_norm_add_relu), run(reference.batch_norm_add_relu))
