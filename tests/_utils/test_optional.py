"""Advice on installing optional packages."""

import json
from importlib import metadata

import pytest

from fastentropy._utils import optional
from fastentropy._utils.optional import install_command, require


class Distribution:
    """An installed distribution that pip was given the address `origin` for."""

    def __init__(self, origin):
        self.origin = origin

    def read_text(self, name):
        assert name == "direct_url.json"
        return self.origin and json.dumps(self.origin)


@pytest.mark.parametrize("here", [True, False])
def test_a_clone_is_installed_again_with_the_extra(here, tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(optional, "_ROOT", tmp_path)
    if here:
        monkeypatch.chdir(tmp_path)
    assert install_command("onnx") == f'pip install -e "{"." if here else tmp_path}[onnx]"'


@pytest.mark.parametrize(
    ("origin", "address"),
    [
        (None, ""),
        ({"url": "file:///w/fastentropy.whl", "archive_info": {}}, " @ file:///w/fastentropy.whl"),
        (
            {"url": "https://host/fastentropy", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            " @ git+https://host/fastentropy@abc",
        ),
    ],
)
def test_an_installed_package_is_installed_again_from_its_origin(origin, address, tmp_path, monkeypatch):
    monkeypatch.setattr(optional, "_ROOT", tmp_path)
    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution(origin))
    assert install_command("cli") == f'pip install "fastentropy[cli]{address}"'


def test_without_metadata_only_the_name_is_known(tmp_path, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(optional, "_ROOT", tmp_path)
    monkeypatch.setattr(metadata, "distribution", missing)
    assert install_command("cli") == 'pip install "fastentropy[cli]"'


def test_a_missing_package_is_named_with_its_installation():
    assert require("json", "reading it") is json
    with pytest.raises(ValueError, match=r"^reading it needs no_such_package: ") as error:
        require("no_such_package.part", "reading it")
    assert str(error.value).endswith(install_command("calibrate"))
