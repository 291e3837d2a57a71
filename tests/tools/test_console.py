"""What all commands do alike with paths and with Ctrl-C."""

import os
import pwd
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import main
from tools import check_data, console, convert_annotations, export


def test_home_folders_that_no_shell_has_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert export.main(["--resume=~/a.pth", "--out=~/b.onnx"]) == 2
    assert convert_annotations.main(["yolo", "~/labels", "--images=x", "--classes=y", "--out=~/c.json"]) == 2
    assert check_data.main(["--images=~/pictures", "--annotations=~/d.json"]) == 2
    for line, name in zip(capsys.readouterr().err.splitlines(), ("a.pth", "labels", "d.json"), strict=True):
        assert f"{tmp_path}/{name}" in line
    assert main.parse_arguments(["--cfg=~/e.yaml"]).cfg == tmp_path / "e.yaml"
    assert main.parse_arguments(["--resume=~/f.pth"]).resume == str(tmp_path / "f.pth")
    assert main.parse_arguments(["--resume=auto"]).resume == "auto"
    assert not list(tmp_path.iterdir())


def test_without_a_home_folder_nothing_is_guessed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(SystemExit) as ended:
        export.main(["--resume", "a.pth", "--out=~/b.onnx"])
    assert ended.value.code == 2
    monkeypatch.setenv("HOME", "")
    with pytest.raises(SystemExit):
        main.parse_arguments(["--resume=~/b.pth"])
    assert "there is no home directory" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        export.main(["--resume", "a.pth", "--out=~/b.onnx"])
    assert "there is no home directory (HOME is not set) for ~/b.onnx: write the whole path" in capsys.readouterr().err
    assert console.home_path("~nobody-of-this-name/a") == Path("~nobody-of-this-name/a")


def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    """Also where processes of its own look at the pictures, one of them without end."""
    annotations = tmp_path / "a.json"
    annotations.write_text(
        '{"images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 9}], "annotations":'
        ' [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}], "categories": [{"id": 1, "name": "a"}]}'
    )
    (tmp_path / "a.png").touch()
    script = (
        "import pathlib, time, datasets.images, tools.check_data\n"
        "def slow(*_):\n    pathlib.Path('begun').touch(); time.sleep(60)\n"
        "datasets.images._decode = slow\n"
        "raise SystemExit(tools.check_data.main(['--images', '.', '--annotations', 'a.json', '--processes', '2']))"
    )
    root = str(Path(__file__).parents[2])
    ran = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(ran.pid, signal.SIGINT)  # as a terminal does, to all of them
    assert ran.communicate(timeout=30)[1] == "error: interrupted\n"
    assert ran.returncode == 130
