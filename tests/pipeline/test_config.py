"""The configuration: defaults in one place, YAML round trip, and errors that name the field."""

from __future__ import annotations

import pytest
import yaml

from braincensus.config import IntensityForeground, RunConfig, commented_yaml
from braincensus.errors import ConfigError


def test_the_printed_default_is_the_default():
    assert RunConfig.model_validate(yaml.safe_load(commented_yaml())) == RunConfig()


def test_every_field_is_explained():
    for line in commented_yaml().splitlines():
        if line.startswith("  ") and not line.strip().startswith("#"):
            assert line.split("  # ", 1)[1].strip(), line


def test_one_number_stands_for_three_axes_and_models_switch_whole():
    config = RunConfig().merged({"labelling": {"spot_sigma": 2}, "foreground": {"model": "intensity"}})
    assert config.labelling.spot_sigma == (2.0, 2.0, 2.0)
    assert config.foreground == IntensityForeground()
    assert RunConfig().labelling.spot_sigma == (0.65, 0.65, 0.65)


def test_a_yaml_file_changes_only_what_it_says(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("labelling: {outline_sigma: [1, 2, 2]}\ncompute: {workers: 3}\n")
    config = RunConfig.from_yaml(path)
    assert config.labelling.outline_sigma == (1.0, 2.0, 2.0)
    assert config.compute.workers == 3
    assert config.intensity == RunConfig().intensity


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"labelling": {"spot_sigam": 1}}, "spot_sigam"),
        ({"labelling": {"spot_sigma": -1}}, "spot_sigma"),
        ({"input": {"voxel_size_um": [5, 0, 5]}}, "voxel_size_um"),
        ({"foreground": {"model": "cellpose"}}, "foreground"),
        ({"foreground": {"model": "wnet3d", "halo_voxels": 12}}, "halo_voxels"),
        ({"labelling": {"threshold": 1.5}}, "threshold"),
        ({"compute": {"block_voxels": [64, 64]}}, "block_voxels"),
    ],
)
def test_a_wrong_field_is_named(changes, names):
    with pytest.raises(ConfigError, match=names):
        RunConfig().merged(changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "not a mapping"),
        ("a: [", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "not valid"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_yaml(path)


def test_a_missing_file_is_said():
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        RunConfig.from_yaml("nowhere.yaml")


@pytest.mark.parametrize(
    ("labelling", "message"),
    [
        ({"method": "watershed", "spot_sigma": 1}, "watershed.spot_sigma"),
        ({"method": "components", "max_radius_um": 5}, "components.max_radius_um"),
        ({"method": "watershed", "threshold": 0.9, "seed_threshold": 0.5}, "seeds are foreground"),
        ({"merge_border": (0.9, 0.1)}, "low before high"),
        ({"merge_border": (35, 100)}, "merge_border"),
        ({"method": "voronoi"}, "voronoi-otsu"),
        ({"closing_radius_um": -1}, "closing_radius_um"),
    ],
)
def test_labellers_refuse_what_they_do_not_have(labelling, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig().merged({"labelling": labelling})


def test_the_printed_alternatives_are_valid():
    """What stands behind `# or, ...` can be pasted: uncommented, it is that labeller's default."""
    text = commented_yaml()
    for method in ("components", "watershed"):
        start = text.index(f"# labelling:\n#   method: {method}")
        lines = text[start:].split("\n\n")[0].split("# or, ")[0].splitlines()
        loaded = yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines))
        assert RunConfig().merged(loaded).labelling.method == method
