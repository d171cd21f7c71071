"""LoKI's attribution: the published numbers, a plain pass for each layer on many architectures, padding, bad input."""

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import golden_data
import pytest
import torch
import transformers
from torch import nn

from gci_kernels.accuracy import relative_error
from gci_kernels.bench import attribution as bench
from gci_kernels.bench.loki_baseline import published_attribution
from gci_kernels.bench.models import load_model
from gci_kernels.loki import all_positions, attribute, attribution, last_position, product, prompt

pytestmark = pytest.mark.usefixtures("one_thread")
PATHS = ("last_position", "all_positions")
SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT = dict(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.3, bos_token_id=1,
           eos_token_id=2)  # fmt: skip
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "llama, tied, biases": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True, mlp_bias=True),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    "mistral, inside its window": lambda: transformers.MistralConfig(**GROUPED, head_dim=8, sliding_window=64),
    "mistral, window of 4": lambda: transformers.MistralConfig(**GROUPED, head_dim=8, sliding_window=4),
    "gemma": lambda: transformers.GemmaConfig(**GROUPED, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=4),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=4),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "phi": lambda: transformers.PhiConfig(**SIZES),
    "granite": lambda: transformers.GraniteConfig(**GROUPED, residual_multiplier=0.5, logits_scaling=3.0),
    "gpt2": lambda: transformers.GPT2Config(**GPT),
    "falcon": lambda: transformers.FalconConfig(
        **{name: SIZES[name] for name in SIZES if name not in ("intermediate_size", "max_position_embeddings")}
    ),
}
# Gemma 2 caps its attention's scores, which "sdpa" can't; its float32 softmax is all that differs at 1e-7.
EAGER = {"gemma2"}


def make(name: str = "llama", dtype: torch.dtype = torch.float64, attention: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    attention = attention or ("eager" if name in EAGER else "sdpa")
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name](), attn_implementation=attention)
    for parameter in model.parameters():  # norms and biases that are not all one or all zero
        if parameter.dim() == 1:
            nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    return model.to(dtype).eval().requires_grad_(False)


