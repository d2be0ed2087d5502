"""Names of models, without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from openelm_mlx.errors import HubError
from openelm_mlx.hub import BUNDLED, SHORT_NAMES, resolve_model


def test_names_and_suggestions(tmp_path: Path) -> None:
    assert SHORT_NAMES["1.1b-instruct"] == "apple/OpenELM-1_1B-Instruct" and len(SHORT_NAMES) == 8
    assert resolve_model("openelm-tiny").folder == BUNDLED
    assert resolve_model(str(tmp_path)).folder == tmp_path
    with pytest.raises(HubError, match="did you mean .*270m"):
        resolve_model("270n")
