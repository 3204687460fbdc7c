"""Who is believed to be whom, and who may call what."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux.clock import CLOCK_SKEW
from whaleflux.errors import PermissionDenied, StatusError, Unauthenticated
from whaleflux.rpc import roles
from whaleflux.rpc.auth import (
    CERTIFICATE_END,
    XFCC,
    Authority,
    Identity,
    acting_as,
    caller,
    forwarded_uri,
    peer_uri,
    require_own_node,
)

AGENT = "spiffe://whaleflux/agent/onprem/n1"
USER = "spiffe://whaleflux/user/ann"
FRONTDOOR = "spiffe://whaleflux/frontdoor/1"
TABLE = {
    "/t.T/*": roles.PEOPLE,
    "/t.T/Register": frozenset({roles.AGENT}),
    "/t.T/Join": roles.ANYONE,
    "/t.T/Access*": frozenset({roles.FRONTDOOR}),
}
NOW_S = 1_800_000_000
AUTHORITY = Authority(table=TABLE, now_s=lambda: NOW_S)


def shows(*uris):
    return {
        "peer_uri": [uri.encode() for uri in uris],
        "x509_subject_alternative_name": [b"spiffe://whaleflux/admin/x"],
    }


def check(method, *uris, headers=()):
    return AUTHORITY.check(method, shows(*uris), headers)


def ends_in(seconds):
    return CERTIFICATE_END, str(int(NOW_S + seconds))


class TestIdentity:
    @pytest.mark.parametrize("uri", [AGENT, USER, FRONTDOOR, "spiffe://corp.example/admin/a.b_c-D"])
    def test_text_and_back(self, uri):
        assert Identity.parse(uri).uri == uri

    @pytest.mark.parametrize(
        "uri",
        [
            "",
            "https://whaleflux/user/ann",
            "spiffe://whaleflux/user",
            "spiffe://whaleflux/user/",
            "spiffe://whaleflux/user/a/b",
            "spiffe://whaleflux/agent/onlyone",
            "spiffe://whaleflux/agent/a/b/c",
            "spiffe://whaleflux/agent/../n1",
            "spiffe://whaleflux/agent/a//b",
            "spiffe://whaleflux/root/x",
            "spiffe://whaleflux/anonymous/-",
            "spiffe://whaleflux/user/ann\n",
            "spiffe://whaleflux/user/ann;URI=x",
            "SPIFFE://whaleflux/user/ann",
        ],
    )
    def test_what_our_authority_would_not_write_is_refused(self, uri):
        with pytest.raises(Unauthenticated):
            Identity.parse(uri)

    def test_an_agents_own_node(self):
        assert Identity.parse(AGENT).node == "sites/onprem/nodes/n1"
        assert Identity.parse(USER).node == ""


class TestTable:
    def test_the_longest_match_decides(self):
        assert roles.allowed("/t.T/Get", TABLE) == roles.PEOPLE
        assert roles.allowed("/t.T/Register", TABLE) == {roles.AGENT}
        assert roles.allowed("/t.T/AccessLog", TABLE) == {roles.FRONTDOOR}
        assert roles.allowed("/t.Other/Get", TABLE) == frozenset()

    def test_a_listed_role_is_let_in(self):
        assert check("/t.T/Get", USER) == Identity("user", "ann")

    def test_another_role_is_denied_by_name(self):
        with pytest.raises(PermissionDenied, match="role 'agent' may not call") as caught:
            check("/t.T/Get", AGENT)
        assert caught.value.metadata["needs"] == "admin,operator,user"

    def test_a_method_that_is_not_in_the_table_is_denied_to_everybody(self):
        for role in sorted(roles.KNOWN - {roles.AGENT}):
            with pytest.raises(PermissionDenied, match="no role may"):
                check("/t.Other/Get", f"spiffe://whaleflux/{role}/x")

    def test_a_certificate_of_another_domain_is_not_ours(self):
        with pytest.raises(Unauthenticated, match="trust domain"):
            check("/t.T/Get", "spiffe://elsewhere/admin/x")

    @pytest.mark.parametrize("uris", [(), (USER, AGENT)])
    def test_a_certificate_has_exactly_one_uri(self, uris):
        with pytest.raises(Unauthenticated):
            peer_uri(shows(*uris))

    def test_the_shipped_table_names_only_roles_that_exist(self):
        for method, allowed in roles.TABLE.items():
            assert allowed <= roles.ANYONE, method
            assert method.startswith("/"), method


class TestFrontDoor:
    def test_it_speaks_for_the_client_whose_certificate_it_verified(self):
        header = f"By={FRONTDOOR};Hash=468ed33be74eee6556d90c0149c1309e9ba61d6425303443c0748a02dd8de688;URI={USER}"
        assert check("/t.T/Get", FRONTDOOR, headers=[(XFCC, header)]) == Identity("user", "ann")

    def test_nobody_else_can(self):
        header = "Hash=00;URI=spiffe://whaleflux/admin/root"
        assert check("/t.T/Get", USER, headers=[(XFCC, header)]).role == "user"
        with pytest.raises(PermissionDenied):
            check("/t.T/Get", AGENT, headers=[(XFCC, header)])

    def test_a_client_without_a_certificate_is_nobody(self):
        assert check("/t.T/Join", FRONTDOOR).role == roles.ANONYMOUS
        with pytest.raises(Unauthenticated, match="whaleflux login"):
            check("/t.T/Get", FRONTDOOR)

    def test_its_own_calls_are_its_own(self):
        assert check("/t.T/AccessLog", FRONTDOOR).role == roles.FRONTDOOR

    def test_a_connection_that_outlives_its_certificate_is_nobodys(self):
        """Else whoever keeps one open is admitted again once the revocation of its certificates is forgotten."""
        for left_s in (3600, 0, -CLOCK_SKEW.total_seconds() + 60):
            assert check("/t.T/Get", FRONTDOOR, headers=[(XFCC, f"URI={USER}"), ends_in(left_s)]).name == "ann"
        with pytest.raises(Unauthenticated, match="has ended"):
            check("/t.T/Get", FRONTDOOR, headers=[(XFCC, f"URI={USER}"), ends_in(-CLOCK_SKEW.total_seconds() - 60)])
        assert check("/t.T/Join", FRONTDOOR, headers=[(CERTIFICATE_END, "-")]).role == roles.ANONYMOUS

    def test_a_client_behind_it_cannot_make_them(self):
        with pytest.raises(PermissionDenied):
            check("/t.T/AccessLog", FRONTDOOR, headers=[(XFCC, f"Hash=1;URI={USER}")])
        with pytest.raises(PermissionDenied):
            check("/t.T/AccessLog", USER)

    def test_a_header_without_a_uri_is_a_client_without_our_certificate(self):
        assert check("/t.T/Join", FRONTDOOR, headers=[(XFCC, "Hash=1;DNS=x")]).role == roles.ANONYMOUS

    @pytest.mark.parametrize(
        "headers",
        [
            [(XFCC, f"URI={USER}"), (XFCC, f"URI={USER}")],
            [(XFCC, f"URI=spiffe://whaleflux/admin/x,URI={USER}")],
            [(XFCC, f"URI=spiffe://whaleflux/admin/x;URI={USER}")],
            [(XFCC, "URI=https://elsewhere")],
            [(XFCC, "URI=spiffe://elsewhere/admin/x")],
            [(XFCC, b"URI=" + USER.encode())],
            [(XFCC, "Hash=" + "0" * 10_000 + f";URI={USER}")],
        ],
        ids=["two headers", "two certificates", "two names", "no spiffe", "other domain", "binary", "long"],
    )
    def test_an_ambiguous_or_foreign_header_is_refused(self, headers):
        with pytest.raises(Unauthenticated):
            check("/t.T/Join", FRONTDOOR, headers=headers)


class TestHeader:
    def test_separators_inside_quotes_do_not_separate(self):
        header = f'Hash=1;Subject="CN=a,O=\\"b;URI=spiffe://whaleflux/admin/x\\"";URI="{USER}"'
        assert forwarded_uri(header) == USER

    @given(st.text(max_size=300))
    def test_any_text_gives_a_uri_or_a_status_error(self, header):
        try:
            assert isinstance(forwarded_uri(header), str)
        except StatusError as error:
            assert isinstance(error, Unauthenticated)


class TestCaller:
    def test_an_agent_touches_only_its_own_node(self):
        with acting_as(Identity.parse(AGENT)):
            require_own_node("sites/onprem/nodes/n1")
            for other in ("sites/onprem/nodes/n2", "sites/cloud/nodes/n1", "", "sites/onprem/nodes/n1/"):
                with pytest.raises(PermissionDenied) as caught:
                    require_own_node(other)
                assert caught.value.reason == "NOT_OWN_NODE"

    def test_other_roles_are_not_confined(self):
        with acting_as(Identity.parse(USER)):
            require_own_node("sites/onprem/nodes/n2")

    def test_there_is_no_caller_outside_of_a_call(self):
        with pytest.raises(Unauthenticated):
            caller()
        with acting_as(Identity.parse(USER)):
            assert caller().name == "ann"
        with pytest.raises(Unauthenticated):
            require_own_node("sites/onprem/nodes/n1")
