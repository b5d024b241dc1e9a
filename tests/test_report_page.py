"""report.html: self-contained, escaped, complete; in a browser where there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset

from distill_nlp.config import ReportSection
from distill_nlp.report import ReportTeacher, build_report, render_markdown, write_report
from distill_nlp.report import explorer as explorer_module
from distill_nlp.report.earlier import Answers, Earlier
from distill_nlp.report.explorer import SURE, listed
from distill_nlp.report.explorer_page import MOST_CHARACTERS
from distill_nlp.report.page import render_page
from distill_nlp.report.rows import TestRows
from distill_nlp.report.schema import Report
from distill_nlp.report_stage import ReportStage

pytestmark = pytest.mark.plots

EVIL = '<script>document.title = "owned"</script><img src="http://example.invalid/x.png" onerror="owned()">&amp; "q"'
NAMES = ["<b>bad</b>", "$good$ | 'fine'"]
COSTS = {
    "parameters": 1000,
    "size_mb": 4.0,
    "weights_mb": 4.0,
    "latency_ms": {"p50": 1.0, "p95": 2.0, "p99": 3.0},
    "throughput": 100.0,
    "pass_memory": {"rows": 4, "mb": 1.5, "how": "growth of the process's resident memory"},
}
BROWSER = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def logits_of(answers, sure=3.0):
    return np.where(np.eye(len(NAMES))[answers] > 0, sure, -sure)


def make_report(rows=12, several=False, names=NAMES, seeds=(0, 1), texts=None):
    """A report of answers that are given: the student of seed 0 is wrong on rows 0 and 1, the teacher on row 2, and
    both on row 3.
    """
    classes = len(names)
    labels = np.arange(rows) % 2
    wrong = {"teacher": [2, 3], "student/0": [0, 1, 3], "student/1": [0], "baseline/0": [5], "baseline/1": [6]}
    logits = {}
    for name in ("teacher", *(f"{kind}/{seed}" for kind in ("baseline", "student") for seed in seeds)):
        answers = labels.copy()
        answers[wrong.get(name, [])] ^= 1
        logits[name] = np.where(np.eye(classes)[answers] > 0, 3.0, -3.0)
    # The teacher is surest on row 1.
    logits["teacher"][1] *= 2
    targets = np.eye(classes)[labels].tolist() if several else labels.tolist()
    texts = texts or [f"{EVIL} row{i}" for i in range(rows)]
    lengths = np.arange(rows) + 3
    return build_report(
        teachers=[ReportTeacher("teacher", None, None)],
        baselines={seed: Path(f"baseline/{seed}") for seed in seeds},
        students={seed: Path(f"student/{seed}") for seed in seeds},
        tokenizer=None,
        test=Dataset.from_dict({"labels": targets}),
        label_names=list(names),
        settings=ReportSection(bootstrap_samples=100),
        rows=TestRows(texts, lengths, lengths > rows),
        earlier=Earlier(Answers(logits), {kind: dict(COSTS) for kind in ("teacher", "baseline", "student")}),
    )


def with_run(report, folder):
    report["run"] = {
        "dataset": "<i>data</i>",
        "stages": {
            "teacher": {
                "objective": "1·ce",
                "steps": 4,
                "seconds": 2.0,
                "energy": {"joules": 5400.0, "sources": ["p0"]},
            },
            "student/seed-0": {"objective": "1·<kl>", "steps": 4, "seconds": 1.0, "energy": None},
        },
        "versions": {"torch": "2"},
        "fingerprint": {},
    }
    for stage in report["run"]["stages"]:
        (folder / stage).mkdir(parents=True)
        log = [{"step": s, "loss": 2.0, "loss_ce": 1.0 / s, "loss_<kl>": 0.5} for s in (1, 2)]
        (folder / stage / "training_log.json").write_text(
            json.dumps({"log": [*log, {"step": 2, "eval_accuracy": 0.5, "eval_f1_macro": 0.5}]})
        )
    return report


class Page(HTMLParser):
    """Tags, attributes and the texts of the examples, as a browser would read them."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts, self._depth = [], [], [], 0
        self.headings, self._open = [], None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if ("class", "text") in attributes:
            self.texts.append("")
            self._depth = 1
        elif self._depth:
            self._depth += 1
        self._open = tag
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_endtag(self, tag):
        self._depth = max(self._depth - 1, 0)
        self._open = None

    def handle_data(self, data):
        if self._depth:
            self.texts[-1] += data
        if self._open in ("h1", "h2", "h3"):
            self.headings[-1] += data


