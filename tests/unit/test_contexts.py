"""Which fleet commands reach: by name, from any folder, and never another one than people chose."""

import json

import pytest

from whaleflux.context import find
from whaleflux.contexts import Contexts, config_folder
from whaleflux.errors import InvalidArgument


@pytest.fixture
def contexts(tmp_path):
    return Contexts(tmp_path / "config" / "whaleflux")


def suite(folder):
    """The state folder of a suite of this machine."""
    folder.mkdir(parents=True)
    (folder / "ports.json").write_text("{}")
    (folder / "context.json").write_text(json.dumps({"server": "127.0.0.1:1", "ca": "a", "cert": "b", "key": "c"}))
    return folder / "context.json"


def production(folder):
    folder.mkdir(parents=True)
    (folder / "context.json").write_text(json.dumps({"server": "prod:7443", "ca": "a", "cert": "b", "key": "c"}))
    return folder / "context.json"


def variables(contexts, **more):
    return {"XDG_CONFIG_HOME": str(contexts.folder.parent), **more}


def found(contexts, tmp_path, named="", **more):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    return find(named, environ=variables(contexts, **more), start=elsewhere)


def test_a_suite_is_found_from_any_folder(contexts, tmp_path):
    file = suite(tmp_path / "a")
    assert contexts.register(file, "a").still_in_use == ""
    assert found(contexts, tmp_path).resolve() == file


def test_the_last_suite_of_this_machine_is_in_use(contexts, tmp_path):
    one, other = suite(tmp_path / "x" / "a"), suite(tmp_path / "y" / "a")
    assert contexts.register(one, "a").name == "a"
    assert contexts.register(other, "a").name == "a-2"
    assert contexts.register(one, "a").name == "a"
    assert contexts.current() == "a"
    assert contexts.names() == ["a", "a-2"]


def test_a_fleet_that_people_named_stays_in_use(contexts, tmp_path):
    contexts.link("prod", production(tmp_path / "prod"))
    contexts.use("prod")
    known = contexts.register(suite(tmp_path / "a"), "a")
    assert known.still_in_use == "prod"
    assert found(contexts, tmp_path).resolve() == tmp_path / "prod" / "context.json"
    assert found(contexts, tmp_path, "a").resolve() == tmp_path / "a" / "context.json"
    assert found(contexts, tmp_path, WHALEFLUX_CONTEXT="a").resolve() == tmp_path / "a" / "context.json"


def test_a_file_that_people_wrote_stays_in_use(contexts, tmp_path):
    contexts.folder.mkdir(parents=True)
    contexts.own_file.write_text("{}")
    assert contexts.register(suite(tmp_path / "a"), "a").still_in_use == str(contexts.own_file)
    assert found(contexts, tmp_path) == contexts.own_file
    contexts.use("a")
    assert found(contexts, tmp_path).resolve() == tmp_path / "a" / "context.json"


def test_a_name_is_never_taken_from_another_fleet(contexts, tmp_path):
    contexts.link("prod", production(tmp_path / "prod"))
    with pytest.raises(InvalidArgument, match="config remove prod"):
        contexts.link("prod", suite(tmp_path / "a"))
    assert contexts.register(tmp_path / "a" / "context.json", "prod").name == "prod-2"


def test_the_nearest_state_folder_goes_first(contexts, tmp_path):
    contexts.register(suite(tmp_path / "a"), "a")
    near = suite(tmp_path / "project" / ".whaleflux")
    below = tmp_path / "project" / "src"
    below.mkdir()
    assert find(environ=variables(contexts), start=below) == near


def test_a_fleet_that_is_gone_is_said_to_be(contexts, tmp_path):
    file = suite(tmp_path / "a")
    contexts.register(file, "a")
    file.unlink()
    with pytest.raises(InvalidArgument, match=r"'a', is not running or was removed.*config use"):
        found(contexts, tmp_path)
    assert contexts.register(suite(tmp_path / "b"), "b").still_in_use == ""


def test_an_unknown_name_is_told_with_those_that_are_known(contexts, tmp_path):
    contexts.link("prod", production(tmp_path / "prod"))
    with pytest.raises(InvalidArgument, match=r"'prdo' is not known here; known: prod"):
        found(contexts, tmp_path, "prdo")


def test_removing_the_one_in_use_leaves_none_in_use(contexts, tmp_path):
    contexts.register(suite(tmp_path / "a"), "a")
    contexts.remove("a")
    assert contexts.current() == ""
    with pytest.raises(InvalidArgument, match="whaleflux up"):
        found(contexts, tmp_path)
    assert (tmp_path / "a" / "context.json").exists()


@pytest.mark.parametrize("name", ["", "../x", "A", "-x", "a/b", "x" * 64])
def test_what_is_no_name_is_refused(contexts, name):
    with pytest.raises(InvalidArgument, match="is no name"):
        contexts.file(name)


@pytest.mark.parametrize(
    ("environment", "folder"),
    [({"XDG_CONFIG_HOME": "/x"}, "/x/whaleflux"), ({"HOME": "/h"}, "/h/.config/whaleflux"),
     ({"XDG_CONFIG_HOME": "relative", "HOME": "/h"}, "/h/.config/whaleflux"), ({}, "None")],
)  # fmt: skip
def test_where_names_are_kept(environment, folder):
    assert str(config_folder(environment)) == folder
