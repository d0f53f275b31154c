"""The library calls nothing deprecated: pytest's settings make such a warning an error, of its own code alone."""

import warnings

import pytest

pytestmark = pytest.mark.core


def warn(category: type[Warning], module: str) -> None:
    warnings.warn_explicit("old", category, "file.py", 1, module=module)


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
@pytest.mark.parametrize("module", ["resnet.kernels.tuning", "resnet", "resnet.fused"])
def test_a_deprecation_warning_of_the_library_is_an_error(module, category):
    with pytest.raises(category, match="old"):
        warn(category, module)


@pytest.mark.parametrize("module", ["torch.nn", "triton.language.core", "kernelsmith"])
def test_that_of_another_library_is_not(module):
    with pytest.warns(DeprecationWarning, match="old"):
        warn(DeprecationWarning, module)
