"""support/figures.py: files that are whole, and the backend of a notebook."""

import os
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from support.figures import write_figure


def test_a_figure_is_a_file_and_a_fault_is_a_warning(tmp_path, capsys):
    """The name of the second figure belongs to a folder, and the third one cannot be drawn."""
    (tmp_path / "folder.png").mkdir()
    write_figure(tmp_path / "figure.png", lambda width: Figure(figsize=(width, 1)), 2)
    write_figure(tmp_path / "folder.png", lambda: Figure(figsize=(1, 1)))
    write_figure(tmp_path / "fault.png", lambda: 1 / 0)
    assert Image.open(tmp_path / "figure.png").size == (240, 120)
    assert {path.name for path in tmp_path.iterdir()} == {"figure.png", "folder.png"}
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: cannot draw folder.png: cannot write")
    assert second == "warning: cannot draw fault.png: division by zero"


def test_the_backend_of_a_notebook_stays_as_it_is():
    """It is not installed here, which would be an error when matplotlib is imported."""
    backend = "module://matplotlib_inline.backend_inline"
    code = "import os, support.figures; print(os.environ.get('MPLBACKEND'))"
    found = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], text=True,
                           env={**os.environ, "MPLBACKEND": backend}, capture_output=True)
    assert found.stdout == f"{backend}\n", found.stderr
