"""What is trained: how a new adapter begins, and an adapter that is trained further."""

from __future__ import annotations

import numpy as np
import pytest
from small import random_adapter, random_tokens
from trained import adapted_modules, few_examples, golden_engine, trained_model
from training import curve, options, small_engine, write_pairs

from openelm_mlx.device import mx, nn, utils
from openelm_mlx.engine.adapter_files import read_adapter, write_adapter
from openelm_mlx.engine.loading import Engine
from openelm_mlx.errors import FinetuneError, OptionError
from openelm_mlx.finetune import finetune
from openelm_mlx.finetune.batches import Shape, packed
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.finetune.step import Step
from openelm_mlx.finetune.trainable import (
    adapter_of,
    base_of,
    continued,
    form_of,
    rounding,
    trainable,
)
from openelm_mlx.model.adapters import Adapter, dense
from openelm_mlx.model.config import EMBEDDINGS, HEAD


def names_of(model) -> set[str]:
    return {name for name, _ in utils.tree_flatten(model.trainable_parameters())}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_new_adapter_begins_as_peft_does_and_changes_nothing(method) -> None:
    engine = golden_engine("tied-gqa4")
    chosen = FinetuneOptions(method=method, rank=8, targets=("qkv_proj", "proj_2"))
    model = trainable(engine, chosen)
    leaves = ("a", "b") if method == "lora" else ("a", "b", "m")
    places = [
        f"transformer.layers.{n}.{stem}"
        for n in range(3)
        for stem in ("attn.qkv_proj", "ffn.proj_2")
    ]
    assert names_of(model) == {f"{place}.{leaf}" for place in places for leaf in leaves}
    tokens = random_tokens(engine.config, 1, 6)
    assert mx.allclose(model(tokens), engine.model(tokens), atol=1e-4)
    seen = []
    for module in adapted_modules(model).values():
        # kaiming_uniform_(a=sqrt(5)) of [rank, columns]: within sqrt(6 / (1 + 5) / columns)
        bound = module.a.shape[1] ** -0.5
        a = np.array(module.a)
        assert 0.9 * bound < np.abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not module.b.any().item()
        if method == "dora":
            norms = np.linalg.norm(np.array(dense(module.base)), axis=1)
            assert module.m.tolist() == pytest.approx(norms.tolist(), rel=1e-5)
        seen.append(a.ravel()[0])
    assert len({*seen}) == len(seen)
    engine.model.set_dtype(mx.bfloat16)
    again = trainable(engine, chosen)
    assert mx.array_equal(again.layers[0].attn.qkv_proj.a, model.layers[0].attn.qkv_proj.a)
    assert {array.dtype for _, array in utils.tree_flatten(again.trainable_parameters())} == {
        mx.float32
    }
    assert rounding(again) == ""


def test_weights_that_are_trained_in_16_bits_are_told() -> None:
    engine = golden_engine("tied-gqa4")
    full = FinetuneOptions(method="full")
    assert rounding(trainable(engine, full)) == ""
    engine.model.set_dtype(mx.bfloat16)
    said = "The weights are trained in bfloat16, which rounds small updates away; float32 does not."
    assert rounding(trainable(engine, full)) == said


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_quantized_model_gets_an_adapter(method) -> None:
    engine = golden_engine("tied-gqa4")
    nn.quantize(engine.model, 32, 8)
    chosen = FinetuneOptions(method=method, rank=2)
    model = trained_model(engine, chosen)
    found = few_examples(engine.config.vocab_size)
    _, grads = Step(model, chosen).gradients(packed([found], Shape(1, 17, 17, 3)), mx.random.key(0))
    flat = dict(utils.tree_flatten(grads))
    assert flat.keys() == names_of(model)
    assert len(flat) == 3 * 4 * (2 if method == "lora" else 3)
    assert all(grad.any().item() for grad in flat.values())


def with_adapter(engine: Engine, folder, kind: str) -> Engine:
    """Return the engine with a random adapter that comes from a folder."""
    dora = kind.endswith("dora")
    adapter = random_adapter(engine.model, 3, dora, tied="tied" in kind)
    parts = {stem: part for stem, part in adapter.parts.items() if stem != HEAD or "tied" in kind}
    if "tied" not in kind:
        parts.pop(EMBEDDINGS)
    write_adapter(folder, Adapter("random", parts), kind.split()[0], engine.config)
    return engine.load_adapter(folder)


