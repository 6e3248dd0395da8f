"""What a failed call of the CUDA driver says."""

from __future__ import annotations

import pytest

from llmforge.kernels.driver import _ADVICE, DriverError, check

driver = pytest.importorskip("cuda.bindings.driver", reason="needs pip install 'llmforge[cuda]'")


def test_values_of_a_call() -> None:
    fine = driver.CUresult.CUDA_SUCCESS
    assert check((fine,)) is None and check((fine, 7)) == 7


@pytest.mark.parametrize("name", [*_ADVICE, "CUDA_ERROR_LAUNCH_FAILED"])
def test_errors_are_named_with_what_to_do(name: str) -> None:
    with pytest.raises(DriverError) as caught:
        check((getattr(driver.CUresult, name),))
    said, _, advice = str(caught.value).partition("; ")
    assert said == f"the CUDA driver failed with {name}"
    assert advice == _ADVICE.get(name, "")