def padded(samples: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples [tokens] side by side, with ids of no vocabulary as padding, and their mask."""
    width = max(map(len, samples))
    ids = torch.full((len(samples), width), -100)
    for row, sample in zip(ids, samples, strict=True):
        row[slice(len(sample)) if side == "right" else slice(width - len(sample), None)] = sample
    return ids, (ids != -100).long()


def samples_of(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(3, 97, (length,)) for length in lengths]


def plain(model: nn.Module, samples: list[torch.Tensor], path: str, **options) -> torch.Tensor:
    return torch.stack([published_attribution(model, sample[None], path=path, **options) for sample in samples])


@pytest.mark.smoke
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", golden_data.ATTRIBUTION)
def test_golden(name, path):
    settings, tensors = golden_data.load(name)
    # The published run's attention rounds its softmax to float32; so does this one.
    config = transformers.LlamaConfig(**json.loads(settings["config"]), attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).double()
    model.load_state_dict({name.removeprefix("model."): tensors[name] for name in tensors if name.startswith("model.")})
    scores = attribute(model, tensors["input_ids"], path=path, steps=int(settings["steps"]))
    assert scores.shape == (1, *tensors[path].shape) and scores.dtype == torch.float32
    for layer, expected in zip(scores[0], tensors[path], strict=True):
        assert relative_error(layer, expected) < 1e-5
    target = torch.tensor([int(settings["target"])])
    assert torch.equal(attribute(model, tensors["input_ids"], path=path, target=target), scores)
    plainly = published_attribution(model.requires_grad_(False), tensors["input_ids"], path=path)
    assert relative_error(plainly, tensors[path]) < 1e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_a_pass_for_each_layer(name, path):
    model, samples = make(name), samples_of(11, 6, 9)
    expected = plain(model, samples, path)
    for side in ("right", "left"):
        scores = attribute(model, *padded(samples, side), path=path)
        for sample, truth in zip(scores, expected, strict=True):
            assert relative_error(sample, truth) < 1e-6, side


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("steps", [2, 5])
def test_steps_one_token_and_a_given_target(path, steps):
    model, samples = make(), samples_of(1, 7, 7)
    targets = torch.tensor([5, 96, 0])
    scores = attribute(model, *padded(samples, "left"), path=path, steps=steps, target=targets)
    for sample, target, found in zip(samples, targets, scores, strict=True):
        expected = published_attribution(model, sample[None], path=path, steps=steps, target=target)
        assert relative_error(found, expected) < 1e-6
    same = attribute(model, samples[1][None], path=path, steps=steps, target=96)
    assert relative_error(same[0], scores[1]) < 1e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("limit", [1, 4 * 7 + 1])
def test_few_streams_at_a_time(monkeypatch, path, limit, attention):
    """Layers go through the step in groups where all together would be too many, and kept prefixes are bounded."""
    model, samples = make("gemma3", attention=attention), samples_of(9, 9, 5)
    ids, mask = padded(samples, "right")
    together = attribute(model, ids, mask, path=path)
    for module in (attribution, last_position):
        monkeypatch.setattr(module, "MAX_STREAMS", limit)
    monkeypatch.setitem(all_positions.CACHE_BYTES, "cpu", limit)
    assert relative_error(attribute(model, ids, mask, path=path), together) < 1e-6


def test_workers_give_what_one_after_another_gives(monkeypatch):
    """Whole prompts run in two Python threads, with one thread of torch's each."""
    model, ids = make("llama", torch.float32), samples_of(30)[0][None]
    seen, prefixes = set(), all_positions._fill_caches

    def spy(*args):
        seen.add((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        prefixes(*args)

    def serially(function, parts):
        torch.set_num_threads(1)
        done = list(map(function, parts))
        torch.set_num_threads(2)
        return done

    monkeypatch.setattr(all_positions, "_parts", lambda *_: [slice(0, 2), slice(2, 5), slice(5, 6)])
    monkeypatch.setattr(all_positions, "_fill_caches", spy)
    torch.set_num_threads(2)
    scores = attribute(model, ids, path="all_positions")
    assert seen == {(False, 1)} and torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 2
    with monkeypatch.context() as patch:
        patch.setattr(all_positions, "workers", lambda _: contextlib.nullcontext(serially))
        assert torch.equal(attribute(model, ids, path="all_positions"), scores)
    assert seen == {(False, 1), (True, 1)}
    monkeypatch.setattr(all_positions, "_fill_caches", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attribute(model, ids, path="all_positions")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("bias", [True, False])
def test_products(monkeypatch, bias):
    layer, x = nn.Linear(70, 33, bias=bias).requires_grad_(False), torch.randn(2, 5, 70)
    with product.products(x):
        found = layer(x)
        assert torch.equal(layer(x.transpose(0, 1)), found.transpose(0, 1))
        # What oneDNN is not asked for: other dtypes, tensors of another kind.
        assert torch.equal(layer.double()(x.double()), nn.functional.linear(x.double(), layer.weight, layer.bias))
        assert layer.to("meta")(x.to("meta")).shape == (2, 5, 33)
    assert found.shape == (2, 5, 33)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *_: 1 / 0)
    for other in (x.double(), x.bfloat16(), x.to("meta")):
        with product.products(other):
            nn.functional.linear(x, x[0])


def test_products_are_right():
    layer, x = nn.Linear(70, 33).requires_grad_(False), torch.randn(2, 5, 70)
    with product.products(x):
        found = layer(x)
    assert relative_error(found, layer.double()(x.double())) < 1e-6


def test_groups_keep_as_much_as_they_may(monkeypatch):
    keys = torch.zeros(1, 1, 1, 5)  # 20 bytes, 40 with the values
    known = prompt.Prompt({}, keys, [], [], [], [(keys, keys)] * 4)
    monkeypatch.setitem(all_positions.CACHE_BYTES, "cpu", 2 * 80)
    # With two points, the layers' moved prompts keep 240, 160, 80 and 0 bytes.
    assert list(all_positions._groups(known, 2)) == [range(0, 1), range(1, 3), range(3, 4)]


def test_a_probability_of_almost_one_keeps_its_gradients_digits():
    logits = torch.tensor([[20.0, 0, 1]])
    found, exact = (prompt.probability_gradient(x, torch.tensor([0])) for x in (logits, logits.double()))
    assert relative_error(found, exact) < 1e-6


@pytest.mark.parametrize(("points", "count"), [(6, 1), (6, 2), (6, 4), (5, 2), (1, 1)])
@pytest.mark.parametrize("tokens", [1, 100, 200, 5000])
def test_parts_are_shared_evenly(points, count, tokens):
    parts = all_positions._parts(torch.zeros(1, tokens), points, count)
    assert [row for part in parts for row in range(points)[part]] == list(range(points))
    sizes = {part.stop - part.start for part in parts}
    assert max(sizes) - min(sizes) <= 1 and (len(parts) == points or len(parts) % count == 0)
    assert max(sizes) == 1 or max(sizes) * tokens <= all_positions.TOKENS_TOGETHER["cpu"] + tokens


@pytest.mark.parametrize("path", PATHS)
def test_autocast_changes_nothing(path):
    model, ids = make("llama", torch.float32), samples_of(9)[0][None]
    expected = attribute(model, ids, path=path)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attribute(model, ids, path=path), expected)


@pytest.mark.parametrize("path", PATHS)
def test_float32_is_as_exact_as_the_published_procedure(path):
    model, sample = make("llama", torch.float64), samples_of(24)[0][None]
    truth = published_attribution(model, sample, path=path)
    model.float()
    bound = 2 * relative_error(published_attribution(model, sample, path=path), truth) + 1e-6
    assert relative_error(attribute(model, sample, path=path)[0], truth) <= bound


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16(path):
    model, sample = make("llama", torch.float64), samples_of(24)[0][None]
    truth = attribute(model, sample, path=path)
    target = model(sample).logits[:, -1].argmax(-1)
    assert relative_error(attribute(model.bfloat16(), sample, path=path, target=target), truth) < 0.2


def test_leaves_the_model_as_it_was():
    model, (sample,) = make("llama", torch.float32), samples_of(6)
    model.train().requires_grad_(True)
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    with torch.inference_mode():
        first = attribute(model, sample[None])
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not hooks
    with pytest.raises(FloatingPointError), torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] = torch.nan
        attribute(model, sample[None])
    assert [module.training for module in model.modules()] == modes
    assert torch.isfinite(first).all()


def test_peft_model():
    import peft

    model, (sample,) = make(), samples_of(8)
    expected = attribute(model, sample[None])
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"], r=2))
    assert relative_error(attribute(wrapped, sample[None]), expected) < 1e-6


IDS = torch.ones(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "both"}, "path='both'"),
        ({"steps": 0}, "steps must be"),
        ({"steps": 1, "path": "all_positions"}, "at least 2"),
        ({"steps": 7.0}, "steps must be"),
        ({"input_ids": IDS[0]}, r"input_ids must be \[samples, tokens\]"),
        ({"input_ids": IDS[:0]}, "at least one of each"),
        ({"input_ids": IDS.float()}, "float32"),
        ({"input_ids": IDS * 97}, "from 0 to 96, got 97"),
        ({"attention_mask": IDS[:1]}, r"like input_ids, \[2, 4\], got \[1, 4\]"),
        ({"attention_mask": IDS * 2}, "0 and 1 alone"),
        ({"attention_mask": IDS * torch.tensor([[1], [0]])}, "sample 1 without a token"),
        ({"target": 97}, "target must hold token ids from 0 to 96, got 97"),
        ({"target": torch.tensor([1])}, r"\[2\] int64 token ids, got \[1\]"),
        ({"target": 0.5}, "target must be"),
        ({"projection": "up"}, "none of these projections: up"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        attribute(make(dtype=torch.float32), **{"input_ids": IDS} | arguments)


@pytest.mark.parametrize("name", ("input_ids", "attention_mask"))
def test_lists_are_refused_by_name(name):
    with pytest.raises(TypeError, match=rf"{name} must be a tensor \[samples, tokens\], got list"):
        attribute(make(dtype=torch.float32), **{"input_ids": IDS} | {name: IDS.tolist()})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: transformers.MixtralConfig(**GROUPED), "none of these projections"),
        (lambda: transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=3, n_head=4), "ALiBi"),
        (lambda: transformers.OPTConfig(vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=3,
                                        num_attention_heads=4, word_embed_proj_dim=32), "batch, tokens, out"),
        (lambda: transformers.LlamaConfig(**GROUPED, layer_types=["linear_attention"] * 3), "linear_attention"),
    ],
)  # fmt: skip
def test_models_that_are_not_supported(config, message, path):
    model = transformers.AutoModelForCausalLM.from_config(config())
    with pytest.raises(ValueError, match=message):
        attribute(model, IDS, path=path)


