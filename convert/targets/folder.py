"""What a model folder holds besides its weights: configuration, tokenizer, chat template, card,
record.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from openelm_mlx.convert.licence import Licence
from openelm_mlx.convert.record import model_card
from openelm_mlx.convert.staging import UNFINISHED_CONFIG
from openelm_mlx.convert.tokenizers.tokenizer_json import build_tokenizer_json, tokenizer_config
from openelm_mlx.convert.tokenizers.tokenizer_model import TokenizerModel
from openelm_mlx.engine.loading import chat_sampling, generation_config
from openelm_mlx.files import write_json
from openelm_mlx.model.config import GENERATION_CONFIG, OpenELMConfig
from openelm_mlx.quantization import Plan, config_entry

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


def write_side_files(
    folder: Path,
    config: OpenELMConfig,
    tokenizer: TokenizerModel,
    forms: Plan,
    record: dict[str, Any],
    instruct: bool,
    licence: Licence,
    sampling: dict[str, Any],
) -> None:
    """Everything but the weights. Raises `TokenizerError` for a tokenizer other tools would read
    differently.
    """
    raw = config.to_hf_dict()
    if (quantization := config_entry(forms)) is not None:
        raw["quantization"] = quantization
        raw["quantization_config"] = quantization  # newer tools look here
    (folder / "tokenizer.model").write_bytes(tokenizer.data)
    content = json.dumps(build_tokenizer_json(tokenizer), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(content + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer))
    if instruct:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(folder / GENERATION_CONFIG, sampling)
    for path in licence.files:
        shutil.copyfile(path, folder / path.name)
    write_record(folder, record, forms, instruct)
    write_json(folder / UNFINISHED_CONFIG, raw)


def sampling_defaults(source: Path, config: OpenELMConfig) -> dict[str, Any]:
    """Return the content of generation_config.json: that of the source's own, with all BOS and EOS
    ids.

    Raises `ConfigError` for a file that could not be loaded again.
    """
    folder = source if source.is_dir() else source.parent
    chat_sampling(folder)
    eos = config.with_eos_of(folder).written_eos
    return {**generation_config(folder), "bos_token_id": config.bos_token_id, "eos_token_id": eos}


def write_record(folder: Path, record: dict[str, Any], forms: Plan, instruct: bool) -> None:
    write_json(folder / "conversion.json", record)
    (folder / "README.md").write_text(model_card(record, forms, instruct), encoding="utf-8")
