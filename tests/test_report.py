"""The report of runs as a user makes it: a page and a text with every number, that need nothing and name what lacks."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from made_runs import everything, make_run, measure, record

from varscale.report import main

PROFILE = {
    "steps": 6,
    "step_ms": 30.0,
    "host": {"forward": 10.0, "backward": 17.5, "other": 2.5},
    "device_step_ms": 29.0,
    "device": {"forward": 12.0, "backward": 15.0, "idle": 2.0},
    "operators": [{"name": "aten::one_of_six", "calls": 6.0, "ms": 7.25}],
}
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What an HTML page holds; tags that are not closed in order fail."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.cells = [], [], [], []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data

    def values(self, name):
        return [value for _, own, value in self.attributes if own == name]


def table(text: str, head: str) -> dict[str, list[str]]:
    """The rows of the first table of a Markdown text whose head begins so, by their first cell."""
    lines = text[text.index(f"| {head} |") :].partition("\n\n")[0].splitlines()
    cells = [[re.sub(r"\\(.)", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(row) for row in cells}) == 1
    return {row[0]: row[1:] for row in (cells[0], *cells[2:])}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs, one measured at two checkpoints and beside baselines, and their report."""
    folder = tmp_path_factory.mktemp("report")
    first, second = make_run(folder / "varcon"), make_run(folder / "vssl", "digits-vssl")
    baseline = record("knn", {"top1_k20": 43.21}, "untrained", picture="step-00000012/knn-untrained.png")
    measure(first, 8, *everything(8, shift=-10.0))
    measure(first, 12, *everything(12), baseline)
    measure(second, 12, *everything(12, shift=2.0))
    (first / "profile").mkdir()
    (first / "profile" / "profile.json").write_text(json.dumps(PROFILE))
    assert main([str(first), str(second), "--out", str(folder / "report")]) == 0
    return folder


def results(folder, run, step):
    return json.loads((folder / run / "evaluation" / f"step-{step:08d}.json").read_text())["results"]


def expected(record):
    """How every value of a record is written."""
    for name, value in record["metrics"].items():
        if value is not None:
            yield name, f"{value:.2f}" if record["units"][name] == "%" else f"{value:.4f}"


def test_the_page_holds_every_value_that_was_measured(made):
    page = Page((made / "report" / "index.html").read_text())
    numbers = {number for cell in page.cells for number in cell.split(" ± ")}
    found = [pair for run, step in (("varcon", 8), ("varcon", 12), ("vssl", 12)) for one in results(made, run, step)
             for pair in expected(one)]  # fmt: skip
    assert len(found) > 30
    assert {text for _, text in found} <= numbers


def test_the_page_refers_to_nothing_outside(made):
    text = (made / "report" / "index.html").read_text()
    page = Page(text)
    assert {"script", "link", "iframe", "object", "embed"}.isdisjoint(page.tags)
    assert page.values("src")
    assert all(value.startswith("data:image/png;base64,") for value in page.values("src"))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for value in page.values("href"):
        assert value.startswith("data:") or value.removeprefix("#") in ids, value
    for target in re.findall(r"url\(([^)]*)\)", text):
        assert target.removeprefix("#") in ids, target
    assert "http" not in text
    assert "@import" not in text


def test_the_page_adapts_to_narrow_and_dark_screens(made):
    text = (made / "report" / "index.html").read_text()
    page = Page(text)
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"<svg[^>]* width=", text), "a picture is as wide as its place"
    assert text.count("<table>") == text.count('<div class="scroll" tabindex="0"><table>')
    assert text.count('<div class="scroll" tabindex="0"><div class="panorama"><svg') == 1, (
        "a step is drawn as a long bar"
    )
    assert "currentColor" in text
    assert "#010203" not in text


LOOK = """<!doctype html><title>not loaded</title><iframe id="page" width="390" height="844" src="{page}"></iframe>
<script>
onload = () => {{
  const shown = page.contentDocument, all = [...shown.querySelectorAll("svg, img")];
  const flat = all.filter(one => one.checkVisibility() && one.getBoundingClientRect().height < 20);
  document.title = JSON.stringify({{
    width: shown.documentElement.scrollWidth, pictures: all.length, flat: flat.length,
    broken: [...shown.images].filter(one => !one.naturalWidth).length, words: shown.body.innerText.length,
  }});
}};
</script>"""


