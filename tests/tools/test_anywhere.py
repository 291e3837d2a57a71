"""Tools from another folder."""

import subprocess
import sys
from pathlib import Path

OWN_IMPORTS = tuple(
    f"{word} {package}"
    for word in ("from", "import")
    for package in ("analysis", "config", "datasets", "engine", "experiments", "losses", "models", "ops", "tools")
)
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


def test_every_tool_runs_as_a_file_too(tmp_path: Path) -> None:
    """All are told to replace their own folder on the path; one is run."""
    (tmp_path / "datasets.py").write_text("raise SystemExit('the wrong one')")
    tool = str(TOOLS / "make_shapes.py")
    found = subprocess.run([sys.executable, tool, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stderr) == (0, "")
    for path in TOOLS.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__"' in text and path.stem != "__main__":
            lines = text.splitlines()
            own = next(number for number, line in enumerate(lines) if line.startswith("if not __package__:"))
            first = next(n for n, line in enumerate(lines) if line.startswith(OWN_IMPORTS))
            assert own < first, path