@pytest.mark.parametrize("path", PATHS)
def test_a_model_that_looks_at_more_than_keys_and_values_is_refused(path):
    model = make()

    def add_length(module, args, kwargs):
        hidden = args[0] if args else kwargs.pop("hidden_states")
        return (hidden + hidden.shape[1] / 10,), kwargs

    model.model.layers[1].mlp.register_forward_pre_hook(add_length, with_kwargs=True)
    with pytest.raises(ValueError, match="can't be computed a position at a time"):
        attribute(model, samples_of(9)[0][None], path=path)


def test_attention_without_masks_is_refused():
    model = make()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="set_attn_implementation"):
        attribute(model, IDS)


@pytest.mark.parametrize("path", PATHS)
def test_scores_that_are_not_finite(path):
    model = make()
    model.model.layers[1].mlp.down_proj.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="sample 0: the scores of layer"):
        attribute(model, IDS, path=path)


@pytest.mark.parametrize("path", PATHS)
def test_benchmark(path, capsys, tmp_path, monkeypatch):
    arguments = ["--model", "random-llama", "--tokens", "12", "--threads", "1", "--path", path]
    assert bench.main([*arguments, "--json", str(tmp_path / "x.json")]) == 0
    assert "times as fast" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "x.json").read_text())["paths"]
    assert result["error"] < 1e-3 and result["speedup"]["median"] > 0
    monkeypatch.setattr(bench, "published_attribution", lambda model, ids, **_: attribute(model, ids)[0] * 1.01)
    assert bench.main(arguments) == 1
    shown = capsys.readouterr()
    assert "No times are shown" in shown.err and not shown.out


@pytest.mark.slow
def test_smollm2_gives_the_published_scores():
    model, tokenizer = load_model("smollm2", torch.float32, torch.device("cpu"))
    model.eval().requires_grad_(False)
    ids = bench.sample(model, tokenizer, 32)
    for path in PATHS:
        assert relative_error(attribute(model, ids, path=path)[0], published_attribution(model, ids, path=path)) < 1e-3
