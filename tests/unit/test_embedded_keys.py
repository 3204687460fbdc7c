"""The file of keys of a fleet on one machine: its loss is told, as all secrets are lost with it."""

from whaleflux.embedded.suite import Suite, SuiteOptions


def test_keys_that_are_gone_are_told_where_there_was_a_fleet_before(tmp_path):
    said = []
    made = Suite(SuiteOptions(state=tmp_path / "state"), said.append)
    Suite(SuiteOptions(state=tmp_path / "state"), said.append)
    assert said == [], "the first start, and one like any other"
    made.layout.secrets_key.unlink()
    Suite(SuiteOptions(state=tmp_path / "state"), said.append)
    assert len(said) == 1 and str(made.layout.secrets_key) in said[0]
    assert made.layout.secrets_key.exists()
