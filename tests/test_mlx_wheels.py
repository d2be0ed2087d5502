"""MLX's wheels for Linux: which one's library is on the disk, and what is said of a mixture."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from openelm_mlx.mlx_wheels import LIBRARY, Wheels, mixture, nvidia_smi, wheels, why_not

SIZES = {"mlx-cpu": 100, "mlx-cuda-12": 120, "mlx-cuda-13": 130}
AGAIN = "pip install --force-reinstall --no-deps"


def installed(folder: Path, *names: str) -> Wheels:
    """Install wheels one after the other, and look at what came of it."""
    for name in names:
        info = folder / f"{name.replace('-', '_')}-0.32.4.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.32.4\n")
        (info / "RECORD").write_text(f"mlx/include/a,b,b,1\n{LIBRARY},sha256=x,{SIZES[name]}\n")
        (folder / LIBRARY).parent.mkdir(parents=True, exist_ok=True)
        (folder / LIBRARY).write_bytes(bytes(SIZES[name]))
    return wheels(map(PathDistribution, folder.glob("*.dist-info")))


def test_the_last_wheel_has_the_library(tmp_path):
    assert mixture(installed(tmp_path / "a", "mlx-cpu")) is None
    assert mixture(installed(tmp_path / "b", "mlx-cuda-13")) is None
    right = installed(tmp_path / "c", "mlx-cpu", "mlx-cuda-12")
    assert right.library == "mlx-cuda-12" and mixture(right) is None
    two = installed(tmp_path / "e", "mlx-cuda-13", "mlx-cuda-12")
    assert two.library == "mlx-cuda-12" and mixture(two) is None  # the GPU is used
    wrong = installed(tmp_path / "d", "mlx-cuda-13", "mlx-cpu")
    assert mixture(wrong) == (
        "mlx-cpu's library lies over that of mlx-cuda-13, so the GPU is not used; run "
        f"`{AGAIN} mlx-cuda-13==0.32.4`"
    )


def test_a_library_of_no_wheel_is_damaged(tmp_path):
    installed(tmp_path, "mlx-cuda-13")
    (tmp_path / LIBRARY).write_bytes(b"cut short")
    found = wheels(map(PathDistribution, tmp_path.glob("*.dist-info")))
    assert found.library is None
    assert mixture(found) == (f"the library of MLX is damaged; run `{AGAIN} mlx-cuda-13==0.32.4`")
    (tmp_path / LIBRARY).unlink()
    assert wheels(map(PathDistribution, tmp_path.glob("*.dist-info"))).library is None


@pytest.mark.parametrize(
    ("found", "remedy"),
    [
        (Wheels({}, None), "; run `pip install 'mlx[cpu]'`"),
        (Wheels({"mlx-cpu": "1"}, None), f"; run `{AGAIN} mlx-cpu==1`"),
        (Wheels({"mlx-cpu": "1"}, "mlx-cpu"), f"; run `{AGAIN} mlx-cpu==1`"),
        (
            Wheels({"mlx-cuda-13": "1"}, "mlx-cuda-13"),
            ": mlx-cuda-13 needs an NVIDIA GPU, its driver and the packages nvidia-*; "
            f"without a GPU run `{AGAIN} mlx-cpu==1`",
        ),
    ],
    ids=["no wheel", "no library", "of the processor", "of a GPU"],
)
def test_why_mlx_does_not_start(found, remedy):
    text = why_not(ImportError("libcuda.so.1: cannot open shared object file"), found)
    what = "MLX cannot start (libcuda.so.1: cannot open shared object file)"
    assert text == what + remedy


@pytest.mark.needs("Linux")
def test_an_import_that_fails_is_one_line_of_the_command_line(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libcuda.so.1: no such file')")
    run = subprocess.run(
        [sys.executable, "-m", "openelm_mlx", "generate", "Hi"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert run.stderr.startswith("openelm: MLX cannot start (libcuda.so.1: no such file)")


@pytest.mark.needs("Linux")
def test_nvidia_smi_is_asked_for_the_first_gpu(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'NVIDIA H100, 580.1, 81559 MiB'\necho 'other, 580.1, 1 MiB'"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert list(nvidia_smi().values()) == ["NVIDIA H100", "580.1", "81559 MiB"]
    program.write_text("#!/bin/sh\nexit 9")
    assert nvidia_smi() == {}
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert nvidia_smi() == {}
