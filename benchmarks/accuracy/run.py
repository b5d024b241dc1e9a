"""Teacher, baseline and each recipe's student, over data sets and seeds: the table of benchmarks/RESULTS.md.

    python benchmarks/accuracy/run.py --data ../shared/data --teacher DIR --work DIR
    python benchmarks/accuracy/run.py ... --sets sst2 --recipes vanilla_kd,all_in_one --seeds 0,1,2
    python benchmarks/accuracy/run.py ... --recipes vanilla_kd --variants vanilla_kd-t1      # of variants.yaml
    python benchmarks/accuracy/run.py ... --table            # of what is finished, nothing is trained

Every model is trained by `distill-nlp run` in a process of its own, from a config that is laid down in the work folder:
a recipe of configs/recipes with the data, models and sizes of benchmarks/accuracy/sets over it. The teacher of a set is
trained once, as is a first phase that recipes share. Baselines are trained with the budgets of `BASELINES`, that is
steps, learning rate and evaluations, once per seed each; those that are best by validation score are what all recipes
are compared with. What is finished is not done again, so a killed run goes on. `--write` puts a set's table in the
place of its former one and leaves the others.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from grouping import write_grouped
from rest import write_rest
from scores import SetScores
from table import write_section

from distill_nlp.config_file import read_settings

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RECIPES = REPOSITORY / "configs" / "recipes"
VARIANTS = HERE / "variants.yaml"
RESULTS = REPOSITORY / "benchmarks" / "RESULTS.md"
# A baseline does not depend on losses: it has the training of `vanilla_kd`, with these changes.
BASELINES: dict[str, dict[str, Any]] = {
    "base": {},
    "base_long": {"training": {"learning_rate": 1.5e-4, "num_train_epochs": 6}},
}


def main() -> None:
    options = _arguments()
    finished: dict[str, SetScores] = {}
    # A set that others build on comes before them.
    for bench in sorted((Bench(name, options) for name in options.sets), key=lambda bench: bench.base is not None):
        if not options.table:
            bench.train()
        scores = bench.scores()
        if scores is not None:
            finished[bench.name] = scores
    commands = {found.name: _command(name, found, options) for name, found in finished.items()}
    print(write_section(list(finished.values()), RESULTS, commands if options.write else None))


def _arguments() -> argparse.Namespace:
    names = sorted(path.stem for path in (HERE / "sets").glob("*.yaml"))
    recipes = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--teacher", type=Path, required=True, help="checkpoint that the teachers are made from")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and predictions")
    parser.add_argument("--sets", type=_listed(names), default=names, help=f"of {','.join(names)}")
    parser.add_argument("--recipes", type=_listed(recipes), default=recipes, help=f"of {','.join(recipes)}")
    variants = sorted(read_settings(VARIANTS, "variants"))
    parser.add_argument(
        "--variants",
        type=_listed(variants),
        default=[],
        help=f"changed recipes, in a table of their own: {','.join(variants)}",
    )
    parser.add_argument(
        "--no-long-baseline", action="store_true", help="train no baselines of twice the steps and more learning rate"
    )
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, which share the cores")
    parser.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        default="bf16",
        help="of all trainings; some CPUs with bfloat16 arithmetic are slower in it [bf16]",
    )
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--write", action="store_true", help=f"put the table into {RESULTS.relative_to(REPOSITORY)}")
    return parser.parse_args()


def _command(name: str, scores: SetScores, options: argparse.Namespace) -> str:
    """What to type for a set's table, with names in the place of this machine's folders."""
    recipes = [recipe for recipe in scores.recipes if recipe not in options.variants]
    lists = {"sets": [name], "recipes": recipes, "seeds": options.seeds}
    if variants := [variant for variant in scores.recipes if variant in options.variants]:
        lists["variants"] = variants
    given = [f"--{name} {','.join(map(str, values))}" for name, values in lists.items()]
    command = "python benchmarks/accuracy/run.py --data DATA --teacher CHECKPOINT --work DIR"
    given += ["--no-long-baseline"] if options.no_long_baseline else []
    given += [f"--jobs {options.jobs}"] + ([] if options.precision == "bf16" else [f"--precision {options.precision}"])
    return " ".join([command, *given])


def _listed(known: list[str]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
        return names

    return parse


class Bench:
    """One data set: its models in `work/NAME/{base,RECIPE}`; a set that names a `base` has that one's in its place."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.folder = options.work.resolve() / name
        self.set = read_settings(HERE / "sets" / f"{name}.yaml", "set")
        self.base = self.set.pop("base", None)
        self.factor = self.set.pop("learning_rate_factor", 1.0)
        self.set["training"]["precision"] = options.precision
        wanted = self.set.pop("recipes", options.recipes)
        # Folder -> recipe, and what is changed of it.
        self.made: dict[str, tuple[str, dict[str, Any]]] = {
            name: (name, {}) for name in wanted if name in options.recipes
        }
        variants = read_settings(VARIANTS, "variants")
        for name in options.variants:
            changes = dict(variants[name])
            self.made[name] = (changes.pop("recipe"), changes)
        self.recipes = list(self.made)
        self.baselines = {name: BASELINES[name] for name in list(BASELINES)[: 1 if options.no_long_baseline else None]}
        for block, key, root in (
            ("data", "dataset", options.data),
            ("data", "unlabeled", options.data),
            ("teacher", "model", None),
        ):
            if root is None:
                self.set[block][key] = str(options.teacher.resolve())
            elif key in self.set[block]:
                self.set[block][key] = str((root / self.set[block][key]).resolve())
        groups, single = self.set.pop("groups", None), self.set.pop("single_label", False)
        pooled = self.set.pop("unlabeled_rest", False)
        if groups is not None:
            self._group_classes(groups, single)
        if pooled:
            self._pool_the_rest()

    def _group_classes(self, groups: dict[str, list[str]], single: bool) -> None:
        data = self.set["data"]
        if not self.options.table:
            target = self.folder / "data"
            write_grouped(Path(data["dataset"]), target, data["label_column"], data["label_names"], groups, single)
        data |= {"dataset": str(self.folder / "data"), "label_names": list(groups)}

    def _pool_the_rest(self) -> None:
        data, target = self.set["data"], self.folder / "rest.parquet"
        if not self.options.table:
            write_rest(Path(data["dataset"]), target, data["max_train_samples"], data.get("seed", 0))
        data["unlabeled"] = str(target)

    def train(self) -> None:
        if self.base is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in self.baselines:
                if not (self.folder / name).exists():
                    (self.folder / name).symlink_to(Path("..") / self.base / name)
        for name, changes in self.baselines.items():
            self._lay_down("vanilla_kd", name, changes)
        if self.base is None:
            self._distill("base", "teacher")
        elif not self._finished("base/teacher"):
            raise SystemExit(f"{self.name} takes teacher and baseline of {self.base}: run that set first")
        for name, (recipe, changes) in self.made.items():
            self._lay_down(recipe, name, changes)
        for name in (*self.baselines, *self.recipes):
            own = self.folder / name
            own.mkdir(parents=True, exist_ok=True)
            if not (own / "teacher").exists():
                (own / "teacher").symlink_to(Path("..") / "base" / "teacher")
        seeds = self.options.seeds if self.base is None else []
        jobs = [(name, "baseline", seed) for seed in seeds for name in self.baselines]
        sharing = self._sharing()
        first = [recipe for recipe in self.recipes if recipe not in sharing]
        # Recipe by recipe: what a killed run leaves behind is whole rows of the table.
        jobs += [(recipe, "student", seed) for recipe in first for seed in self.options.seeds]
        # Of a recipe that is not what it was; what is shared now is linked when it is there.
        for path in (self._first_phase(recipe, seed) for recipe in self.recipes for seed in self.options.seeds):
            if path.is_symlink():
                path.unlink()
        self._distill_all(jobs)
        for recipe, owner in sharing.items():
            for seed in self.options.seeds:
                self._link_phase(recipe, owner, seed)
        self._distill_all([(recipe, "student", seed) for seed in self.options.seeds for recipe in sharing])

    def _sharing(self) -> dict[str, str]:
        """Recipes whose first phase is that of an earlier one, which is trained once; and that one."""
        owners: dict[str, str] = {}
        sharing = {}
        for recipe in self.recipes:
            settings = read_settings(self.folder / f"{recipe}.yaml", "config")
            phases = settings.get("phases", [])
            if len(phases) > 1:
                alike = yaml.safe_dump(settings | {"phases": phases[:1], "output_dir": None})
                owner = owners.setdefault(alike, recipe)
                if owner != recipe:
                    sharing[recipe] = owner
        return sharing

    def _first_phase(self, recipe: str, seed: int) -> Path:
        return self.folder / recipe / "student" / f"seed-{seed}-phase-1"

    def _link_phase(self, recipe: str, owner: str, seed: int) -> None:
        own = self._first_phase(recipe, seed)
        if not own.exists():
            own.parent.mkdir(parents=True, exist_ok=True)
            own.symlink_to(Path("..") / ".." / owner / "student" / own.name)

    def _distill_all(self, jobs: list[tuple[str, str, int]]) -> None:
        with ThreadPoolExecutor(self.options.jobs) as pool:
            list(pool.map(lambda job: self._distill(*job), jobs))

    def _settings(self, recipe: str, folder: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        settings = merged(merged(read_settings(RECIPES / f"{recipe}.yaml", "recipe"), changes or {}), self.set)
        for section in (settings, *settings.get("phases", [])):
            if "learning_rate" in section.get("training", {}):
                section["training"]["learning_rate"] *= self.factor
        places = {"output_dir": str(self.folder / folder), "cache_dir": str(self.options.work.resolve() / "cache")}
        return settings | places

    def _lay_down(self, recipe: str, folder: str, changes: dict[str, Any] | None = None) -> None:
        config = self.folder / f"{folder}.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(yaml.safe_dump(self._settings(recipe, folder, changes), sort_keys=False))

    def _is_as_now(self, folder: str) -> bool:
        """Whether the models in a recipe's folder were made by the recipe as it stands; else they are no row of it."""
        config = self.folder / f"{folder}.yaml"
        if not config.is_file():
            return False
        laid, now = (
            {name: settings.get(name) for name in ("losses", "training", "phases", "student")}
            for settings in (
                read_settings(config, "config"),
                self._settings(self.made[folder][0], folder, self.made[folder][1]),
            )
        )
        if laid != now:
            print(f"{self.name}: {folder} was made by other settings, it is left out", file=sys.stderr)
        return laid == now

    def _distill(self, folder: str, stage: str, seed: int | None = None) -> None:
        config = self.folder / f"{folder}.yaml"
        command = [sys.executable, "-m", "distill_nlp", "run", str(config), "--stages", stage, "--no-doctor"]
        command += [] if seed is None else ["--seeds", str(seed)]
        # The teacher is trained alone.
        threads = max(1, (os.cpu_count() or 1) // (1 if stage == "teacher" else self.options.jobs))
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, cwd=REPOSITORY)

    def scores(self) -> SetScores | None:
        """Of the models that are finished for all seeds; None where teacher or baselines are not."""
        kinds = [f"{name}/baseline" for name in self.baselines]
        needed = ["base/teacher", *(path for kind in kinds for path in self._seeds(kind))]
        if not all(map(self._finished, needed)):
            return None
        done = [
            recipe
            for recipe in self.recipes
            if self._is_as_now(recipe) and all(map(self._finished, self._seeds(f"{recipe}/student")))
        ]
        name = f"{self.name}-variants" if self.options.variants else self.name
        beside = {own: self.made[own][0] for own in done if own in self.options.variants}
        variant_of = {own: recipe for own, recipe in beside.items() if recipe in done}
        return SetScores(name, self.folder, self.options.seeds, done, kinds, variant_of)

    def _seeds(self, kind: str) -> Iterator[str]:
        return (f"{kind}/seed-{seed}" for seed in self.options.seeds)

    def _finished(self, path: str) -> bool:
        return (self.folder / path / "stage.json").is_file()


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two nested settings as one; what the second one says counts, and its None takes a setting away."""
    result = dict(below)
    for name, value in above.items():
        inner = result.get(name)
        result[name] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


if __name__ == "__main__":
    main()
