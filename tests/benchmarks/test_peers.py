"""Peers give the tokens that this engine gives: each on the bundled model, where it is
installed.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_set import NANO, load_golden

from openelm_mlx import load, stream_generate
from openelm_mlx.benchmarks import peers
from openelm_mlx.benchmarks.peers.llama_cpp import (
    LlamaServer,
    blocks,
    find_server,
    same_integers,
    write_gguf,
)
from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.device import mx, utils
from openelm_mlx.engine.hub import BUNDLED
from openelm_mlx.errors import BenchmarkError, OptionError
from openelm_mlx.model.decoder import parameters
from openelm_mlx.quantization import QuantSpec

PROMPT = "Once upon a time there was a little fox who"
TOKENS = 32


@pytest.fixture(scope="module")
def prompt(tiny) -> list[int]:
    return tiny.tokenizer.encode(PROMPT)


@pytest.fixture(scope="module")
def ours(tiny, prompt) -> tuple[int, ...]:
    return tuple(
        event.token for event in stream_generate(tiny, prompt, max_tokens=TOKENS, ignore_eos=True)
    )


@pytest.mark.parametrize(
    "name",
    [
        name if name == "mlx-lm" else pytest.param(name, marks=pytest.mark.needs(name))
        for name in peers.PEERS
    ],
)
def test_a_peer_gives_our_greedy_tokens(name, prompt, ours):
    session = peers.open_peer(name, BUNDLED, "float32")
    try:
        first, again = session.generate(prompt, TOKENS), session.generate(prompt, TOKENS)
        assert first.tokens == again.tokens == ours
        assert (
            len(first.seconds) == TOKENS
            and list(first.seconds) == sorted(first.seconds)
            and first.seconds[0] > 0
        )
        assert session.generate(prompt[:1], 1).tokens[0] in range(4096)
        assert session.engine == name and session.version and session.load_seconds > 0
    finally:
        session.close()


@pytest.mark.needs("llama.cpp")
def test_llama_cpp_opens_what_was_converted_before(prompt, ours, tmp_path):
    path = peers.prepared("llama.cpp", BUNDLED, "float32", tmp_path)
    session = peers.open_peer("llama.cpp", path, "float32")
    assert (
        session.generate(prompt, TOKENS).tokens == ours
        and "8-bit as float32" in session.version
        and session.notes
    )
    session.close()
    assert path.is_file()


def test_only_llama_cpp_needs_a_file_of_its_own(tmp_path):
    assert peers.prepared("mlx-lm", BUNDLED, "float32", tmp_path) == BUNDLED
    path = peers.prepared("llama.cpp", BUNDLED, "float16", tmp_path)
    assert path.name == "8-bit as float16.gguf" and path.read_bytes()[:4] == b"GGUF"


def test_mlx_lm_counts_its_own_weights_as_memory(tiny, prompt):
    before = mx.get_active_memory()
    session = peers.open_peer("mlx-lm", BUNDLED, "float32")
    memory = session.generate(prompt, 4).peak_memory_bytes
    assert (
        tiny.nbytes < memory < 2 * tiny.nbytes
    )  # though the model of another engine lies in memory too
    session.close()
    assert mx.get_active_memory() - before < tiny.nbytes / 2


def test_a_peer_computes_in_the_type_it_is_given():
    session = peers.open_peer("mlx-lm", BUNDLED, "bfloat16")
    assert session.model.transformer.norm.weight.dtype == mx.bfloat16
    session.close()


def test_unknown_missing_and_damaged(tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="'vllm' is not a peer; known: mlx-lm, llama.cpp, torch"):
        peers.why_not("vllm")
    (tmp_path / "config.json").write_bytes((BUNDLED / "config.json").read_bytes())
    weights = {"transformer.norm.weight": mx.ones((256,))}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    with pytest.raises(BenchmarkError, match="mlx-lm cannot load .*"):
        peers.open_peer("mlx-lm", tmp_path, "float32")
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    monkeypatch.delenv("OPENELM_LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert peers.why_not("torch") == "not installed: `pip install torch safetensors`"
    assert "brew install llama.cpp" in peers.why_not("llama.cpp")
    with pytest.raises(
        BenchmarkError, match="mlx-lm cannot run here: not installed: `pip install mlx-lm`"
    ):
        peers.open_peer("mlx-lm", BUNDLED, "float32")


# --- the PyTorch reference


@pytest.mark.needs("torch")
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_reference_expands_quantized_weights_as_mlx_does(bits):
    import torch

    from openelm_mlx.benchmarks.peers.torch_reference import dequantize

    packed, scales, biases = mx.quantize(
        mx.random.normal((6, 128), key=mx.random.key(bits)), group_size=32, bits=bits
    )
    ours = mx.dequantize(packed, scales, biases, group_size=32, bits=bits)
    words, *floats = (torch.from_numpy(np.array(array)) for array in (packed, scales, biases))
    assert np.allclose(dequantize(words, *floats, bits=bits).numpy(), np.array(ours), atol=1e-6)


@pytest.mark.needs("torch")
@pytest.mark.parametrize(
    "name", ["tied-gqa4", "untied-mha", "noqknorm-gqa2", "noglu-gqa2", "gpt-test", "openelm-tiny"]
)
def test_the_reference_computes_what_corenet_computes(name, tmp_path):
    """One token at a time through its cache, and the prompt in two pieces, against logits of
    CoreNet's own class.
    """
    import torch

    from openelm_mlx.benchmarks.peers.torch_reference import ReferenceOpenELM

    ours, tokens, expected = load_golden(name, tmp_path)
    weights = {
        key: torch.from_numpy(np.array(array))
        for key, array in utils.tree_flatten(ours.parameters())
    }
    model = ReferenceOpenELM(ours.args, weights)
    ids = torch.from_numpy(np.array(tokens[0]).astype(np.int64))
    with torch.inference_mode():
        cache, pieces = model.make_cache(len(ids)), model.make_cache(len(ids))
        logits = [
            model(ids[number : number + 1], cache, number).numpy() for number in range(len(ids))
        ]
        model(ids[:7], pieces, 0)
        last = model(ids[7:], pieces, 7).numpy()
    assert np.abs(np.stack(logits) - expected[0]).max() < 1e-4
    assert np.abs(last - expected[0][-1]).max() < 1e-4


# --- the GGUF that llama.cpp reads


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("group_size", [32, 64])
def test_affine_weights_keep_their_integers_in_llama_cpps_blocks(bits, group_size):
    """Against the reader of the gguf package: the same numbers, but for d and m in float16."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    words, scales, biases = mx.quantize(
        mx.random.normal((6, 128), key=mx.random.key(bits)), group_size=group_size, bits=bits
    )
    scales, biases = (
        scales.astype(mx.float16).astype(mx.float32),
        biases.astype(mx.float16).astype(mx.float32),
    )
    spec = QuantSpec(bits, group_size)
    data, kind = blocks(words, scales, biases, spec), same_integers(spec)
    found = dequantize(data, GGMLQuantizationType[kind])
    expected = mx.dequantize(words, scales, biases, group_size, bits)
    assert kind == f"Q{bits}_1" and np.abs(found - np.array(expected)).max() < 1e-6


