"""Bad requests: what is said, where, and the exit code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Here = Callable[..., Any]


def error_of(result: Any) -> dict[str, str]:
    assert result.code == 2
    return json.loads(result.out)["error"]


def test_an_unknown_verb_names_the_closest(process: Here) -> None:
    result = process("scn")
    assert result.code == 2
    assert result.out == ""
    assert 'error: Unknown command "scn". Did you mean "scan"?' in result.err
    assert "hint: See `unpoison --help`." in result.err
    assert "Traceback" not in result.err


def test_errors_are_json_on_request(process: Here) -> None:
    result = process("methods", "--jsn", "--json")
    assert error_of(result)["type"] == "UsageError"
    assert "--jsn" in result.err


@pytest.mark.parametrize(
    ("words", "kind", "message", "hint"),
    [
        (("attack", "badnt", "shapes:60"), "UnknownMethodError", "no attack named 'badnt'", "Did you mean 'badnet'?"),
        (("attack", "blended", "shapes:60", "--param", "aplha=1"), "ConfigError", "'aplha'", "Did you mean 'alpha'?"),
        (("attack", "badnet", "shapes:60", "--param", "share"), "UsageError", "NAME=VALUE", "alpha=0.1"),
        (("attack", "badnet", "shapes:60", "--target", "strr"), "UnknownMethodError", "'strr'", "Did you mean 'star'?"),
        (("attack", "badnet", "shapes:60", "--target", "99"), "LabelRangeError", "99", "11"),
        (("attack", "badnet", "shapes:60", "--rate", "2"), "ConfigError", "rate must be in (0, 1]", "0.05"),
        (("attack", "badnet", "no/such/folder.parquet"), "SourceFormatError", "no such file or folder", "path"),
        (("evaluate", "no-model", "--data", "shapes:60"), "ModelError", "no-model", ""),
        (("keep", "nothing"), "ResultError", "split.parquet is not there", "unpoison scan dataset"),
        (("report", "nothing"), "ResultError", "nothing", ""),
        (("scan", "dataset", "shapes:60", "--config", "no.toml"), "ConfigError", "no.toml", "TOML"),
    ],
)
def test_what_was_asked_for_cannot_be_done(
    words: tuple[str, ...], kind: str, message: str, hint: str, here: Here, tmp_path: Path
) -> None:
    error = error_of(here(*words, "--json"))
    assert message in error["message"]
    assert hint in error["hint"]
    assert error["type"] == kind
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_a_config_key_that_does_not_exist(here: Here, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[separation]\nscorer_epoch = 1\n")
    error = error_of(here("scan", "dataset", "shapes:60", "--config", "config.toml", "--json"))
    assert error["type"] == "ConfigError"
    assert error["hint"] == "Did you mean 'scorer_epochs'?"


def test_a_folder_with_other_things_is_left_alone(here: Here, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    error = error_of(here("attack", "badnet", "shapes:60", "-o", "mine", "--json"))
    assert "not empty" in error["message"]
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"thesis.txt": "precious"}


def test_a_file_where_a_folder_must_be(here: Here, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    error = error_of(here("attack", "badnet", "shapes:60", "-o", "file/inside", "--json"))
    assert error["type"] == "UsageError"
    assert "cannot be written" in error["message"]


def test_tracebacks_only_when_verbose(here: Here) -> None:
    assert "Traceback" not in here("keep", "nothing").err
    assert "Traceback" in here("keep", "nothing", "-v").err


def test_control_characters_of_strangers_do_not_reach_the_terminal(here: Here) -> None:
    result = here("report", "evil\x1b[31m\u202e")
    assert result.code == 2
    assert "\x1b" not in result.err
    assert "\u202e" not in result.err
    assert "\\x1b[31m\\u202e" in result.err


def test_an_existing_file_is_refused(here: Here, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    result = here("report", ".", "-o", "report.html")
    assert result.code == 2
    assert "report.html exists" in result.err
    assert (tmp_path / "report.html").read_text() == "mine"
