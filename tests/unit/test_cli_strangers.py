"""Who is named and not known is said, and named all the same."""

from types import SimpleNamespace

import pytest

from whaleflux.cli.strangers import note_strangers
from whaleflux.errors import NotFound, PermissionDenied, Unavailable
from whaleflux.v1 import identity_pb2 as pb
from whaleflux.v1 import trust_pb2


class Identity:
    """Knows ann and the group red; refuses with `error`."""

    def __init__(self, error=None):
        self.error, self.asked = error, []

    def GetUser(self, request, timeout):
        self.asked.append(request.name)
        if self.error:
            raise self.error
        if request.name != "users/ann":
            raise NotFound("user", request.name)

    def ListGroups(self, request, timeout):
        return pb.ListGroupsResponse(groups=[trust_pb2.Group(name="groups/red")])


def said(capsys, members, error=None):
    identity = Identity(error)
    note_strangers(SimpleNamespace(identity=identity), members)
    return capsys.readouterr().err, identity.asked


def test_who_is_known_is_not_spoken_of(capsys):
    assert said(capsys, ["users/ann", "groups/red"])[0] == ""
    assert said(capsys, []) == ("", [])


def test_who_is_not_known_is_named_once(capsys):
    text, asked = said(capsys, ["users/ann", "users/nobody", "groups/blue", "users/nobody"])
    assert "nobody is known here as users/nobody, groups/blue so far" in text and asked == ["users/ann", "users/nobody"]
    text, asked = said(capsys, [f"users/u{n}" for n in range(200)])
    assert "and 45 more" in text and len(asked) == 50


@pytest.mark.parametrize("error", [PermissionDenied("not yours"), Unavailable("away")])
def test_where_nobody_may_look_nothing_is_said(capsys, error):
    assert said(capsys, ["users/nobody"], error)[0] == ""
