"""The rule that makes verdicts of intervals, on invented data, and the protocol it reads."""

import numpy as np
import pytest
import yaml

from diffecho_utils import DiffEchoError, assets, claims, files

ROW = {
    "says": "x",
    "row": "y",
    "unit": "points",
    "margin": 1.0,
    "visible": 0.5,
    "evidence": "direct",
}
CONTROLLED = ROW | {"control": "z"}
FIRED, SILENT, LOST = (3, 2, 4), (0.5, -1, 2), (np.nan,) * 3
RECORD = {key: "x" for key in ("hardware", "command", "commit", "world", "profile")}


@pytest.mark.parametrize(
    ("effect", "control", "said"),
    [
        ((2, 0.5, 3), None, "holds"),
        ((2, 1.5, 3), None, "holds"),
        ((2, 0, 3), None, "cannot tell"),  # zero is not left out
        ((0.5, 0.1, 0.9), None, "does not hold"),  # above zero, and too small to matter
        ((0.5, 0.1, 1.0), None, "holds"),  # the margin itself is not left out
        ((0, -0.9, 0.9), None, "does not hold"),
        ((0, -0.9, 1.0), None, "cannot tell"),
        ((-2, -3, -1), None, "the opposite"),
        ((-2, -3, 0), None, "does not hold"),
        ((1, np.nan, 2), None, "cannot tell"),
        ((1, 0.5, np.inf), None, "cannot tell"),
        (None, None, "not measured"),
    ],
)
def test_the_rule(effect, control, said):
    assert claims.verdict(ROW, effect, control) == said
    assert claims.verdict(CONTROLLED, effect, FIRED) == said
    needs_none = said in ("not measured", "cannot tell")
    assert claims.verdict(CONTROLLED, effect, None) == (said if needs_none else "cannot tell")


def test_a_silent_control_takes_away_does_not_hold_alone():
    for control in (SILENT, LOST, (1, 0, 2)):
        assert claims.verdict(CONTROLLED, (0, -0.9, 0.9), control) == "cannot tell"
        assert claims.verdict(CONTROLLED, (2, 0.5, 3), control) == "holds"
        assert claims.verdict(CONTROLLED, (-2, -3, -1), control) == "the opposite"


def found(*effect, date="2026-12-01", control=None):
    return claims.Found(effect, "n", RECORD | {"date": date}, control)


def test_a_table_of_all_verdicts_in_their_order():
    rows = dict.fromkeys("abc", ROW) | {
        "d": CONTROLLED,
        "e": {"evidence": "none", "says": "x", "row": "y"},
    }
    mine = {
        "a": found(0, -1.5, 1.5),
        "b": found(-2, -3, -1, date="2026-11-01"),
        "c": found(2, 1, 3),
    }
    lines = claims.judged(rows, mine | {"d": found(0, -0.5, 0.5)}, "2026-11-27")
    said = [line["verdict"] for line in lines.values()]
    assert said == ["cannot tell", "the opposite", "holds", "cannot tell", "not measured"]
    assert lines["d"]["why"] == "runs of the control not made yet" and lines["e"]["why"] == "y"
    assert [line.get("earlier") for line in lines.values()] == [False, True, False, False, None]
    shown = claims.table(lines).splitlines()
    assert [row.split("|")[1].strip()[0] for row in shown[2:]] == list("cbade")
    assert "−2.0 [−3.0, −1.0] points†" in shown[3] and shown[6].count("|") == 6


def test_many_verdicts_together():
    """Of sixteen that are only just beyond chance none stays; one that is far beyond does."""
    rows = {str(i): ROW | {"margin": 0.1} for i in range(16)}
    just = {part: found(1, 0.02, 1.98) for part in rows}
    assert not any(claims.together(claims.judged(rows, just)).values())
    stays = claims.together(
        claims.judged(rows, just | {"3": found(1, 0.8, 1.2), "4": found(-1, -1.2, -0.8)})
    )
    assert [part for part, stay in stays.items() if stay] == ["3", "4"]
    missing = claims.together({"a": claims.judged({"a": ROW}, {"a": found(0.1, -0.2, 0.4)})["a"]})
    assert missing == {"a": True}


def test_the_protocol_is_read_and_checked(tmp_path):
    written, rows = claims.read(assets.shipped("protocol.yaml"))
    assert written == "2026-11-27" and len(rows) == 16 and rows["1a"]["margin"] == 0.5
    path, good = (
        tmp_path / "protocol.yaml",
        yaml.safe_load(assets.shipped("protocol.yaml").read_text()),
    )
    for change, message in (
        ({"1a": None}, "row 1a"),
        ({"1a": good["claims"]["1a"] | {"margin": "half"}}, "margin 'half' found"),
        ({"1a": good["claims"]["1a"] | {"visible": float("nan")}}, "visible nan found"),
        ({"1a": good["claims"]["1a"] | {"evidence": "strong"}}, "evidence 'strong'"),
        ({"1a": {"says": "x", "row": "y", "evidence": "direct"}}, "margin, unit, visible"),
        ({"7": good["claims"]["1a"]}, "17 rows, 16 are needed"),
    ):
        files.write_text(path, yaml.safe_dump(good | {"claims": good["claims"] | change}))
        with pytest.raises(DiffEchoError, match=message):
            claims.read(path)
    files.write_text(path, "claims: [")
    with pytest.raises(DiffEchoError, match="restore it"):
        claims.read(path)


def test_nothing_is_invented_where_no_runs_are(tmp_path):
    rows = claims.read(assets.shipped("protocol.yaml"))[1]
    lines = claims.judged(rows, claims.evidence(tmp_path, claims.kept_runs(tmp_path)))
    assert {line["verdict"] for line in lines.values()} == {"not measured"}
    assert all(
        line["why"].startswith("runs not made yet") for part, line in lines.items() if part != "5c"
    )
    looks = claims.looks(tmp_path, claims.kept_runs(tmp_path))
    assert looks["value"].isna().all() and looks["look"].str.endswith("not made yet").all()


def test_failures_are_told_apart_in_order():
    shares = [[0.6, 0.9, 0.9], [0.2, 0.3, 0.9], [0, 0.2, 0.6], [0, 0, 0], [np.nan] * 3]
    assert claims.failures(shares).tolist() == ["a", "b", "c", "", ""]
