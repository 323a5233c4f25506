"""Training from the command line: each value of the recipe is an option, and what a stop looks like."""

from __future__ import annotations

import inspect
import signal
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import braincensus.training
from braincensus.cli import app
from braincensus.cli.train import _FIELDS, _changes, train
from braincensus.training import Recipe, TrainingInterruptedError

OPTIONS = {**_FIELDS, "channels": "channels", "variation": "variation"}


def test_every_value_of_the_recipe_is_an_option() -> None:
    assert sorted(OPTIONS.values()) == sorted(field.name for field in fields(Recipe))
    assert set(OPTIONS) <= set(inspect.signature(train).parameters)


def test_the_defaults_shown_are_those_of_the_recipe() -> None:
    hints = typing.get_type_hints(train, include_extras=True)
    recipe = Recipe().to_dict() | {"channels": "16,32,64,128", "variation": "vary"}
    for name, field in OPTIONS.items():
        (option,) = hints[name].__metadata__
        value = recipe[field]
        if value is None:  # depends on the volumes
            continue
        shown = option.show_default
        assert isinstance(shown, str), name
        assert (float(shown) if isinstance(value, int | float) else shown) == value, name


def test_what_is_given_changes_the_recipe() -> None:
    given: dict[str, Any] = dict.fromkeys(inspect.signature(train).parameters)
    given |= {"epochs": 3, "classes": 4, "channels": "4,4,4,8", "input_range": "crop", "variation": False}
    recipe = Recipe.published().changed(**_changes(given))
    assert (recipe.epochs, recipe.steps, recipe.num_classes) == (3, None, 4)
    assert (recipe.channels, recipe.input_range, recipe.variation) == ((4, 4, 4, 8), "crop", None)
    assert recipe.learning_rate == 2e-5
    assert Recipe.published().changed(**_changes(given | {"variation": True})).variation == Recipe().variation


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    asked: dict[str, Any] = {}

    def stopped(inputs: list[str], out: Path, **options: Any) -> None:
        asked.update(options)
        raise TrainingInterruptedError("stopped after step 3 of 9\n  remedy: --resume", number)

    monkeypatch.setattr(braincensus.training, "train_from_paths", stopped)
    arguments = ["train", "x.npy", "--out", str(tmp_path / "w.safetensors"), "--published", "--steps", "9"]
    result = CliRunner().invoke(app, [*arguments, "--resume", "--picture-every", "0.5"])
    assert result.exit_code == 128 + number
    assert "--resume" in result.output
    assert (asked["resume"], asked["picture_every"], asked["overwrite"]) == (True, 0.5, False)
    assert (asked["recipe"].steps, asked["recipe"].channels) == (9, (64, 128, 256, 512))


def test_options_that_contradict_each_other() -> None:
    arguments = ["train", "x.npy", "--out", "w.safetensors", "--steps", "3", "--epochs", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "3 steps, 2 epochs" in result.output
