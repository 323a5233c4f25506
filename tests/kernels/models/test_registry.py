"""Named weights: facts that cannot contradict one another."""

from importlib import resources
from urllib.parse import urlsplit

import pytest

from braincensus_kernels.models.checkpoints import load_weights
from braincensus_kernels.models.registry import COMPACT, REGISTRY, NamedWeights, Published


def test_every_entry_says_what_it_is_and_whose() -> None:
    assert set(REGISTRY) == {COMPACT, "cellseg3d-wnet3d", "cellseg3d-segresnet", "cellseg3d-swinunetr"}
    for name, entry in REGISTRY.items():
        assert entry.name == name
        assert "." not in name  # a name is never taken for a file
        assert all((entry.title, entry.expected_input, entry.licence, entry.citation, entry.architecture))


def test_bundled_weights_are_in_the_package_and_load() -> None:
    for entry in REGISTRY.values():
        if entry.bundled is not None:
            assert resources.files("braincensus_kernels.models").joinpath("weights", entry.bundled).is_file()
            assert load_weights(entry.name).source == entry.name


def test_published_weights_are_archives_over_https() -> None:
    published = [entry.published for entry in REGISTRY.values() if entry.published is not None]
    assert len(published) == 3
    for home in published:
        for url in home.urls:
            assert urlsplit(url).scheme == "https"
            assert url.endswith(".tar.gz")
        assert home.file.endswith(".pth")
        assert "/" not in home.file
        assert home.about_mb > 0


def test_a_published_name_is_no_file_of_the_package() -> None:
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_weights("cellseg3d-wnet3d")


def test_contradictions_are_refused() -> None:
    facts = {"title": "t", "architecture": "wnet3d", "expected_input": "i", "licence": "MIT", "citation": "c"}
    with pytest.raises(ValueError, match="either bundled or published"):
        NamedWeights(name="x", **facts)
    with pytest.raises(ValueError, match="only https"):
        NamedWeights(name="x", published=Published(("http://a/b.tar.gz",), "b.pth", 1, "h"), **facts)
