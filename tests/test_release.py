"""What a release rests on: lower bounds, and workflows that call what there is. The rest is `make release-check`."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def steps(path):
    return [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]


def test_every_requirement_has_a_lower_bound(project):
    """Without one, nobody knows what ``release_check.py oldest`` tries."""
    extras = project["optional-dependencies"].values()
    needed = {*project["dependencies"], *(text for extra in extras for text in extra)}
    assert [text for text in needed if ">=" not in text and not text.startswith("cbsa-torch[")] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_targets_and_pinned_actions(path):
    for step in steps(path):
        if "run" in step:
            command, target, *_ = step["run"].split()
            assert (command, target in TARGETS) == ("make", True), step
        else:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@(v\d+|release/v1)", step["uses"]), step


def test_workflows_run_what_is_supported(project):
    ci = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    supported = [text.rpartition(" ")[2] for text in project["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert project["requires-python"] == f">={supported[0]}"
    tried = ci["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert len(tried) >= 3
    assert {supported[0], supported[-1]} <= set(tried) <= set(supported)


def test_only_the_last_step_of_publishing_may_upload():
    jobs = yaml.safe_load((ROOT / ".github/workflows/publish.yml").read_text())["jobs"]
    assert jobs["publish"]["needs"] == "build"
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
