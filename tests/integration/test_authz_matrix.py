"""Every call of the contract and every HTTP path, for each kind of caller, through the real front door: as the tables say."""

from benchmarks import authz_matrix


async def test_every_call_answers_what_the_tables_of_roles_and_owners_say():
    report = await authz_matrix.run(fuzz_s=2.0, seed=1, rounds=1)
    assert report.notes == []
    calls = {row["caller"]: (row["calls"], row["let in"]) for row in report.rows if "calls" in row}
    assert all(
        row["longest_s"] < 15 for row in report.rows if "longest_s" in row
    )  # 1 s where nothing else runs: the benchmark
    assert sum(made for made, _ in calls.values()) > 4_000
    for outsider in ("disabled user", "revoked session", "another authority's admin", "fuzzer"):
        assert calls[outsider][1] == 0, outsider
    assert calls["operator"][1] > calls["owner"][1] > calls["stranger"][1] > calls["agent of another"][1]
