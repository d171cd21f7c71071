"""low_rank_attention and Sequence: what they accept and refuse, and which implementation is chosen."""

import pytest
import torch

from gci_kernels.ops import Sequence, low_rank_attention
from gci_kernels.ops.attention import api, choose_attention
from gci_kernels.ops.bottleneck.plan import choose_plan

pytestmark = pytest.mark.usefixtures("poisoned")


def test_auto_takes_the_native_kernels_where_they_can_run():
    for dtype, expected in ((torch.float32, "native"), (torch.bfloat16, "native"), (torch.float16, "aten")):
        q, k, v = torch.randn(3, 1, 40, 8).to(dtype)
        assert torch.equal(
            low_rank_attention(q, k, v, num_heads=2), low_rank_attention(q, k, v, num_heads=2, impl=expected)
        )


STARTS, DTYPES = {"attention": 16}, (torch.float32, torch.bfloat16, torch.float16)


def chosen(impl="auto", tokens=16, dtype=torch.float32, device_type="cuda", starts=STARTS):
    return choose_attention(impl, tokens=tokens, dtype=dtype, device_type=device_type, starts=starts)


def test_the_choice_is_a_function_of_tokens_dtype_and_device(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for dtype in DTYPES:
        assert chosen(dtype=dtype) == "triton" and chosen(tokens=15, dtype=dtype) == "aten"
        assert chosen(dtype=dtype, starts={}) == chosen(dtype=dtype, impl="aten") == "aten"
        assert chosen(dtype=dtype, device_type="cpu") == ("aten" if dtype == torch.float16 else "native")
        assert chosen(dtype=dtype, device_type="meta") == "aten"
        assert chosen("triton", 1, dtype, starts={}) == "triton"  # asked for by name, it need not be proved
    assert chosen(dtype=torch.float64) == "aten" and chosen(dtype=torch.float64, device_type="cpu") == "native"
    for impl, dtype, device_type in (("native", DTYPES[0], "cuda"), ("triton", DTYPES[0], "cpu")):
        with pytest.raises(ValueError, match=f"impl='{impl}' cannot run here: its kernels run on"):
            chosen(impl, dtype=dtype, device_type=device_type)
    with pytest.raises(ValueError, match="impl='triton' cannot run here: its kernels take .* not float64"):
        chosen("triton", dtype=torch.float64)


def test_the_same_is_chosen_for_alora_linear():
    for dtype in (*DTYPES, torch.float64):
        for device_type in ("cpu", "cuda", "meta"):
            for tokens in (1, 15, 16, 5000):
                where = {"tokens": tokens, "dtype": dtype, "device_type": device_type}
                for starts in ({}, STARTS):
                    plan = choose_plan("auto", **where, mixer="attention", starts=starts)
                    assert plan.mix == chosen(**where, starts=starts), where


def test_auto_asks_the_chooser(monkeypatch):
    asked = []
    monkeypatch.setattr(api, "choose_attention", lambda impl, **what: asked.append((impl, what)) or "aten")
    low_rank_attention(**base())
    where = {"dtype": torch.float32, "device_type": "cpu", "device": torch.device("cpu")}
    assert asked == [("auto", {"tokens": 10} | where)]


def base(**change):
    q, k, v = (torch.randn(2, rows, 6) for rows in (5, 8, 8))
    return {"q": q, "k": k, "v": v, "num_heads": 2, "sequence": None, **change}


ids = torch.zeros(2, 8, dtype=torch.int32)
BAD = [
    (dict(q=[1.0]), TypeError, "q must be a tensor, got list"),
    (dict(v=None), TypeError, "v must be a tensor, got NoneType"),
    (dict(q=torch.zeros(2, 5, 6, dtype=torch.int64)), TypeError, "q must be floating point, got torch.int64"),
    (dict(q=torch.zeros(5, 6)), ValueError, r"q must be \[batch, time, r\] with r from 1 to 256, got \[5, 6\]"),
    (dict(q=torch.zeros(2, 5, 0)), ValueError, r"r from 1 to 256, got \[2, 5, 0\]"),
    (dict(q=torch.zeros(2, 5, 257)), ValueError, r"r from 1 to 256, got \[2, 5, 257\]"),
    (dict(k=torch.zeros(2, 4, 6)), ValueError, r"k must be \[2, keys, 6\] with keys >= time=5, got \[2, 4, 6\]"),
    (dict(k=torch.zeros(3, 8, 6)), ValueError, r"k must be \[2, keys, 6\]"),
    (dict(k=torch.zeros(2, 8, 5)), ValueError, r"k must be \[2, keys, 6\]"),
    (dict(v=torch.zeros(2, 7, 6)), ValueError, r"v must be \[2, 8, 6\] like k, got \[2, 7, 6\]"),
    (dict(k=torch.zeros(2, 8, 6, device="meta")), ValueError, "k must be on q's device cpu, got meta"),
    (dict(v=torch.zeros(2, 8, 6).double()), TypeError, "v must have q's dtype torch.float32, got torch.float64"),
    (dict(num_heads=4), ValueError, "num_heads must divide r=6, got 4"),
    (dict(num_heads=0), ValueError, "num_heads must divide r=6, got 0"),
    (dict(num_heads=2.0), TypeError, "num_heads must be an integer, got float"),
    (dict(sequence=ids), TypeError, "sequence must be a Sequence or None, got Tensor"),
    (dict(sequence=Sequence(ids)), ValueError, "sequence.past must be keys - time = 3, got 0"),
    (dict(sequence=Sequence(ids[:, :7], 3)), ValueError, r"sequence.segments must be \[2, 8\], got \[2, 7\]"),
    (dict(sequence=Sequence(ids.to("meta"), 3)), ValueError, "sequence.segments must be on the device cpu, got meta"),
    (dict(impl="fast"), ValueError, "impl='fast' is unknown; allowed: 'auto', 'reference', 'aten', 'upcast', 'native'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        low_rank_attention(**base(**change))


def test_too_wide_heads_and_impls_that_cannot_run(monkeypatch):
    wide = torch.zeros(1, 1, 256)
    with pytest.raises(ValueError, match="num_heads must be at least 4 for r=256, got 2"):
        low_rank_attention(wide, wide, wide, num_heads=2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl='triton' cannot run here: its kernels run on GPU tensors, not cpu"):
        low_rank_attention(**base(impl="triton"))
    meta = {name: value.to("meta") for name, value in base().items() if name in "qkv"}
    with pytest.raises(ValueError, match="impl='native' cannot run here: its kernels run on CPU tensors, not meta"):
        low_rank_attention(**base(**meta, impl="native"))


def test_sequence_from_mask():
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0]])
    for dtype in (torch.int64, torch.bool, torch.float32, torch.bfloat16):
        sequence = Sequence.from_mask(mask.to(dtype), past=1)
        assert sequence.past == 1 and sequence.segments.dtype == torch.int32
        assert sequence.segments.tolist() == [[-1, -1, 0, 0], [0, -1, 0, -1]]
    assert Sequence.from_mask(torch.ones(2, 3), past=2).segments is None
    assert Sequence.from_mask(torch.zeros(1, 2)).segments.tolist() == [[-1, -1]]
    assert Sequence.from_mask(torch.ones(0, 4)).segments is None


POSITIONS = [
    # positions, mask or None, segments or None
    ([0, 1, 2, 3], None, None),
    ([7, 8, 9], None, None),
    ([0, 1, 2, 0, 1, 0], None, [0, 0, 0, 1, 1, 2]),
    ([0, 1, 5, 6, 6], None, [0, 0, 1, 1, 2]),
    ([1, 1, 0, 1, 2], [0, 0, 1, 1, 1], [-1, -1, 0, 0, 0]),  # left padding, as transformers fills it
    ([0, 1, 2, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, -1, -1]),
    ([0, 1, 1, 2], [1, 0, 1, 1], [0, -1, 0, 0]),  # a hole over which positions stand still
    ([0, 1, 2, 3], [1, 0, 1, 1], [0, -1, 0, 0]),  # and one over which they run on
    ([0, 1, -1, 0, 1, 0], [1, 1, 0, 1, 1, 1], [0, 0, -1, 1, 1, 2]),  # packed with padding between
    ([0, 1, 2], [0, 0, 0], [-1, -1, -1]),
    ([0, 1, 2], [1, 1, 1], None),
]


@pytest.mark.parametrize(("positions", "mask", "expected"), POSITIONS, ids=str)
def test_sequence_from_position_ids(positions, mask, expected):
    mask = None if mask is None else torch.tensor([mask])
    for dtype in (torch.int64, torch.int32):
        sequence = Sequence.from_position_ids(torch.tensor([positions], dtype=dtype), 1, attention_mask=mask)
        assert sequence.past == 1
        assert sequence.segments is None if expected is None else sequence.segments.tolist() == [expected]
        assert expected is None or sequence.segments.dtype == torch.int32


def test_sequence_from_cu_seqlens():
    for dtype in (torch.int32, torch.int64):
        sequence = Sequence.from_cu_seqlens(torch.tensor([0, 2, 3, 6], dtype=dtype), 6)
        assert sequence.segments.tolist() == [[0, 0, 1, 2, 2, 2]] and sequence.segments.dtype == torch.int32
    assert Sequence.from_cu_seqlens(torch.tensor([0, 4]), 4).segments is None
    positions = torch.tensor([[0, 1, 0, 0, 1, 2]])
    assert torch.equal(Sequence.from_position_ids(positions).segments, sequence.segments)


mask = torch.ones(2, 3)
BAD_SEQUENCES = [
    (lambda: Sequence([0]), TypeError, "segments must be a tensor or None, got list"),
    (lambda: Sequence(torch.zeros(2, 3)), TypeError, "segments must be torch.int32, got torch.float32"),
    (lambda: Sequence(torch.zeros(3).int()), ValueError, r"segments must be \[batch, keys\], got \[3\]"),
    (lambda: Sequence(None, -1), ValueError, "past must be at least 0, got -1"),
    (lambda: Sequence(None, 1.0), TypeError, "past must be an integer, got float"),
    (lambda: Sequence.from_mask(mask, 4), ValueError, "past must be at most keys=3, got 4"),
    (lambda: Sequence.from_mask([1]), TypeError, "attention_mask must be a tensor, got list"),
    (lambda: Sequence.from_mask(mask[0]), ValueError, r"attention_mask must be \[batch, keys\], got \[3\]"),
    (lambda: Sequence.from_mask(mask * 2), ValueError, "attention_mask must hold 0 and 1 only, got 2.0"),
    (lambda: Sequence.from_mask(mask * float("nan")), ValueError, "attention_mask must hold 0 and 1 only, got nan"),
    (lambda: Sequence.from_position_ids(None), TypeError, "position_ids must be a tensor, got NoneType"),
    (lambda: Sequence.from_position_ids(mask), TypeError, "position_ids must have an integer dtype, got torch.float32"),
    (lambda: Sequence.from_position_ids(mask[0].int()), ValueError, r"position_ids must be \[batch, keys\], got \[3\]"),
    (lambda: Sequence.from_position_ids(mask.int(), 0, mask[:, 1:]), ValueError,
     r"attention_mask must be \[2, 3\] like position_ids, got \[2, 2\]"),
    (lambda: Sequence.from_cu_seqlens([0, 3], 3), TypeError, "cu_seqlens must be a tensor, got list"),
    (lambda: Sequence.from_cu_seqlens(torch.tensor([0.0, 3]), 3), TypeError, "cu_seqlens must have an integer dtype"),
    (lambda: Sequence.from_cu_seqlens(torch.tensor([0]), 0), ValueError, r"must be \[n \+ 1\] with n >= 1, got \[1\]"),
    (lambda: Sequence.from_cu_seqlens(torch.tensor([1, 3]), 3), ValueError, "cu_seqlens must start at 0, got 1"),
    (lambda: Sequence.from_cu_seqlens(torch.tensor([0, 3]), 4), ValueError, "cu_seqlens must end at tokens=4, got 3"),
    (lambda: Sequence.from_cu_seqlens(torch.tensor([0, 2, 2, 3]), 3), ValueError, "cu_seqlens must rise, got 2 after"),
    (lambda: Sequence.from_cu_seqlens(torch.tensor([0, 5, 3]), 3), ValueError, "cu_seqlens must rise, got 3 after 5"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), BAD_SEQUENCES, ids=[m for _, _, m in BAD_SEQUENCES])
def test_bad_sequence_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_past_beyond_whole_rows_is_named_too():
    """Where the mask says nothing the segments are left out, but not their check."""
    with pytest.raises(ValueError, match="past must be at most keys=3, got 4"):
        Sequence.from_position_ids(torch.arange(3).expand(2, 3), past=4)
