"""experiments.py: files that are whole or not written, and means over seeds."""

import json
import math
import os

import pytest
import torch

import experiments

def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path, monkeypatch):
    results, model = tmp_path / "results.json", tmp_path / "model.pt"
    experiments.save({"path": tmp_path, "loss": 1.0}, results)
    experiments.save({"weight": torch.ones(2)}, model)
    with pytest.raises(ValueError):
        experiments.save({"loss": math.nan}, results)  # It would be no JSON.
    with monkeypatch.context() as patch:

        def is_killed(*_):
            for temporary in tmp_path.glob("*.tmp"):
                temporary.write_bytes(temporary.read_bytes()[:3])
            raise KeyboardInterrupt
        patch.setattr(os, "replace", is_killed)
        for content, path in (({"loss": 2.0}, results), ({"weight": torch.zeros(2)}, model)):
            with pytest.raises(KeyboardInterrupt):
                experiments.save(content, path)
    assert json.loads(results.read_text()) == {"path": str(tmp_path), "loss": 1.0}
    assert torch.load(model, weights_only=True)["weight"].tolist() == [1, 1]
    experiments.save({"loss": 2.0}, results)
    assert json.loads(results.read_text()) == {"loss": 2.0}

def test_means_and_spreads_leave_out_what_is_missing_for_a_seed():
    both = {"digit": 1.0, "background": 2.0, "loss": math.nan}
    one = {"digit": 3.0, "loss": math.inf}
    runs = [{"exponent": 1.0, "results": experiments.finite(x)} for x in (both, one)]
    runs.append({"exponent": 0.0, "results": {"digit": 5.0}})
    summary = experiments.summarize(runs, key=lambda run: run["exponent"])
    assert summary == {1.0: {"n": 2, "digit": {"mean": 2.0, "std": pytest.approx(2**0.5)}},
                       0.0: {"n": 1, "digit": {"mean": 5.0, "std": 0.0}}}
    assert experiments.number_of_seeds(summary) == 2
    assert experiments.cell(summary[1.0], "digit") == "2.000 ± 1.414"
    assert experiments.cell(summary[1.0], "background") == "-"