@pytest.fixture(scope="module", params=[False, True], ids=["one label", "several labels"])
def html(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return render_page(with_run(make_report(several=request.param), folder), folder)


def test_texts_and_names_stay_text(html):
    page = Page(html)
    assert page.tags.count("script") == 1
    assert not {"img", "b>bad", "i", "link", "iframe"} & set(page.tags)
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert any(text == f"{EVIL} row1" for text in page.texts)
    assert "<b>bad</b>" not in html
    assert "loss_<kl>" not in html
    assert "loss_&lt;kl&gt;" in html
    for picture in re.findall(r'aria-label="Confusion.*?</svg>', html, flags=re.DOTALL):
        assert ">$good$ | 'fine'<" in picture.replace("&apos;", "'").replace("&#x27;", "'")


def test_the_page_needs_nothing_from_elsewhere(html):
    loading = [a for a in Page(html).attributes if a[1] in ("src", "href", "srcset", "action", "data", "xlink:href")]
    assert [value for *_, value in loading if not value.startswith("#")] == []
    css = html[html.index("<style>") : html.index("</style>")]
    assert "@import" not in css
    assert re.findall(r"url\((?!#)", html) == []


def test_the_ids_of_the_plots_are_apart_and_what_they_refer_to_is_there(html):
    ids = [value for _, name, value in Page(html).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    wanted = re.findall(r"url\(#([^)]+)\)|xlink:href=\"#([^\"]+)\"", html)
    assert wanted
    assert {a or b for a, b in wanted} <= set(ids)


def test_the_page_has_all_its_parts(html):
    headings = " / ".join(Page(html).headings)
    for part in ("Scores and costs", "Classes", "by length", "Training", "Time and energy", "Examples"):
        assert part in headings
    # Scores and reliability; a curve per term and for validation; confusion where there is one label per text.
    confusions = len(re.findall(r'aria-label="Confusion', html))
    assert confusions in (0, 3)
    assert html.count("<svg") == 2 + confusions + 8
    assert 'aria-label="Confidence against' in html
    assert "5.4 kJ" in html
    assert "not read" in html
    assert html.count("var(--ink)") > 10
    assert "#0102" not in html


def test_a_folder_of_data_is_named_without_its_path_and_an_id_is_whole(tmp_path):
    report = with_run(make_report(), tmp_path)
    for dataset, shown in [(str(tmp_path / "reviews"), "reviews"), ("stanfordnlp/imdb", "stanfordnlp/imdb")]:
        report["run"]["dataset"] = dataset
        page = render_page(report, tmp_path)
        assert f"<title>{shown}: distill-nlp report</title>" in page
        assert str(tmp_path) not in page


def test_nothing_is_said_of_energy_that_was_not_read(tmp_path):
    report = with_run(make_report(), tmp_path)
    for stage in report["run"]["stages"].values():
        stage["energy"] = None
    html = render_page(report, tmp_path)
    assert "Energy is left out" in html
    assert "kJ" not in html
    assert "Energy is left out" in render_markdown(report)


def test_a_stage_that_was_interrupted_says_since_when_its_seconds_and_energy_count(tmp_path):
    stage = {"objective": "1·kl", "steps": 4, "seconds": 2.0, "energy": None}
    for name, resumed_from in (("student/seed-0", "checkpoint-3"), ("baseline/seed-0", None)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "stage.json").write_text(json.dumps(stage | {"resumed_from": resumed_from, "versions": {}}))
    run = SimpleNamespace(
        root=tmp_path,
        materials=SimpleNamespace(teachers=[SimpleNamespace(name="teacher", finished=None)]),
        experiment=SimpleNamespace(seeds=[0], phases=[]),
    )
    report = make_report(seeds=(0,))
    report["run"] = {"dataset": "d", "stages": ReportStage._stage_records(run), "versions": {}, "fingerprint": {}}
    write_report(report, tmp_path)
    Report.model_validate_json((tmp_path / "report.json").read_text(encoding="utf-8"))
    markdown, page = ((tmp_path / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html"))
    assert "| student/seed-0 | 1·kl | 4 | 2 (from checkpoint-3 on) |" in markdown
    assert "| baseline/seed-0 | 1·kl | 4 | 2 |" in markdown
    assert page.count("(from checkpoint-3 on)") == 1


def test_a_teacher_of_an_earlier_run_is_no_stage_of_one_whose_teacher_came_finished(tmp_path):
    for name in ("teacher", "teacher-2", "student/seed-0"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "stage.json").write_text(json.dumps({"steps": 4}))
    parts = [SimpleNamespace(name="teacher", finished=object()), SimpleNamespace(name="teacher-2", finished=None)]
    run = SimpleNamespace(
        root=tmp_path,
        materials=SimpleNamespace(teachers=parts),
        experiment=SimpleNamespace(seeds=[0], phases=[]),
    )
    assert list(ReportStage._stage_records(run)) == ["teacher-2", "student/seed-0"]


@pytest.mark.parametrize("several", [False, True])
def test_the_report_fits_its_schema_and_unknown_keys_do_not(several, tmp_path):
    write_report(with_run(make_report(several=several), tmp_path), tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    Report.model_validate(saved)
    saved["models"]["student"]["seeds"]["0"]["surprise"] = 1
    with pytest.raises(ValueError, match="surprise"):
        Report.model_validate(saved)
    del saved["models"]["student"]["seeds"]["0"]["surprise"]
    saved["comparison"]["f1_macro_intervals" if several else "accuracy_intervals"] = None
    with pytest.raises(ValueError, match="_intervals is missing"):
        Report.model_validate(saved)


def test_the_schema_can_be_written_as_json_schema():
    schema = Report.model_json_schema()
    assert set(schema["required"]) >= {"models", "comparison", "label_names", "machine"}


def test_without_matplotlib_the_page_says_so_and_has_the_rest(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    html = render_page(with_run(make_report(), tmp_path), tmp_path)
    assert "<svg" not in html
    assert "matplotlib is not installed" in html
    assert 'id="explorer"' in html


def test_names_of_classes_cannot_break_a_table_of_markdown():
    row = next(line for line in render_markdown(make_report()).splitlines() if "good" in line)
    assert row.startswith("| $good$ \\| 'fine' |")
    assert "\\<b>bad\\</b>" in render_markdown(make_report())


@pytest.mark.parametrize("classes", [2, 13, 45])
def test_confusion_is_drawn_of_many_classes_too(classes, tmp_path):
    html = render_page(make_report(rows=2 * classes + 8, names=[f"c{i}" for i in range(classes)]), tmp_path)
    picture = html[html.index('aria-label="Confusion of the teacher') :]
    picture = picture[: picture.index("</svg>")]
    assert (">c1<" in picture) == (classes <= 40)
    assert html.count("<svg") == 5


# ---- the lists ----


def lists_of(report):
    logits = {name: values for name, values in report["logits"].items() if name != "labels"}
    found = listed(report["rows"], logits, np.array(report["logits"]["labels"]), report["label_names"], [0, 1])
    return {part.name: part for part in found}


@pytest.mark.parametrize("several", [False, True])
def test_rows_are_listed_where_one_model_is_right_alone_the_clearest_first(several):
    lists = lists_of(make_report(several=several))
    assert {name: [e.index for e in part.examples] for name, part in lists.items()} == {
        "teacher": [1, 0],
        "student": [2],
        "labels": [3],
    }
    first, second = lists["teacher"].examples
    assert (first.label, first.teacher, first.student) == (NAMES[1], NAMES[1], NAMES[0])
    assert (first.students_right, second.students_right) == (1, 0)
    assert sorted(first.classes) == sorted(NAMES)
    assert (first.length, first.truncated, first.bucket) == (4, False, 0)
    assert first.teacher_probability > second.teacher_probability > 0.9


def test_rows_are_ordered_by_what_the_models_give_the_label():
    report = make_report()
    for row, height in ((0, 9.0), (1, 0.5)):
        report["logits"]["teacher"][row] = np.where(np.eye(2)[row] > 0, 3.0, -3.0)
        # Wrong in both, and far off in row 0 alone.
        report["logits"]["student/0"][row] = np.where(np.eye(2)[1 - row] > 0, height, -height)
    assert [e.index for e in lists_of(report)["teacher"].examples] == [0, 1]


def test_a_label_error_needs_both_models_sure_of_the_same_class():
    report = make_report(rows=12, names=["a", "b", "c"], seeds=(0, 1))
    logits, labels = report["logits"], np.array(report["logits"]["labels"])
    sure = np.log(SURE / (1 - SURE) * 2)  # against two other classes of 0: just SURE

    def pointing(label, height):
        return np.eye(3)[label] * height

    other, third = (labels[3] + 1) % 3, (labels[3] + 2) % 3
    cases = {
        "both": (pointing(other, sure + 0.01), pointing(other, sure + 0.01), True),
        "teacher unsure": (pointing(other, sure - 0.01), pointing(other, 9), False),
        "student unsure": (pointing(other, 9), pointing(other, sure - 0.01), False),
        "another class": (pointing(other, 9), pointing(third, 9), False),
    }
    for name, (teacher, student, expected) in cases.items():
        logits["teacher"][3], logits["student/0"][3] = teacher, student
        assert (3 in [e.index for e in lists_of(report)["labels"].examples]) == expected, name


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [(3.0, 3.0, True), (3.0, 1.0, False), (1.0, 3.0, False), (-3.0, 3.0, False), (-3.0, -3.0, False)],
)
@pytest.mark.parametrize("there", [False, True])
def test_a_label_error_among_several_is_a_class_that_both_add_or_deny(teacher, student, expected, there):
    report = make_report(several=True, names=["a", "b", "c"])
    labels = np.array(report["logits"]["labels"])
    report["logits"]["teacher"][4] = report["logits"]["student/0"][4] = np.where(labels[4] > 0, 4.0, -4.0)
    report["logits"]["labels"] = labels
    labels[4, 2] = there
    sign = -1 if there else 1
    report["logits"]["teacher"][4, 2], report["logits"]["student/0"][4, 2] = sign * teacher, sign * student
    assert (4 in [e.index for e in lists_of(report)["labels"].examples]) == expected


def test_a_long_list_is_cut_and_says_how_many_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(explorer_module, "MOST_ROWS", 1)
    report = make_report(texts=["x" * (MOST_CHARACTERS + 17)] * 12)
    part = lists_of(report)["teacher"]
    assert (len(part.examples), part.total, part.left_out) == (1, 2, 1)
    html = render_page(report, tmp_path)
    assert "1 more rows are left out" in html
    assert "17 more characters" in html
    assert "x" * (MOST_CHARACTERS + 1) not in html


# ---- in a browser ----


def dom_of(html, folder):
    """The page's title and explorer as a browser has them after its scripts."""
    path = folder / "page.html"
    path.write_text(html, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    run = subprocess.run([BROWSER, *flags, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert "</html>" in run.stdout, run.stderr
    return run.stdout


STATE = """<script>
const click = (list) => document.querySelector(`button[data-list=${list}]`).click();
const set = (name, value) => {
  const field = document.querySelector(`#explorer [name=${name}]`);
  field.value = value;
  field.dispatchEvent(new Event("input", {bubbles: true}));
};
const state = () => [...document.querySelectorAll("#explorer section:not([hidden]) .example:not([hidden])")]
  .map((node) => node.querySelector("header span").textContent).join(",")
  + " of " + document.querySelector("#explorer section:not([hidden]) .shown").textContent;
document.body.dataset.found = [ACTIONS].map((action) => (action(), state())).join("; ");
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (CHROMIUM names one)")
@pytest.mark.parametrize(
    ("actions", "expected"),
    [
        ("() => {}", "row 1,row 0 of 2"),
        ("() => click('student')", "row 2 of 1"),
        ("() => set('search', 'ROW0 script')", "row 0 of 1"),
        ("() => set('search', 'row0 row1')", " of 0"),
        ("() => set('bucket', '3')", " of 0"),
        ("() => set('bucket', '0')", "row 1,row 0 of 2"),
        ("() => set('cut', '1')", " of 0"),
        ("() => set('cut', '0'), () => click('labels')", "row 1,row 0 of 2; row 3 of 1"),
        ("() => set('class', '1'), () => set('class', '2')", "row 1,row 0 of 2;  of 0"),
    ],
)
def test_the_lists_are_searched_and_filtered_in_a_browser(actions, expected, tmp_path):
    html = render_page(make_report(names=[*NAMES, "third"]), tmp_path)
    dom = dom_of(html.replace("</body>", STATE.replace("ACTIONS", actions)), tmp_path)
    assert re.search(r'data-found="([^"]*)"', dom).group(1) == expected
    assert "<title>distill-nlp report</title>" in dom
    assert "<img" not in dom
