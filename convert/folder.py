"""What a model folder holds besides its weights: configuration, tokenizer, chat template, card, record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from openelm_mlx.convert.options import ConvertOptions
from openelm_mlx.convert.tokenizer_json import build_tokenizer_json, tokenizer_config

from openelm_mlx.config import OpenELMConfig
from openelm_mlx.errors import TokenizerError

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- if not messages or messages[0]['role'] != 'system' -%}
{{- '<|system|>\\n' + eos_token -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('role must be system, user or assistant, not ' + message['role']) -}}
{%- endif -%}
{{- ('' if loop.first and message['role'] == 'system' else '\\n') + '<|' + message['role'] + '|>\\n' -}}
{{- message['content'] + eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '\\n<|assistant|>\\n' -}}
{%- endif -%}
"""


def find_tokenizer(options: ConvertOptions) -> Path:
    """`--tokenizer` (a file, or a folder with tokenizer.model), else beside the source. Raises `TokenizerError`."""
    given = options.tokenizer
    folder = options.source if options.source.is_dir() else options.source.parent
    path = given if given is not None else folder / "tokenizer.model"
    if path.is_dir():
        path = path / "tokenizer.model"
    if path.is_file():
        return path
    if given is not None:
        raise TokenizerError(f"{path} does not exist; --tokenizer takes a SentencePiece tokenizer.model")
    raise TokenizerError(
        f"no tokenizer.model beside {options.source}; give one with --tokenizer "
        "(OpenELM uses LLaMA's, 32000 pieces; its checkpoints do not contain it)"
    )


def write_side_files(
    folder: Path, config: OpenELMConfig, tokenizer: Path, quantization: dict[str, Any] | None,
    record: dict[str, Any], instruct: bool,
) -> None:  # fmt: skip
    """Everything but the weights. Raises `TokenizerError` for a tokenizer other tools would read differently."""
    raw = config.to_hf_dict()
    if quantization is not None:
        raw["quantization"] = quantization
        raw["quantization_config"] = quantization  # newer tools look here
    write_json(folder / "config.json", raw)
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    content = json.dumps(build_tokenizer_json(tokenizer), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(content + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer))
    if instruct:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(folder / "conversion.json", record)
    (folder / "README.md").write_text(model_card(record, instruct), encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_card(record: dict[str, Any], instruct: bool) -> str:
    form = record["quantization"]
    kind = f"{form['bits']}-bit ({form['mode']}, groups of {form['group_size']})" if form else record["dtype"]
    chat = "It speaks OpenELM's Instruct format; see `chat_template.jinja`.\n" if instruct else ""
    return (
        f"---\nlibrary_name: mlx\ntags:\n- mlx\n- openelm\n---\n\n# OpenELM for MLX\n\n"
        f"{record['parameters']:,} parameters, {kind}, {record['bits_per_weight']:.3f} bits per weight. Converted from "
        f"`{record['source']}` with openelm-mlx {record['version']}. {chat}\n"
        '```\nopenelm chat PATH_OF_THIS_FOLDER\nmlx_lm.generate --model PATH_OF_THIS_FOLDER --prompt "Once upon a time"\n'
        "```\n\nThe weights stay under the licence of the model they were converted from.\n"
    )
