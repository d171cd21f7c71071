"""The plans that "auto" makes on a GPU of what is proved there; on an imagined one."""

import pytest
import torch
from toy_gpu import ALL

from gci_kernels import hardware
from gci_kernels.ops.bottleneck import choose_plan
from gci_kernels.ops.bottleneck.plan import Plan, prefers_triton

pytestmark = pytest.mark.usefixtures("imagined_gpu")


def plan(
    tokens: int, dtype: torch.dtype, proved: frozenset[str] | None = ALL, impl: str = "auto", mixer="gate"
) -> Plan:
    return choose_plan(impl, tokens=tokens, dtype=dtype, device_type="cuda", mixer=mixer, proved=proved)


def test_auto_takes_what_is_proved_and_expected_to_be_faster():
    assert set(plan(8192, torch.bfloat16)) == {"triton"}
    assert plan(8192, torch.float16) == plan(512, torch.bfloat16) == plan(8192, torch.bfloat16)
    small = plan(511, torch.bfloat16)
    assert small.expand == "aten" and small.project == small.reduce == small.mix == small.dropout == "triton"
    assert plan(8192, torch.float32).expand == "aten" and plan(8192, torch.float32).reduce == "triton"
    for tokens, dtype in ((1, torch.bfloat16), (15, torch.float32), (8192, torch.float64)):
        assert set(plan(tokens, dtype)) == {"aten"}


@pytest.mark.parametrize(
    "kernel", sorted(set(hardware.names("triton")) - {"row_linear"})
)  # test_row_linear.py has its plan
def test_auto_leaves_out_what_is_not_proved(kernel):
    stage, mixer = ("mix", kernel) if kernel in ("gate", "attention") else (kernel, "gate")
    made = plan(8192, torch.bfloat16, ALL - {kernel}, mixer=mixer)._asdict()
    assert {name for name, impl in made.items() if impl == "aten"} == {stage}
    made = plan(8192, torch.bfloat16, frozenset({kernel}), mixer=mixer)._asdict()
    assert {name for name, impl in made.items() if impl == "triton"} == {stage}


@pytest.mark.parametrize("mixer", ("identity", "attention"))
def test_another_mixer_does_not_run_on_the_gates_proof(mixer):
    made = plan(8192, torch.bfloat16, ALL - {"attention"}, mixer=mixer)._asdict()
    assert {name for name, impl in made.items() if impl == "aten"} == {"mix"}


def test_auto_asks_for_no_proof_that_it_would_not_use(self_checks):
    assert set(plan(1, torch.bfloat16, proved=None)) == {"aten"} and self_checks == []
    assert plan(64, torch.bfloat16, proved=None).expand == "aten" and "expand" not in self_checks
    assert not prefers_triton("expand", 10**9, torch.float32)


def test_explicit_impls_need_no_proof(self_checks):
    assert set(plan(1, torch.bfloat16, frozenset(), "triton")) == {"triton"}
    assert set(plan(8192, torch.bfloat16, ALL, "aten")) == {"aten"}
    with pytest.raises(ValueError, match="impl='native' cannot run here"):
        plan(8192, torch.bfloat16, ALL, "native")
    assert self_checks == []


def test_the_cpu_is_never_given_triton(self_checks, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    made = choose_plan("auto", tokens=2048, dtype=torch.float32, device_type="cpu", proved=ALL)
    assert "triton" not in made and self_checks == []


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_a_compiled_function_asks_while_it_is_traced(self_checks, backend):
    """The answer, self check included, is a constant of the graph: nothing breaks it and nothing of it is traced."""

    def function(x):
        made = choose_plan("auto", tokens=x.shape[0], dtype=torch.bfloat16, device_type="cuda", mixer="gate")
        return x * (2 if made.project == "triton" else 3) + (10 if made.expand == "triton" else 20), made.key

    torch._dynamo.reset()
    with pytest.warns(RuntimeWarning, match="'expand' failed its check"):
        y, key = torch.compile(function, fullgraph=True, backend=backend)(torch.ones(600))
    assert key == "triton/triton/aten/triton/triton" and torch.equal(y, torch.full((600,), 22.0))
    assert sorted(self_checks) == ["dropout", "expand", "gate", "project", "reduce"]
    torch._dynamo.reset()
