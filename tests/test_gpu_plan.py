"""The plans that "auto" makes on a GPU of what is proved and measured there; on an imagined one."""

import pytest
import torch
from toy_gpu import ALL

from gci_kernels import hardware
from gci_kernels.hardware import records, timing
from gci_kernels.ops.bottleneck import choose_plan
from gci_kernels.ops.bottleneck.plan import Plan

pytestmark = pytest.mark.usefixtures("imagined_gpu")
#: Every kernel is no slower than the library from 512 tokens.
STARTS = dict.fromkeys(ALL, 512)


def plan(
    tokens: int, dtype: torch.dtype, starts: dict[str, int | None] | None = STARTS, impl: str = "auto", mixer="gate",
    **options,
) -> Plan:  # fmt: skip
    return choose_plan(impl, tokens=tokens, dtype=dtype, device_type="cuda", mixer=mixer, starts=starts, **options)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_auto_takes_a_kernel_from_the_tokens_at_which_it_pays(dtype):
    assert set(plan(8192, dtype)) == set(plan(512, dtype)) == {"triton"}
    assert set(plan(511, dtype)) == {"aten"}
    made = plan(1024, dtype, STARTS | {"expand": 2048, "reduce": None})
    assert made.expand == made.reduce == "aten" and made.project == made.mix == made.dropout == "triton"
    assert plan(2048, dtype, STARTS | {"expand": 2048}).expand == "triton"
    assert set(plan(8192, torch.float64)) == set(plan(8192, dtype, {})) == {"aten"}


@pytest.mark.parametrize(
    "kernel", sorted(set(hardware.names("triton")) - {"row_linear"})
)  # test_row_linear.py has its plan
def test_auto_leaves_out_what_is_not_proved(kernel):
    stage, mixer = ("mix", kernel) if kernel in ("gate", "attention") else (kernel, "gate")
    others = {name: start for name, start in STARTS.items() if name != kernel}
    made = plan(8192, torch.bfloat16, others, mixer=mixer)._asdict()
    assert {name for name, impl in made.items() if impl == "aten"} == {stage}
    made = plan(8192, torch.bfloat16, {kernel: 512}, mixer=mixer)._asdict()
    assert {name for name, impl in made.items() if impl == "triton"} == {stage}


@pytest.mark.parametrize("mixer", ("identity", "attention"))
def test_another_mixer_does_not_run_on_the_gates_proof(mixer):
    made = plan(8192, torch.bfloat16, STARTS | {"attention": None}, mixer=mixer)._asdict()
    assert {name for name, impl in made.items() if impl == "aten"} == {"mix"}


def test_auto_asks_for_no_proof_that_it_would_not_use(self_checks):
    for tokens in (1, timing.TOKENS[0] - 1):
        assert set(plan(tokens, torch.bfloat16, None)) == {"aten"} and self_checks == []
    with pytest.warns(RuntimeWarning, match="'expand' failed its check"):
        made = plan(timing.TOKENS[0], torch.bfloat16, None, dropout=False)
    assert set(made) == {"aten"}, "by the times, the library is faster for so few tokens"
    assert sorted(self_checks) == ["expand", "gate", "project", "reduce"]
    made = plan(1024, torch.bfloat16, None)
    assert made.key == "triton/triton/aten/triton/triton"


def test_without_an_alternative_a_proved_kernel_is_taken_unmeasured(self_checks):
    few = [plan(tokens, torch.bfloat16, None, mixer="attention").mix for tokens in (15, 16)]
    assert few == ["aten", "triton"] and self_checks == ["attention"]


def test_explicit_impls_need_no_proof(self_checks):
    assert set(plan(1, torch.bfloat16, {}, "triton")) == {"triton"}
    assert set(plan(8192, torch.bfloat16, STARTS, "aten")) == {"aten"}
    with pytest.raises(ValueError, match="impl='native' cannot run here"):
        plan(8192, torch.bfloat16, STARTS, "native")
    assert self_checks == []


def test_the_cpu_is_never_given_triton(self_checks, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    made = choose_plan("auto", tokens=2048, dtype=torch.float32, device_type="cpu", starts=STARTS)
    assert "triton" not in made and self_checks == []


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_a_compiled_function_asks_while_it_is_traced(self_checks, backend):
    """The answer, self check included, is a constant of the graph: nothing breaks it and nothing of it is traced."""

    def function(x):
        made = choose_plan("auto", x.shape[0], torch.bfloat16, "cuda", "gate", device=torch.device("cuda", 1))
        return x * (2 if made.project == "triton" else 3) + (10 if made.expand == "triton" else 20), made.key

    torch._dynamo.reset()
    with pytest.warns(RuntimeWarning, match="'expand' failed its check"):
        y, key = torch.compile(function, fullgraph=True, backend=backend)(torch.ones(1024))
    assert key == "triton/triton/aten/triton/triton" and torch.equal(y, torch.full((1024,), 22.0))
    assert sorted(self_checks) == ["dropout", "expand", "gate", "project", "reduce"]
    assert {key[-1] for key in records.starts} == {1}, "asked about x's GPU"
    torch._dynamo.reset()