@pytest.mark.parametrize("kind", ["mlx-lm tied lora", "mlx-lm tied dora", "peft lora", "peft dora"])
def test_an_adapter_is_trained_from_where_it_is(tmp_path, kind) -> None:
    base = golden_engine("tied-gqa4")
    tokens = random_tokens(base.config, 1, 8)
    engine = with_adapter(base, tmp_path / "first", kind)
    assert base_of(engine).name == base.name
    assert base_of(base) is base
    assert mx.array_equal(base_of(engine).model(tokens), base.model(tokens))
    chosen = continued(engine, FinetuneOptions())
    assert chosen.method == kind.split()[-1]
    model = trainable(engine, chosen)
    # as those of a checkpoint, from which a run goes on bit for bit: rounding depends on it
    trained = utils.tree_flatten(model.trainable_parameters())
    assert all(memoryview(array).c_contiguous for _, array in trained)
    assert len(names_of(model)) == (3 if "dora" in kind else 2) * (13 if "tied" in kind else 12)
    assert mx.allclose(model(tokens), engine.model(tokens), rtol=1e-5, atol=1e-5)
    adapter = adapter_of(model, "second")
    assert form_of(adapter, base.config) == "mlx-lm"
    write_adapter(tmp_path / "second", adapter, "mlx-lm", base.config)
    again = read_adapter(tmp_path / "second", base.config)
    assert again.parts.keys() == engine.adapter.parts.keys()
    base.adapters.clear()
    logits = base.load_adapter(again).model(tokens)
    assert mx.allclose(logits, engine.model(tokens), rtol=1e-5, atol=1e-5)


def test_a_run_goes_on_from_an_adapter(tiny, tmp_path) -> None:
    """Its first loss is what the adapter has reached, and it does not change that one."""
    base, pairs = small_engine(tiny), write_pairs(tmp_path / "pairs.jsonl")
    own = {"validation_share": 0.25, "steps": 2}
    first = finetune(base, pairs, tmp_path / "one", options(**own))
    engine = base.load_adapter(tmp_path / "one")
    before = mx.array(engine.adapter.parts["transformer.layers.0.ffn.proj_2"].b)
    more = FinetuneOptions(batch=2, length=48, packing=False, **own)
    second = finetune(engine, pairs, tmp_path / "two", more)
    assert second.first_validation_loss == pytest.approx(first.best_validation_loss, rel=1e-5)
    assert second.model == first.model
    assert second.options.rank == 2
    assert second.notes == ("The adapter one is trained further.",)
    assert mx.array_equal(before, engine.adapter.parts["transformer.layers.0.ffn.proj_2"].b)
    base.load_adapter(tmp_path / "two")  # it says that it was made for the base


def test_a_run_from_an_adapter_is_resumed_with_it(tiny, tmp_path) -> None:
    base, pairs = small_engine(tiny), write_pairs(tmp_path / "pairs.jsonl")
    own = options(steps=2)
    finetune(base, pairs, tmp_path / "one", own)
    engine = base.load_adapter(tmp_path / "one")
    finetune(engine, pairs, tmp_path / "whole", own)

    def stop(row, steps):
        if row["step"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(engine, pairs, tmp_path / "stopped", own, progress=stop)
    with pytest.raises(FinetuneError) as raised:
        finetune(base, pairs, tmp_path / "stopped", own, resume=True)
    assert str(raised.value).startswith(f"{tmp_path / 'stopped'} has a run with other adapter")
    finetune(engine, pairs, tmp_path / "stopped", own, resume=True)
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")


def test_options_that_are_not_those_of_the_adapter_are_refused(tmp_path) -> None:
    base = golden_engine("tied-gqa4")
    engine = with_adapter(base, tmp_path / "mine", "mlx-lm lora")
    for name, value, theirs in (
        ("rank", 7, "5"),
        ("method", "dora", "'lora'"),
        ("method", "full", "'lora'"),
        ("alpha", 2.0, "1.25"),
        ("targets", ("qkv_proj",), "('qkv_proj', 'out_proj', 'proj_1', 'proj_2')"),
    ):
        with pytest.raises(OptionError) as raised:
            continued(engine, FinetuneOptions(**{name: value}))
        assert str(raised.value) == (
            f"{name} is {value!r}, but that of the adapter mine, which is trained further, is "
            f"{theirs}; leave it"
        )
    head = {HEAD: random_adapter(base.model, 3).parts[HEAD]}
    with pytest.raises(OptionError) as raised:
        continued(base.load_adapter(Adapter("odd", head)), FinetuneOptions())
    assert str(raised.value) == (
        "odd adapts the head of a tied embedding, which no folder can state; merge it with "
        "`openelm fuse`, and train what that gives"
    )
