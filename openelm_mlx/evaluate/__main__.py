"""lm-eval's own command line, in which `--model openelm` is known.

    python -m openelm_mlx.evaluate run --model openelm --model_args model=270m --tasks arc_easy

lm-eval has no way for a package to add a model to its command; this one only adds ours.
"""

from __future__ import annotations

import sys
from importlib import import_module

from openelm_mlx.errors import OpenELMError


def main() -> None:
    """Run `lm_eval`. A user's mistake about the model is one line, and exit status 2."""
    try:
        import_module("openelm_mlx.evaluate.language_model")  # registers the model
    except OpenELMError as error:
        sys.exit(refused(error))
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except OpenELMError as error:
        sys.exit(refused(error))


def refused(error: OpenELMError) -> int:
    print(f"openelm: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
