"""The mark of a constant result, against PyTorch's own decorator."""

from __future__ import annotations

import torch

from andromeda.ops.constant_result import assume_constant_result


def test_the_mark_is_the_one_that_pytorch_sets() -> None:
    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    assert vars(assume_constant_result(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}  # type: ignore[no-untyped-call]


def test_a_marked_function_is_called_while_it_is_traced() -> None:
    calls = []

    @assume_constant_result
    def counted() -> int:
        calls.append(1)  # dynamo could not trace this into a graph without a side effect
        return len(calls)

    compiled = torch.compile(lambda x: x + counted(), backend="eager", fullgraph=True)
    assert [float(compiled(torch.zeros(()))) for _ in range(3)] == [1.0, 1.0, 1.0]
    assert calls == [1]
