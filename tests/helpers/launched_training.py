"""What each process of `mlx.launch` does in tests/finetune/test_launched.py."""

from __future__ import annotations

import sys
from pathlib import Path

from training import options, small_engine, write_pairs

from openelm_mlx import load
from openelm_mlx.engine.ranks import launched
from openelm_mlx.errors import OpenELMError
from openelm_mlx.finetune import finetune, result

BATCH = 2  # of each process


def main(folder: Path) -> None:
    result.write_picture = lambda folder: False
    engine, rank = small_engine(load("openelm-tiny")), launched().rank
    if rank == 0:
        write_pairs(folder / "pairs.jsonl")
    launched().gather("the data are there")
    run = engine, folder / "pairs.jsonl", folder / "out"

    def stop(row, steps):
        if rank == 1 and row["step"] == 1:
            raise KeyboardInterrupt

    try:
        finetune(*run, options(batch=BATCH, beta2=0.9 + rank / 100))
    except OpenELMError as error:
        print(f"process {rank}: {error}", flush=True)
    try:
        finetune(*run, options(batch=BATCH, epochs=2.0), progress=stop)
    except KeyboardInterrupt:
        print(f"process {rank}: stopped", flush=True)
    report = finetune(*run, options(batch=BATCH, epochs=2.0), resume=True)
    print(f"process {rank}: {report.last_loss} {report.best_validation_loss}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
