"""The closing screen: warnings and the table with changes."""

from pathlib import Path
from typing import Any

import pytest

from eval.report import Results, table, write_results
from pretrain.summary import previous_results, results_table, warnings_of

RESULTS: Results = {
    "linear/image": {
        "metrics": {"top1": {"value": 0.75, "interval": [0.7, 0.8]}},
        "baselines": {"chance": {"top1": 0.1}},
    },
    "retrieval/image_to_text": {
        "metrics": {"r1": {"value": 0.5, "interval": None}, "r10": {"value": 0.8, "interval": None}},
        "baselines": {},
    },
}
ABOUT = {"encoder": {"folder": "a", "sha256": "1"}, "splits": {"test": {"samples": 3}}, "eval": {"label": "label"}}


def lines(*values: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"step": step, "skipped": 0, **line} for step, line in enumerate(values, 1)]


def only(found: list[str]) -> str:
    (warning,) = found
    return warning


def test_a_sound_run_has_no_warnings() -> None:
    metrics = lines({"data_wait": 0.1, "trunk_norm/a": 2.0, "trunk_norm/b": 1.0, "a": 5.0, "b": 0.5})
    assert warnings_of(metrics, {"rankme/image": 30.0, "broken/text": 0.0}, {"image": 64, "text": 64}) == []
    assert warnings_of([], {}, {"image": 64}) == []


def test_collapse_is_a_small_share_of_the_width() -> None:
    probe = {"rankme/image": 3.0, "rankme/text": 4.0}
    warning = only(warnings_of([], probe, {"image": 64, "text": 64}))
    assert warning.startswith("image features may have collapsed: they use 3.0 of 64 directions")
    assert warnings_of([], probe, {"image": 32, "text": 32}) == []
    assert "0.0 of 64" in only(warnings_of([], {"rankme/image": 0.0}, {"image": 64}))


def test_without_a_probe_the_newest_line_that_has_it_tells() -> None:
    metrics = lines({"rankme/image": 40.0}, {"rankme/image": 1.0}, {"loss": 1.0}, {"rankme/image": None})
    assert "1.0 of 64" in only(warnings_of(metrics, {}, {"image": 64}))
    assert warnings_of(metrics, {"rankme/image": 40.0}, {"image": 64}) == []
    assert warnings_of(metrics[:1], {}, {"image": 64}) == []


def test_outputs_that_are_not_finite_are_told_instead() -> None:
    warning = only(warnings_of([], {"broken/image": 7.0, "rankme/image": 1.0}, {"image": 64}))
    assert warning.startswith("7 outputs for image are zero or not finite")


def test_waiting_is_judged_by_the_end_of_the_run() -> None:
    metrics = lines(*[{"data_wait": 0.9}] * 9, {"data_wait": 0.1}, {"data_wait": 0.2}, {"data_wait": 0.1})
    assert warnings_of(metrics, {}, {}) == []
    metrics = lines(*[{"data_wait": 0.1}] * 9, {"data_wait": 0.4}, {"data_wait": 0.3}, {"data_wait": 0.5})
    warning = only(warnings_of([*metrics, {"step": 12, "rankme/image": 30.0}], {}, {}))
    assert "waited for data 40% of the time" in warning
    assert "data.workers" in warning


def test_one_loss_that_pulls_alone() -> None:
    pulls = {"trunk_norm/image_text": 19.0, "trunk_norm/masked_image": 1.0, "trunk_cosine/image_text/masked_image": -1}
    warning = only(warnings_of(lines(pulls, {"loss": 1.0}), {}, {}))
    assert warning.startswith("image_text decides alone what the trunk learns: it has 95%")
    # It needs another to push aside, and what it pulls counts, not how large it is.
    assert warnings_of(lines({"trunk_norm/image_text": 19.0}), {}, {}) == []
    alike = {"trunk_norm/image_text": 8.0, "trunk_norm/masked_image": 1.0, "image_text": 99.0, "masked_image": 0.1}
    assert warnings_of(lines(alike), {}, {}) == []
    assert warnings_of(lines({"trunk_norm/a": 0.0, "trunk_norm/b": 0.0}), {}, {}) == []


def test_steps_and_samples_that_were_skipped_are_counted() -> None:
    metrics = lines(
        {"non_finite_steps": 2, "non_finite": ["loss"]}, {}, {"non_finite_steps": 1, "non_finite": ["norm"]}
    )
    metrics += [{"step": 4, "loss": 1.0}]
    assert only(warnings_of(metrics, {}, {})).startswith(
        "3 steps were skipped, the last about step 3: loss, norm not finite"
    )
    warning = only(warnings_of([{"step": 1, "skipped": 2}, {"step": 1, "rankme/a": 9.0}, {"skipped": 3}], {}, {}))
    assert warning.startswith("5 samples could not be used")
    assert "data validate --decode" in warning


def test_the_table_has_the_change_beside_each_score() -> None:
    before: Results = {
        "linear/image": {"metrics": {"top1": {"value": 0.5, "interval": None}}, "baselines": {}},
        "retrieval/image_to_text": {"metrics": {"r1": {"value": 0.5125, "interval": None}}, "baselines": {}},
    }
    header, rule, *rows = results_table(RESULTS, before).splitlines()
    assert header.split()[-1] == "change"
    assert [row.split()[-1] for row in rows] == ["+25.0", "-1.2", "80.0"]  # nothing was known of r10
    assert {len(line) for line in (header, rule, *rows)} == {len(header)}
    assert header.startswith(table(RESULTS).splitlines()[0])


@pytest.mark.parametrize(
    "previous",
    [
        None,
        {},
        {"linear/text": {"metrics": {"top1": {"value": 0.5}}}},
        {"linear/image": {"metrics": {"r1": {"value": 0.5}}}},
    ],
)
def test_without_anything_to_compare_with_it_is_the_plain_table(previous: Results | None) -> None:
    assert results_table(RESULTS, previous) == table(RESULTS)


def test_previous_results_may_be_of_other_weights_only(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert previous_results(path, ABOUT) is None
    write_results(path, RESULTS, ABOUT)
    assert previous_results(path, {**ABOUT, "encoder": {"folder": "b", "sha256": "2"}}) == RESULTS
    assert previous_results(path, {**ABOUT, "splits": {"test": {"samples": 4}}}) is None
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 0'))
    assert previous_results(path, ABOUT) is None
    path.write_text("{")
    assert previous_results(path, ABOUT) is None
