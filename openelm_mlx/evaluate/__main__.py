"""lm-eval's own command line, in which `--model openelm` is known.

    python -m openelm_mlx.evaluate run --model openelm --model_args model=270m --tasks arc_easy

lm-eval has no way for a package to add a model to its command; this one only adds ours.
"""

from __future__ import annotations

import sys

from openelm_mlx.errors import OpenELMError


def main() -> None:
    """Run `lm_eval`. What it or a task raises is one line, and exit status 2."""
    try:
        from openelm_mlx.evaluate.harness import task_error  # registers the model
        from openelm_mlx.evaluate.tasks import compiled_once

        try:
            from lm_eval.__main__ import cli_evaluate

            with compiled_once():
                cli_evaluate()
        except OpenELMError:
            raise
        except Exception as error:  # it has no errors of its own
            raise task_error(error) from None
    except OpenELMError as error:
        print(f"openelm: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
