"""results/make.py: the tables of the READMEs and the figures are those of the files of results."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "results"))
import make

@pytest.mark.parametrize("readme", make.READMES, ids=lambda path: path.parent.name)
def test_tables_are_those_of_the_files(readme):
    text = readme.read_text()
    assert make.with_tables(text) == text, "run: python results/make.py"
    assert text.count("<!-- table: ") == text.count("<!-- end -->")

@pytest.mark.parametrize("name", [name for name in make.FIGURES if make.path_of(name).exists()
                                  and "made_by" in make.load(name)])
def test_figures_come_with_their_file(name):
    for figure in make.FIGURES[name].values():
        with Image.open(make.FOLDER.parent / "figures" / figure) as image:
            assert image.text["results"] == make.digest(name), figure

def test_a_run_is_taken_and_written_as_a_table(tmp_path, monkeypatch):
    """Two seeds and two groups, by hand: 1.5 ± .7, and a dash where a seed has no value."""
    monkeypatch.setattr(make, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(make, "FIGURES", {"example": {"plot.png": "example.png"}})

    def table():
        runs = make.load("example")["runs"]
        return make.table_of(runs, {"kind": "kind"}, {"x": "value", "y": "other"})
    monkeypatch.setattr(make, "TABLES", {"example": (table, ["example"])})
    for folder in ("results", "figures", "run"):
        (tmp_path / folder).mkdir()
    runs = [{"kind": kind, "seed": seed, "job": [kind, seed], "job_seconds": 90, "results": results}
            for kind, seed, results in (("a", 0, {"x": 1, "y": 1 / 3}), ("a", 1, {"x": 2}),
                                        ("b", 0, {"x": 0.5, "y": 4}))]
    made_by = [{"command": "python a.py", "commit": commit, "machine": "a machine", "torch": "2"}
               for commit in ("abc", "def")]
    content = {"config": {}, "made_by": made_by, "runs": runs}
    (tmp_path / "run" / "results.json").write_text(json.dumps(content))
    Image.new("RGB", (30, 20), "red").save(tmp_path / "run" / "plot.png")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table: example -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(make, "READMES", [readme])
    make.main("example", str(tmp_path / "run"))
    assert readme.read_text() == """before
<!-- table: example -->
| kind | value | other |
| --- | --- | --- |
| a | 1.500 ± 0.707 | - |
| b | 0.500 ± 0.000 | 4.000 ± 0.000 |

n = 2 seeds (0, 1). `python a.py`, commit abc, def, a machine, torch 2, 4 minutes of one core.
<!-- end -->
after
"""
    assert make.load("example")["runs"][0]["results"]["y"] == 0.33333
    with Image.open(tmp_path / "figures" / "example.png") as image:
        assert image.text["results"] == make.digest("example") and image.size == (30, 20)
