"""Settings: who wins, what is refused, and what is shown."""

import pytest
import yaml
from pydantic import Field, SecretStr

from whaleflux.config import ServiceSettings, load, shown, usage
from whaleflux.errors import InvalidArgument
from whaleflux_agent import settings as agent
from whaleflux_agent.settings import Settings as Agent


class Settings(ServiceSettings):
    """The toy service."""

    plan_every_s: float = Field(0.5, gt=0, description="Longest pause between two plans, seconds.")
    preempt: bool = Field(True, description="Whether running jobs may be preempted.")
    tags: tuple[str, ...] = Field((), description="Anything.")
    labels: dict[str, str] = Field({}, description="Anything, named.")
    secret: SecretStr = Field(SecretStr(""), description="Not to be shown.")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No variable of the machine counts."""
    import os

    for name in list(os.environ):
        if name.startswith(("WHALEFLUX_", "OTEL_")):
            monkeypatch.delenv(name)
    return monkeypatch


def refused(*argv):
    with pytest.raises(InvalidArgument) as caught:
        load(Settings, argv)
    return {violation.field: violation.description for violation in caught.value.violations}


@pytest.mark.parametrize("price", ["nan", "inf", "10001"])
def test_a_price_that_is_no_price_is_refused_at_the_start(price):
    """NaN would make every GPU of the node free."""
    with pytest.raises(InvalidArgument, match="usd_per_gpu_hour"):
        load(agent.Settings, ["--usd-per-gpu-hour", price])


class TestSources:
    def test_defaults(self):
        settings = load(Settings, [])
        assert (settings.listen, settings.plan_every_s, settings.preempt) == ("127.0.0.1:0", 0.5, True)

    def test_flags_beat_variables_beat_the_file_beats_defaults(self, environment, tmp_path):
        path = tmp_path / "s.yaml"
        path.write_text("plan_every_s: 1\nlog_level: warning\nname: from-file\ntags: [a, b]\n")
        environment.setenv("WHALEFLUX_CONFIG", str(path))
        environment.setenv("WHALEFLUX_PLAN_EVERY_S", "2")
        environment.setenv("WHALEFLUX_LOG_LEVEL", "debug")
        settings = load(Settings, ["--plan-every-s", "3"])
        assert (settings.plan_every_s, settings.log_level, settings.name) == (3.0, "debug", "from-file")
        assert settings.tags == ("a", "b")

    def test_toml_and_config_flag(self, environment, tmp_path):
        path = tmp_path / "s.toml"
        path.write_text('plan_every_s = 4\ntags = ["x"]\n')
        environment.setenv("WHALEFLUX_CONFIG", "/nowhere.yaml")
        assert load(Settings, [f"--config={path}"]).plan_every_s == 4

    @pytest.mark.parametrize(
        ("argv", "expected"), [(["--no-preempt"], False), (["--preempt"], True), (["--preempt=false"], False)]
    )
    def test_switches(self, argv, expected):
        assert load(Settings, argv).preempt is expected

    def test_values_that_look_like_flags_are_given_with_an_equals_sign(self):
        assert load(Settings, ["--name=--x"]).name == "--x"

    def test_the_standard_otlp_variable_counts_when_ours_is_not_set(self, environment):
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://otel:4317")
        assert load(Settings, []).otlp_endpoint == "http://otel:4317"
        assert load(Settings, ["--otlp-endpoint", "http://mine:4317"]).otlp_endpoint == "http://mine:4317"

    def test_an_empty_variable_is_not_set(self, environment):
        environment.setenv("WHALEFLUX_PLAN_EVERY_S", "")
        assert load(Settings, []).plan_every_s == 0.5

    def test_of_objects_the_keys_are_put_together(self, environment, tmp_path):
        path = tmp_path / "s.yaml"
        path.write_text("labels: {rack: r1, row: a}\n")
        environment.setenv("WHALEFLUX_LABELS", '{"rack": "r2", "room": "x"}')
        settings = load(Settings, ["--config", str(path), "--labels", '{"room": "y"}'])
        assert settings.labels == {"rack": "r2", "row": "a", "room": "y"}

    def test_a_password_may_look_like_a_list(self, environment):
        environment.setenv("WHALEFLUX_NATS_PASSWORD", "[secret")
        settings = load(Settings, ["--secret", "{secret"])
        assert (settings.nats_password.get_secret_value(), settings.secret.get_secret_value()) == ("[secret", "{secret")

    def test_two_loads_do_not_share_a_file(self, tmp_path):
        path = tmp_path / "s.yaml"
        path.write_text("name: other\n")
        assert load(Settings, ["--config", str(path)]).name == "other"
        assert load(Settings, []).name == "1"


class TestStatusErrors:
    def test_an_unknown_flag_names_the_nearest(self):
        assert "did you mean --listen" in refused("--listn", "x")["--listn"]

    def test_its_value_is_not_a_second_mistake_and_every_mistake_is_told(self):
        found = refused("--listn", "x", "--plan-evry-s=3", "stray")
        assert set(found) == {"--listn", "--plan-evry-s", "stray"}

    def test_a_flag_without_its_value(self):
        assert refused("--listen") == {"--listen": "needs a value"}

    def test_an_unknown_key_of_the_file_names_the_nearest(self, tmp_path):
        path = tmp_path / "s.yaml"
        path.write_text("plan_every: 1\n")
        assert "did you mean plan_every_s" in refused("--config", str(path))["plan_every"]

    @pytest.mark.parametrize("text", ["a: [", "- just\n- a list\n", "word"])
    def test_a_file_that_is_no_mapping(self, tmp_path, text):
        path = tmp_path / "s.yaml"
        path.write_text(text)
        assert "config" in refused("--config", str(path))

    def test_a_missing_file_is_named(self):
        assert "cannot read /nowhere.yaml" in refused("--config", "/nowhere.yaml")["config"]

    def test_bad_values_name_their_field_and_limit(self):
        found = refused("--plan-every-s", "0", "--log-level", "loud", "--drain-grace-s", "soon")
        assert "greater than 0" in found["plan_every_s"]
        assert "'debug', 'info'" in found["log_level"]
        assert "valid number" in found["drain_grace_s"]

    def test_a_variable_that_is_no_json_is_named(self, environment):
        environment.setenv("WHALEFLUX_TAGS", "[a, b")
        assert "is not JSON" in refused()["WHALEFLUX_TAGS"]

    @pytest.mark.parametrize("text", ['[{"a": 1, "a": 2}]', "[" * 100_000])
    def test_a_variable_with_a_key_twice_or_without_bottom_is_refused(self, environment, text):
        environment.setenv("WHALEFLUX_TAGS", text)
        assert "is not JSON" in refused()["WHALEFLUX_TAGS"]

    def test_a_misspelt_variable_is_pointed_out(self, environment, capsys):
        environment.setenv("WHALEFLUX_PLAN_EVRY_S", "9")
        environment.setenv("WHALEFLUX_CONTEXT", "someone else's")
        assert load(Settings, []).plan_every_s == 0.5
        assert capsys.readouterr().err == (
            "ignored: WHALEFLUX_PLAN_EVRY_S is not a known variable; did you mean WHALEFLUX_PLAN_EVERY_S?\n"
        )


class TestShown:
    def test_print_config_prints_what_counts_and_exits(self, environment, capsys):
        environment.setenv("WHALEFLUX_SECRET", "hunter2")
        with pytest.raises(SystemExit) as caught:
            load(Settings, ["--print-config", "--store", "http://root:hunter2@etcd:2379,http://b:2379"])
        out = capsys.readouterr().out
        printed = yaml.safe_load(out)
        assert caught.value.code == 0
        assert "hunter2" not in out
        assert (printed["secret"], printed["nats_password"]) == ("***", "")
        assert printed["store"] == "http://root:***@etcd:2379,http://b:2379"

    def test_what_is_printed_is_a_file_that_gives_the_same_settings(self, tmp_path):
        first = load(Settings, ["--plan-every-s", "7", "--port-file", "/run/p.json", "--tags", '["a"]'])
        path = tmp_path / "s.yaml"
        path.write_text(shown(first))
        assert load(Settings, ["--config", str(path)]).model_dump() == first.model_dump()

    def test_help_lists_every_flag_with_its_variable(self, capsys):
        with pytest.raises(SystemExit):
            load(Settings, ["--help"])
        out = capsys.readouterr().out
        for name in Settings.model_fields:
            assert f"--{name.replace('_', '-')}  (WHALEFLUX_{name.upper()})" in out

    def test_secrets_do_not_reach_a_repr(self, environment):
        environment.setenv("WHALEFLUX_SECRET", "hunter2")
        assert "hunter2" not in repr(load(Settings, []))


class TestGroupedHelp:
    def test_an_agents_help_shows_what_is_its_own_in_groups_and_nothing_of_services(self):
        shown = usage(Agent)
        assert "Joining:" in shown
        assert "WHALEFLUX_JOIN_TOKEN=... whaleflux agent" in shown
        assert "--nats" not in shown
        assert "--store" not in shown
        own = set(Agent.model_fields) - set(ServiceSettings.model_fields)
        assert all(f"--{name.replace('_', '-')} " in shown for name in own)

    def test_everything_is_shown_to_who_asks_for_it(self):
        shown = usage(Agent, everything=True)
        assert all(f"--{name.replace('_', '-')} " in shown for name in Agent.model_fields)
