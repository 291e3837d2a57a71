"""Tools from another folder."""

import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "tools"


def test_a_tool_runs_in_a_folder_with_packages_of_the_same_names(tmp_path: Path) -> None:
    for name in ("datasets", "engine", "config"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong one')")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(TOOLS), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )

    found = run("make_shapes", "--help")
    assert (found.returncode, found.stderr) == (0, "")
    assert "make_shapes" in found.stdout.splitlines()[0]
    for arguments in ([], ["no_such_tool"]):
        listed = run(*arguments)
        assert listed.returncode == 2
        assert "predict" in listed.stderr
        assert "detector" not in listed.stderr
