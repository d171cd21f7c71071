"""Decoding steps: which are chosen, and that cached ones follow their tensors."""

import gc
import sys
import threading

import pytest
import torch
from decode_cases import expected, group_of, make, run

from gci_kernels.accuracy import relative_error
from gci_kernels.native import DTYPE_CODES
from gci_kernels.ops.decode import Group, choose_decode, find_step, plan, step
from gci_kernels.tuners import fusion

pytestmark = pytest.mark.usefixtures("poisoned")

KNOWN = dict(tokens=1, columns=40, experts=8, dtype=torch.bfloat16, adapter_dtype=torch.float32, device_type="cpu")


def test_the_choice_is_a_function_of_sizes_and_dtypes():
    assert choose_decode(**KNOWN) is not None
    for change in (
        dict(tokens=0), dict(tokens=17), dict(columns=513), dict(experts=257), dict(device_type="meta"), dict(head=129),
        dict(dtype=torch.float64, adapter_dtype=torch.float64), dict(dtype=torch.float32, adapter_dtype=torch.bfloat16),
    ):  # fmt: skip
        assert choose_decode(**KNOWN | change) is None, change


def test_launches_of_one_step_of_one_layer(monkeypatch):
    """On a GPU at most three with the base product's; on a CPU one call is everything."""
    monkeypatch.setitem(plan.BUILT, "cuda", plan._DTYPES)
    proved = frozenset({"decode_step", "decode_attend"})
    for head in (None, 4):
        assert len(choose_decode(**KNOWN, head=head).launches) == 1
        on_gpu = choose_decode(**KNOWN | {"device_type": "cuda"}, head=head, proved=proved)
        assert len(on_gpu.launches) <= 3 and on_gpu.launches[0] == "base product"
        assert choose_decode(**KNOWN | {"device_type": "cuda"}, head=head, proved=proved - {"decode_step"}) is None
    without = choose_decode(**KNOWN | {"device_type": "cuda"}, head=4, proved=proved - {"decode_attend"})
    assert without is None


def test_what_no_kernel_takes_is_left_alone():
    x, A, router, B, y = make(2, 20, 9, 2, 4, torch.float32, torch.float32)
    for changed in (
        dict(x=x.double(), y=y.double()), dict(A=A.t().contiguous().t()), dict(B=B.bfloat16()), dict(x=x.repeat(9, 1)),
        dict(y=None, weight=torch.randn(20, 9).t()), dict(y=None, weight=torch.randn(9, 20, dtype=torch.bfloat16)),
        dict(x=x[:, :19]), dict(B=torch.randn(9, 7)), dict(router=torch.randn(2, 19)), dict(router=torch.randn(3, 20)),
        dict(y=None, weight=torch.randn(9, 19)), dict(y=None, weight=torch.randn(8, 20)),
        dict(y=None, weight=torch.randn(9, 20), bias=torch.randn(8)),
    ):  # fmt: skip
        assert run(**dict(y=y, x=x, A=A, router=router, B=B) | changed) is None, changed.keys()


def test_attention_whose_shapes_do_not_fit_is_left_alone():
    x, A, _, B, _ = make(2, 20, 9, 8, 0, torch.float32, torch.float32)
    for qkv, heads, taken in ((24, 2, True), (16, 2, False), (24, 3, False)):
        group = Group(A, B, 2.0, 0, 2, qkv=torch.randn(qkv, 8), num_heads=heads)
        assert (find_step(x, torch.randn(9, 20), None, (group,)) is not None) == taken, (qkv, heads)


class Wrapped(torch.Tensor):
    """A tensor whose address is nobody's business."""


def test_tensors_of_other_classes_are_left_alone():
    x, A, router, B, y = make(2, 20, 9, 2, 4, torch.float32, torch.float32)
    for changed in (dict(A=A.as_subclass(Wrapped)), dict(y=None, weight=torch.randn(9, 20).as_subclass(Wrapped))):
        assert run(**dict(y=y, x=x, A=A, router=router, B=B) | changed) is None
    with torch.no_grad():
        assert fusion.takes_steps("auto", x) and not fusion.takes_steps("auto", x.as_subclass(Wrapped))


def test_x_with_gaps():
    x, A, router, B, y = make(4, 20, 9, 2, 4, torch.float32, torch.float32)
    assert torch.equal(run(x.t().contiguous().t(), A, router, B, y), run(x, A, router, B, y))


def test_steps_follow_their_tensors():
    x, A, router, B, y = make(2, 20, 9, 2, 4, torch.float32, torch.float32)
    weight = torch.randn(9, 20)

    def check(A, router, B, scaling, top_k):
        actual = run(x, A, router, B, None, weight, scaling=scaling, top_k=top_k)
        assert relative_error(actual, expected(x, A, router, B, y, top_k, scaling, weight)) < 1e-6

    check(A, router, B, 1.0, 4)
    for tensor in (A, router, B, weight):
        tensor.data.mul_(2)
    check(A, router, B, 1.0, 4)  # the same memory
    check(A, router, B, 3.0, 4)
    check(A, router, B, 3.0, 2)
    check(A, None, B[:, :8].contiguous(), 1.0, 0)
    for tensor in (A, router, B, weight):
        tensor.data = torch.randn_like(tensor)
        check(A, router, B, 1.0, 4)
    A = torch.randn(8, 20)
    check(A, router, B, 1.0, 4)
    tensor_id = id(B)
    assert tensor_id in step._keys and any(tensor_id in key for key in step._steps)
    del B, tensor
    gc.collect()
    assert tensor_id not in step._keys and not any(tensor_id in key for key in step._steps)


def test_no_step_for_another_width_at_the_same_address():
    x, A, _, B, y = make(2, 20, 9, 8, 0, torch.float32, torch.float32)
    assert run(x, A, None, B, y) is not None
    A.data = A.view(16, 10)
    assert run(x[:, :10].contiguous(), A, None, B, y) is None  # B has 8 columns, A now 16 rows


def test_no_step_for_x_on_another_device():
    """The library's product says what is wrong; a kernel would read an address of the other device."""
    x, A, router, B, _ = make(1, 20, 9, 2, 4, torch.float32, torch.float32)
    weight, groups = torch.randn(9, 20), (group_of(A, router, B, count=1),)
    known = find_step(x, weight, None, groups)
    assert known is not None and find_step(x.to("meta"), weight, None, groups) is None
    assert find_step(x, weight, None, groups) is known


def test_a_known_step_is_found_and_run_in_few_python_calls():
    """Every adapted layer does both for every token."""
    x, A, router, B, y = make(4, 64, 64, 4, 4, torch.float32, torch.float32)
    groups, calls = (group_of(A, router, B, top_k=2, count=4),), []
    found = find_step(x, None, None, groups)
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        find_step(x, None, None, groups).run(x, y)
    finally:
        sys.setprofile(None)
    assert calls == ["find_step", "is_dynamo_compiling", "run"] and find_step(x, None, None, groups) is found


def test_threads_of_a_program_may_share_an_adapter():
    x, A, router, B, y = make(8, 300, 400, 4, 8, torch.float32, torch.float32)
    want, wrong = expected(x, A, router, B, y, 8, 2.0), []

    def work():
        for _ in range(50):
            if relative_error(run(x, A, router, B, y), want) > 1e-6:
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_codes_name_every_dtype():
    assert sorted(DTYPE_CODES.values()) == [0, 1, 2, 3]