@pytest.mark.parametrize(
    ("bits", "form"), [(None, "float32"), (4, "Q4_1"), (8, "8-bit as bfloat16")]
)
def test_the_gguf_holds_the_weights_of_the_folder(bits, form, tmp_path):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    source, folder = NANO / "checkpoint.pt", tmp_path / "nano"
    convert(ConvertOptions(source, folder, bits=bits))
    dtype = "bfloat16" if bits == 8 else "float32"
    path = write_gguf(folder, dtype, tmp_path)
    assert path.name == f"{form}.gguf"
    ours = parameters(load(folder, "float32").model)
    module = load(folder, "float32").model.transformer.layers[1].ffn.proj_1
    expected = ours["transformer.layers.1.ffn.proj_1.weight"]
    if bits:
        expected = mx.dequantize(
            expected, module.scales, module.biases, module.group_size, module.bits
        )
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    halves = [tensors[f"blk.1.ffn_{half}.weight"] for half in ("gate", "up")]
    stored = np.concatenate([dequantize(half.data, half.tensor_type) for half in halves])
    assert np.abs(stored - np.array(expected)).max() < (1e-6 if bits is None else 2e-3)
    assert len(tensors) == 2 + 4 * 9  # gate and up apart


# --- llama-server, as a program that only looks like one

STUB = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
if "--version" in sys.argv:
    sys.exit("version: 4711 (abcdef0)")
class Handler(BaseHTTPRequestHandler):
    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer({{"status": "ok"}})
    def do_POST(self):
        wish = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        count = wish["n_predict"] - (wish["prompt"] == [13])
        timings = {{"prompt_ms": 20.0, "predicted_ms": 90.0}}
        self.answer({{"tokens": list(range(count)), "timings": timings}})
    def log_message(self, *a):
        pass
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_server_is_asked_and_its_clock_read(tmp_path):
    server = LlamaServer(
        program(tmp_path / "llama-server", STUB.format(python=sys.executable)), tmp_path / "x.gguf"
    )
    try:
        timed = server.generate([1, 2], 10)
        assert timed.tokens == tuple(range(10)) and server.version == "4711"
        assert timed.seconds == pytest.approx([0.02 + 0.01 * number for number in range(10)])
        assert server.generate([1], 1).seconds == pytest.approx([0.02])
        with pytest.raises(BenchmarkError, match="gave 4 tokens of 5"):
            server.generate([13], 5)
    finally:
        server.close()
    assert server.process.returncode is not None


def test_a_server_that_cannot_start_says_why(tmp_path):
    broken = program(
        tmp_path / "llama-server", "#!/bin/sh\necho 'unknown model architecture: openelm'\nexit 3\n"
    )
    with pytest.raises(
        BenchmarkError, match="ended with status 3: unknown model architecture: openelm"
    ):
        LlamaServer(broken, tmp_path / "x.gguf")


def test_the_server_is_found_beside_what_is_named(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    server = program(tmp_path / "bin" / "llama-server", "#!/bin/sh\n")
    for named in (server, tmp_path / "bin" / "llama-bench", tmp_path / "bin", tmp_path):
        monkeypatch.setenv("OPENELM_LLAMA_CPP", str(named))
        assert find_server() == server
    monkeypatch.setenv("OPENELM_LLAMA_CPP", str(tmp_path / "else" / "where"))
    assert find_server() is None
    monkeypatch.delenv("OPENELM_LLAMA_CPP")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/usr/bin")
    assert find_server() == server