def test_a_browser_shows_it_as_wide_as_a_phone(made):
    """Nothing but what is meant to be scrolled by itself goes over the edge, and every picture is there."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs chromium or Chrome")
    (made / "phone.html").write_text(LOOK.format(page="report/index.html"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command = [browser, *options, "--virtual-time-budget=10000", "--dump-dom", (made / "phone.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seen = json.loads(re.search("<title>(.*?)</title>", done.stdout)[1])
    assert seen["width"] <= 390
    assert (seen["flat"], seen["broken"]) == (0, 0)
    assert seen["pictures"] > 20
    assert seen["words"] > 3000


def test_the_page_has_every_part(made):
    page = Page((made / "report" / "index.html").read_text())
    for words in (
        "distribution of tau2 by epoch", "spread of the latents", "kNN top-1 while training",
        "t-SNE, epoch 2, step 8", "t-SNE, epoch 3, step 12", "clustering",
        "one of tomorrow", "knn, untrained", "reliability of p(r|z)",
        "by severity of corruption", "few-shot top-1", "images per second", "images/s, median",
        "step, 90th percentile (ms)", "varcon: where the time of a step goes, mean of 6 profiled steps",
        "aten::one_of_six",
        "a note of the evaluator", "optimizer.weight_decay", "python -m varscale.evaluate --checkpoint",
        "python -m varscale.report",
    ):  # fmt: skip
        assert words in page.words, words
    assert "What is missing" not in page.words


def test_the_text_says_what_the_files_of_results_say(made):
    text = (made / "report" / "report.md").read_text()
    found = table(text, "metric")
    assert found["metric"] == ["varcon", "vssl", "untrained resnet18, 32x32, seed 0"]
    for column, run in enumerate(("varcon", "vssl")):
        for one in results(made, run, 12):
            values = dict(expected(one)) if one["model"] == "trained" else {}
            for name, value in values.items():
                if name.endswith("_ci95"):
                    continue
                unit = " (%)" if one["units"][name] == "%" else ""
                interval = f" ± {values[f'{name}_ci95']}" if f"{name}_ci95" in values else ""
                assert found[f"{one['evaluator']} {name}{unit}"][column] == value + interval
    assert found["knn top1_k20 (%)"][2] == "43.21"


def test_the_table_of_throughput_tells_what_the_lines_say(made):
    """Of the lines of `made_runs`, numbered from 1 to 12."""
    found = table((made / "report" / "report.md").read_text().partition("## Throughput")[2], "")
    expected = {
        "images/s, median": "106.5",
        "images/s, greatest": "112.0",
        "views/s, median": "213.0",
        "step, median (ms)": "10.0",
        "step, 90th percentile (ms)": "16.5",
        "step, longest (ms)": "42.0",
        "waiting for data": "3.1%",
        "TFLOP/s of a rank": "0.5",
        "process memory, peak (GiB)": "1.50",
    }
    assert {name: found[name] for name in expected} == {name: [value] * 2 for name, value in expected.items()}
    assert "MFU" not in found, "nothing is known of the device's peak"


def test_the_pictures_of_the_text_are_there_and_no_others(made):
    text = (made / "report" / "report.md").read_text()
    named = re.findall(r"\]\((figures/[^)]*)\)", text)
    assert len(named) == len(set(named)) > 20
    assert {f"figures/{path.name}" for path in (made / "report" / "figures").iterdir()} == set(named)
    assert all((made / "report" / name).read_bytes().startswith(b"\x89PNG") for name in named)


def test_names_are_shown_as_they_are(tmp_path):
    name = "<b>x & $1 | _`y` *[z]"
    first, second = make_run(tmp_path / name), make_run(tmp_path / "_other")
    measure(first, 12, *everything(12))
    measure(second, 12, *everything(12))
    assert main([str(first), str(second), "--out", str(tmp_path / "report")]) == 0
    page = Page((tmp_path / "report" / "index.html").read_text())
    assert "b" not in page.tags
    assert name in page.cells
    assert page.words.count(name) > 10, "legends name it too"
    text = (tmp_path / "report" / "report.md").read_text()
    assert "<b>" not in re.sub(r"(?m)^    .*$", "", text), "only in commands"
    assert table(text, "metric")["metric"][0] == name.replace("&", "&amp;").replace("<", "&lt;")


def test_what_a_run_lacks_is_said(tmp_path, capsys):
    bare = make_run(tmp_path / "bare", metrics=False)
    damaged, behind = make_run(tmp_path / "damaged"), make_run(tmp_path / "behind")
    lines = (damaged / "metrics.jsonl").read_text().splitlines(keepends=True)
    (damaged / "metrics.jsonl").write_text("".join([lines[0], "{half a line\n", *lines[1:], '{"kind": "tr']))
    measure(damaged, 8, record("knn", {"top1_k20": 1.5}, picture="step-00000008/knn.png"))
    (damaged / "evaluation" / "step-00000008" / "knn.png").unlink()
    (damaged / "evaluation" / "step-00000012.json").write_text("{")
    measure(behind, 8, record("knn", {"top1_k20": 77.25}))
    (behind / "evaluation" / "step-00000008-old.json").write_text("moved away")
    (behind / "bad-step-00000011.json").write_text("{}")
    stopped = make_run(tmp_path / "stopped", "digits-varcon", "schedule.epochs=10")
    measure(stopped, 12, record("linear", {"top1": 1.5}, picture="step-00000012/linear.png"))
    (stopped / "evaluation" / "step-00000012" / "linear.png").write_bytes(b"\x89PNG\r\n")
    old = [json.loads(line) for line in (behind / "metrics.jsonl").read_text().splitlines()]
    for line in old:
        line.pop("tau2_histogram", None)
    (behind / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    (behind / "profile").mkdir()
    (behind / "profile" / "profile.json").write_text("{")
    assert main([*map(str, (bare, damaged, behind, stopped)), "--out", str(tmp_path / "report")]) == 0
    words, printed = Page((tmp_path / "report" / "index.html").read_text()).words, capsys.readouterr().out
    for said in (
        "bare: no metrics were recorded",
        f"bare: nothing was measured on it yet: python -m varscale.evaluate --checkpoint {bare} knn",
        "damaged: metrics.jsonl: 1 damaged line(s) were left out (number 2)",
        f"damaged: {damaged / 'evaluation' / 'step-00000012.json'}: not a file of results",
        "behind: the distribution of tau2 was not recorded",
        f"behind: {behind / 'profile' / 'profile.json'}: is damaged; a start with --profile writes it again",
        "behind: measured at step 8, not yet at its newest checkpoint, step-00000012",
        "behind: it had 1 bad step(s), told in bad-step-00000011.json",
        "stopped: it is at epoch 3 of 10",
    ):
        assert said in words, said
        assert said in printed, said
    assert "knn.png is gone" in words
    assert "linear.png is damaged" in words
    assert "77.25" in words
    assert "loss" in words


def test_a_run_that_lacks_everything_still_has_a_report(tmp_path, capsys):
    run = make_run(tmp_path / "bare", metrics=False)
    assert main([str(run), "--out", str(tmp_path / "report")]) == 0
    assert "no accuracy was measured yet" in capsys.readouterr().out
    assert "optimizer.lr" in Page((tmp_path / "report" / "index.html").read_text()).words


@pytest.fixture
def refused(capsys):
    """Call main; return its one line of complaint."""

    def call(*arguments) -> str:
        assert main([str(part) for part in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return call


def test_what_is_no_run_is_refused(refused, tmp_path):
    make_run(tmp_path / "varcon", metrics=False)
    out = tmp_path / "report"
    assert f"there is no such run; nearest: {tmp_path / 'varcon'}" in refused(tmp_path / "varcom", "--out", out)
    assert "is not a run (it has no manifest.json)" in refused(tmp_path, "--out", out)
    (tmp_path / "varcon" / "manifest.json").write_text('{"config": {}}')
    assert "not a manifest of a run" in refused(tmp_path / "varcon", "--out", out)
    assert not out.exists()


def test_a_folder_that_is_no_report_is_left_alone_and_an_older_report_is_replaced(refused, tmp_path, capsys):
    run, out = make_run(tmp_path / "run", metrics=False), tmp_path / "report"
    assert "exists and is no folder" in refused(run, "--out", run / "manifest.json")
    assert "is not the folder of a report (it holds checkpoints)" in refused(run, "--out", run)
    assert main([str(run), "--out", str(out)]) == 0
    (out / "figures" / "older.png").write_bytes(b"")
    assert main([str(run), "--out", str(out)]) == 0
    assert not (out / "figures" / "older.png").exists()
    capsys.readouterr()
    (out / "figures" / "mine.txt").write_text("kept")
    assert "(it holds figures/mine.txt)" in refused(run, "--out", out)
    assert (out / "figures" / "mine.txt").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_it_can_be_written_where_one_stands(tmp_path, monkeypatch):
    run, out = make_run(tmp_path / "run", metrics=False), tmp_path / "report"
    assert main([str(run), "--out", str(out)]) == 0
    (out / "index.html").write_text("older")
    monkeypatch.chdir(out)
    assert main([str(run), "--out", "."]) == 0
    assert "older" not in (out / "index.html").read_text()[:100]
    assert {path.name for path in tmp_path.iterdir()} == {"run", "report"}


def test_it_runs_as_a_module_and_as_a_file_without_torch(repository, tmp_path):
    run = make_run(tmp_path / "run", metrics=False)
    measure(run, 12, record("knn", {"top1_k20": 90.0}))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    for number, how in enumerate((["-m", "varscale.report"], ["varscale/report.py"])):
        done = subprocess.run(
            [sys.executable, *how, str(run), "--out", str(tmp_path / f"report{number}")],
            cwd=repository,
            env={"PYTHONPATH": f"{tmp_path / 'site'}:{repository}"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "kNN, k = 20" in done.stdout
    missing = subprocess.run(
        [sys.executable, "-m", "varscale.report", str(tmp_path / "rum"), "--out", str(tmp_path / "x")],
        cwd=repository,
        capture_output=True,
        text=True,
    )
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "there is no such run; nearest" in missing.stderr
