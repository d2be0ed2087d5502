"""Folders of adapters, loaded over a base: the logits of the merged model, and refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from adapter_folders import mlx_lm_folder, peft_folder
from formats import again, tokenizer_file
from golden_set import GOLDEN
from small import merged_model, random_adapter

from openelm_mlx import generate, load
from openelm_mlx.cli import main
from openelm_mlx.device import mx
from openelm_mlx.errors import CheckpointError, OptionError

TOKENS = mx.array([[1, 5, 9, 30, 12, 7, 7, 3]])
ALL = ("embedding", "attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2")


@pytest.fixture(scope="module")
def base(nano):
    return load(nano, "float32")


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Adapters of one base in the forms of mlx-lm and PEFT."""
    folder, config = tmp_path_factory.mktemp("adapters"), base.config
    mlx_lm_folder(folder / "story", config, ALL)
    peft_folder(folder / "law", config, ALL, {"transformer.layers.0.ffn.proj_1": 2}, seed=1)
    peft_folder(folder / "dora", config, ALL, seed=2, use_dora=True)
    return folder


@pytest.mark.parametrize("name", ["story", "dora"])
def test_a_folder_gives_the_logits_of_the_model_that_convert_merges(name, nano, folders, tmp_path):
    merged = load(again(nano, tmp_path / "merged", adapter_folder=folders / name), "float32")
    ours, wanted = load(nano, "float32", adapter=folders / name), merged.model(TOKENS)
    assert ours.num_parameters == ours.config.num_parameters + ours.adapter.num_parameters
    assert ours.name == f"{nano} with {name}" and ours.adapter.name == name
    assert mx.abs(ours.model(TOKENS) - wanted).max().item() < 1e-5 * mx.abs(wanted).max().item()
    settings = {"max_tokens": 12, "temperature": 0.8, "seed": 1}
    assert generate(ours, "Once upon", **settings) == generate(merged, "Once upon", **settings)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_a_checkpoint_of_corenets_gives_its_logits_over_its_base(name, tmp_path):
    source, golden = GOLDEN / name / "checkpoint.pt", np.load(GOLDEN / name / "golden.npz")
    kept = again(source, tmp_path / "m", adapter="keep", tokenizer=tokenizer_file(tmp_path, 112))
    tokens = mx.array(golden["input_ids"])
    base = load(kept, "float32")
    assert np.abs(np.array(base.model(tokens)) - golden["logits"]).max() > 1e-2
    for adapter in (source, kept / "adapter"):
        logits = base.load_adapter(adapter).model(tokens)
        assert np.abs(np.array(logits) - golden["logits"]).max() < 1e-4
    with pytest.raises(CheckpointError) as error:
        load(kept, adapter=GOLDEN / "lora-rs" / "checkpoint.pt")
    assert str(error.value) == (
        f"the adapter checkpoint was made for other weights than {kept}'s; give the model that "
        "it was made for"
    )


def test_a_head_of_its_own_is_no_second_embedding(base):
    """A tied model whose head alone is adapted: the matrix is there once."""
    adapter = random_adapter(base.model, 1, only="lm_head")
    ours = base.load_adapter(adapter)
    assert ours.nbytes == base.nbytes + 4 * adapter.num_parameters
    wanted = merged_model(base.model, adapter)(TOKENS)
    assert mx.abs(ours.model(TOKENS) - wanted).max().item() < 1e-5 * mx.abs(wanted).max().item()


def test_an_adapter_of_other_shapes_is_refused_before_any_weight_is_read(nano, folders, tiny):
    with pytest.raises(CheckpointError, match="the adapter story was made for another model: its"):
        load("openelm-tiny", adapter=folders / "story")
    with pytest.raises(CheckpointError, match="the adapter law was made for another model: its"):
        tiny.load_adapter(folders / "law")
    with pytest.raises(OptionError, match="adapter is 3; allowed"):
        load(nano, adapter=3)


def run(capsys, *args):
    assert main([str(arg) for arg in args]) == 0
    return capsys.readouterr().out


def test_commands_apply_it(nano, folders, tmp_path, capsys, stdin):
    engine = load(nano)
    story = engine.load_adapter(folders / "story")
    flags = ("--adapter", folders / "story", "--max-tokens", "8")
    text = run(capsys, "generate", "Once upon", "--model", nano, *flags)
    assert text == generate(engine, "Once upon", adapter="story", max_tokens=8) + "\n"
    assert text != generate(engine, "Once upon", max_tokens=8) + "\n"
    cache = ("--cache-file", tmp_path / "cache.safetensors")
    for _ in range(2):
        assert run(capsys, "generate", "Once upon", "--model", nano, *flags, *cache) == text
    assert main(["generate", "Once upon", "--model", str(nano), *map(str, cache)]) == 2
    assert (
        "was made with the adapter story, but the model has no adapter" in capsys.readouterr().err
    )
    talk = f"Hello\n/save {tmp_path}/talk.json\nMore\n/load {tmp_path}/talk.json\nMore\n/show\n"
    stdin(talk.encode())
    assert main(["chat", str(nano), *map(str, flags), "--temperature", "0"]) == 0
    said = capsys.readouterr()
    first, more, again = said.out.splitlines()
    assert more == again and first and f"{story.name}: " in said.err


def test_inspect_describes_it(nano, folders, capsys):
    facts = json.loads(run(capsys, "inspect", nano, "--adapter", folders / "law", "--json"))
    layers = list(range(facts["layers_total"]))
    matrices = {"token_embeddings": [], **dict.fromkeys(ALL[1:], layers)}
    about = facts["adapter"]
    assert (about["name"], about["kind"], about["ranks"]) == ("law", "LoRA", [2, 4])
    assert about["scales"] == [2.0, 4.0] and about["matrices"] == matrices
    engine = load(nano)
    more = engine.load_adapter(folders / "law").nbytes - engine.nbytes
    assert about["bytes"] == 4 * about["parameters"] == more
    shown = run(capsys, "inspect", nano, "--adapter", folders / "dora")
    last = layers[-1]
    for line in (
        "adapter             dora: DoRA, rank 4",
        "  scale             2",
        f"  changes           ffn.proj_2 of layers 0-{last}",
    ):
        assert line + "\n" in shown
    assert main(["inspect", "270m", "--adapter", str(folders / "law")]) == 2
    assert "the adapter law was made for another model" in capsys.readouterr().err
