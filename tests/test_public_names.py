"""Guards what users import."""

from __future__ import annotations

import secateur


def test_public_names() -> None:
    assert set(secateur.__all__) == {
        *("DataSet", "PruneResult", "PruningPlan", "RunConfig", "RunResult", "Score"),
        *(
            "SecateurError",
            "Target",
            "DependencyGraph",
            "apply_plan",
            "evaluate",
            "load",
            "load_data",
            "export_onnx",
            "ExportResult",
        ),
        *("load_model", "load_program", "make_plan", "make_wiring", "prune", "run", "save"),
    }
    assert all(hasattr(secateur, name) for name in secateur.__all__)
    assert secateur.__doc__
