"""Prints how many inputs were tried, by category, and how many the command answered rightly.

python -m tests.bad_inputs [PART OF A NAME]
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bad_inputs.cases import all_cases
from bad_inputs.running import complaints, make_models, run


def table(part: str = "") -> int:
    """Runs the cases whose category or name holds `part`; gives 1 where one was answered wrongly."""
    tried, refused, taken = Counter(), Counter(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder, "models"))
        for number, case in enumerate(all_cases()):
            if part not in f"{case.category}: {case.name}":
                continue
            here = Path(folder, str(number))
            here.mkdir()
            outcome = run(case, here, models)
            tried[case.category] += 1
            if found := complaints(case, outcome):
                print(f"{case.category}: {case.name}: {'; '.join(found)}", file=sys.stderr)
            else:
                (refused if case.exit else taken)[case.category] += 1
    print("| category | inputs tried | refused rightly | taken rightly | answered wrongly |")
    print("|---|---:|---:|---:|---:|")
    for name in [*sorted(tried), "all"]:
        counts = [c.total() if name == "all" else c[name] for c in (tried, refused, taken)]
        wrong = counts[0] - counts[1] - counts[2]
        print(f"| {name} | {counts[0]} | {counts[1]} | {counts[2]} | {wrong} |")
    return int(tried != refused + taken)


if __name__ == "__main__":
    sys.exit(table(*sys.argv[1:]))
