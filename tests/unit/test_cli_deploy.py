"""`whaleflux deploy` and `rollout`: what is asked of the fleet, what is shown before anybody is asked, and what is refused here."""

import contextlib
import json

import pytest
from typer.testing import CliRunner

from whaleflux.cli import deploy_commands, describe_commands
from whaleflux.cli.__main__ import app, main
from whaleflux.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from whaleflux.v1 import router_pb2 as pb

RUN = CliRunner()
FILE = """\
model: m
weights: {weights}
engine: {{run: "serve {{weights}} --port {{port}}"}}
sites: {{onprem: 2, edge: {{replicas: 1, on: [RTX4090]}}}}
"""


class Fleet:
    """A router and an inventory that keep what they were asked."""

    def __init__(self):
        self.router = self.inventory = self.events = self
        self.asked, self.datasets, self.model = [], {}, None

    def GetModel(self, request, timeout):
        if self.model is None:
            raise NotFound("model", request.name)
        return self.model

    def EstimateDeployment(self, request, timeout):
        self.asked.append(request)
        answer = pb.EstimateDeploymentResponse()
        for site in request.model.sites or self.model.sites:
            answer.sites.add(site=site.site, replicas=site.replicas, why="1 GB at 5 MB/s from /mnt, then engine 12 s")
        answer.sites[0].ready_in.FromSeconds(212)
        return answer

    def CreateModel(self, request, timeout):
        self.asked.append(pb.CreateModelRequest.FromString(request.SerializeToString()))

    def ListReplicas(self, request, timeout):
        return pb.ListReplicasResponse()

    def ListEvents(self, request, timeout):
        raise Unavailable("no events are kept")

    def UpdateModel(self, request, timeout):
        self.asked.append(request)

    def RollBackModel(self, request, timeout):
        self.asked.append(request)
        if not self.model.rollout.state:
            raise FailedPrecondition("models/m has no engine of before to go back to")
        self.model.rollout.message = "v2 was rolled back by user/ann"
        return self.model

    def GetDataset(self, request, timeout):
        if request.name not in self.datasets:
            raise NotFound("dataset", request.name)

    def CreateDataset(self, request, timeout):
        self.datasets[f"datasets/{request.dataset_id}"] = request


@pytest.fixture
def fleet(monkeypatch):
    found = Fleet()
    monkeypatch.setattr(deploy_commands, "fleet", lambda: contextlib.nullcontext(found))
    return found


@pytest.fixture
def file(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "a").write_bytes(b"weights")
    path = tmp_path / "model.yaml"
    path.write_text(FILE.format(weights="w"))
    return path


def created(fleet):
    return [one.model for one in fleet.asked if isinstance(one, pb.CreateModelRequest) and not one.validate_only]


def test_a_folder_of_weights_becomes_a_dataset_with_what_it_consists_of(fleet, file):
    done = RUN.invoke(app, ["deploy", "-y", str(file)])
    assert done.exit_code == 0, done.output
    ((name, request),) = fleet.datasets.items()
    assert (request.dataset.uri, request.dataset.size_bytes) == (str(file.parent / "w"), 7)
    assert [one.path for one in request.manifest.files] == ["a"]
    (model,) = created(fleet)
    assert (model.engine.weights, name.startswith("datasets/m-")) == (name, True)
    assert "212 s" in done.output
    assert "not known" in done.output
    assert RUN.invoke(app, ["deploy", "-y", str(file)]).exit_code == 0
    assert len(fleet.datasets) == 1, "the same folder is the same dataset"


def test_sites_of_the_file_can_be_left_out_with_what_it_says_of_them(fleet, file):
    assert RUN.invoke(app, ["deploy", "-y", str(file), "--sites", "edge"]).exit_code == 0
    (model,) = created(fleet)
    assert [(one.site, one.replicas, list(one.gpu_models)) for one in model.sites] == [("sites/edge", 1, ["RTX4090"])]


def test_who_says_no_has_declared_nothing(fleet, file):
    done = RUN.invoke(app, ["deploy", str(file)], input="n\n")
    assert done.exit_code != 0
    assert not fleet.datasets
    assert not created(fleet)


def away(*_, **__):
    raise Unavailable("the router is away")


def sized(estimate):
    """Two sizes that serve, and one that does not."""
    one = estimate.sizes.add(
        gpu_type="RTX4090",
        gpus=1,
        site="sites/edge",
        at_once=12,
        first_token_s=0.25,
        per_token_s=0.021,
        starts_now=True,
    )
    one.usd_per_hour, one.price_source, one.context_tokens, one.words = (
        0.5,
        "inventory",
        43_936,
        "memory for keys and values",
    )
    estimate.sizes.add(gpu_type="H200", gpus=1, site="sites/onprem", at_once=400, words="the objective")
    estimate.sizes.add(
        gpu_type="L4",
        gpus=1,
        site="sites/edge",
        lack="SERVING_LACK_TOKEN",
        words="a token takes 80 ms alone, 30 are wanted",
    )


def test_the_gpus_that_are_picked_are_shown_with_what_else_serves_and_why_others_do_not(fleet, file, monkeypatch):
    answer = pb.EstimateDeploymentResponse(sites=[pb.SiteEstimate(replicas=1)])
    sized(answer.sites[0])
    monkeypatch.setattr(fleet, "EstimateDeployment", lambda request, timeout: answer)
    file.write_text(
        "model: m\nshape: llama-3.1-8b\nslo: {per_token: 30 ms}\nengine: {run: 'serve --tp {gpus} --port {port}'}\n"
    )
    done = RUN.invoke(app, ["deploy", str(file), "--dry-run"])
    assert done.exit_code == 0, done.output
    lines = {line.split()[1]: line for line in done.output.splitlines() if " x " in line}
    assert "1 x RTX4090" in lines["next"]
    assert "43,936" in lines["next"]
    assert "0.50" in lines["next"]
    assert "none are free now" in lines["or"]
    assert "not known" in lines["or"]
    assert "a token takes 80 ms alone" in lines["not"]
    said = json.loads(RUN.invoke(app, ["deploy", str(file), "--dry-run", "-o", "json"]).output)
    assert [one["gpu_type"] for one in said["sites"][0]["sizes"]] == ["RTX4090", "H200", "L4"]
    fleet.model = pb.Model(name="models/m")
    assert "1 x RTX4090" in RUN.invoke(app, ["rollout", "status", "m"]).output


def test_a_description_says_which_gpus_the_next_replica_gets(fleet, monkeypatch):
    answer = pb.EstimateDeploymentResponse(sites=[pb.SiteEstimate(replicas=1)])
    sized(answer.sites[0])
    monkeypatch.setattr(fleet, "EstimateDeployment", lambda request, timeout: answer)
    monkeypatch.setattr(describe_commands, "fleet", lambda: contextlib.nullcontext(fleet))
    fleet.model = pb.Model(name="models/m", engine=pb.Engine(kind="vllm", shape="llama-3.1-8b", command=["serve"]))
    lines = RUN.invoke(app, ["describe", "model", "m"]).output.splitlines()
    said = [line for line in lines if " x " in line]
    assert "next 1 x RTX4090 at edge: 0.50 USD/h, the first token after 250 ms" in said[0]
    assert "or 1 x H200 at onprem: not known USD/h" in said[1]
    assert "not 1 x L4 at edge: a token takes 80 ms alone" in said[2]
    told = json.loads(RUN.invoke(app, ["describe", "model", "m", "-o", "json"]).output)
    assert [one["gpu_type"] for one in told["sizes"]] == ["RTX4090", "H200", "L4"]
    answer.sites[0].Clear()
    answer.sites[0].problem = "no GPUs take work there now"
    assert "none: no GPUs take work there now" in RUN.invoke(app, ["describe", "model", "m"]).output
    monkeypatch.setattr(fleet, "EstimateDeployment", away)
    assert "not known now: the router is away" in RUN.invoke(app, ["describe", "model", "m"]).output


def test_a_file_that_leaves_its_gpus_open_says_where_the_engine_is_told(fleet, file):
    file.write_text("model: m\nshape: llama-3.1-8b\nengine: {run: 'serve --port {port}'}\n")
    done = RUN.invoke(app, ["deploy", str(file), "--dry-run"])
    assert done.exit_code != 0
    assert "--tensor-parallel-size {gpus}" in done.output + str(done.exception)


def test_a_secret_in_clear_at_a_site_is_noticed(fleet, file):
    file.write_text(FILE.format(weights="w").replace("on: [RTX4090]", "environment: {HF_TOKEN: hf_abc}"))
    done = RUN.invoke(app, ["deploy", "-y", str(file)])
    assert "HF_TOKEN" in done.output


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("onprem: 2", "onprem: 0", "sites.onprem: must be a whole number, 1 to 1000"),
        ("on: [RTX4090]", "environment: {A B: 1}", "sites[1].environment"),
        ("model: m\n", "", "model: is missing"),
    ],
)
def test_mistakes_of_the_file_are_called_as_in_the_file(fleet, file, monkeypatch, capsys, before, after, words):
    file.write_text(FILE.format(weights="w").replace(before, after))
    monkeypatch.setattr("sys.argv", ["whaleflux", "deploy", "-y", str(file)])
    with pytest.raises(SystemExit):
        main()
    told = capsys.readouterr().err
    assert words in told
    assert "explain-field --model" in told
    assert not fleet.datasets


def test_a_folder_that_is_not_there_is_no_dataset(fleet, file):
    file.write_text(FILE.format(weights="llama"))
    done = RUN.invoke(app, ["deploy", "-y", str(file)])
    assert isinstance(done.exception, InvalidArgument)
    assert "a dataset is written dataset:NAME" in str(done.exception)
    assert not fleet.datasets


@pytest.mark.parametrize(
    ("sites", "words"),
    [("moon", "the file only onprem, edge"), (",", "names no site"), ("edge,edge", "twice"), ("BAD!", "is not an id")],
)
def test_sites_that_are_none_of_the_file_are_refused_here(fleet, file, sites, words):
    done = RUN.invoke(app, ["deploy", "-y", str(file), "--sites", sites])
    assert isinstance(done.exception, InvalidArgument)
    assert words in str(done.exception)
    assert not fleet.asked
    assert not fleet.datasets


def test_a_dry_run_changes_nothing_and_programs_get_its_sites(fleet, file):
    done = RUN.invoke(app, ["deploy", str(file), "--dry-run", "-o", "json"])
    assert done.exit_code == 0, done.output
    assert [one["site"] for one in json.loads(done.stdout)["sites"]] == ["sites/onprem", "sites/edge"]
    assert not fleet.datasets
    assert [type(one).__name__ for one in fleet.asked] == ["EstimateDeploymentRequest"]


def test_a_model_that_is_there_is_changed_as_it_was_read(fleet, file):
    fleet.model = pb.Model(name="models/m", etag='"7"', version=3)
    assert RUN.invoke(app, ["deploy", "-y", str(file)]).exit_code == 0
    (update,) = [one for one in fleet.asked if isinstance(one, pb.UpdateModelRequest)]
    assert (update.model.name, update.model.etag) == ("models/m", '"7"')


def test_status_and_undo_say_what_became_of_a_rollout(fleet):
    fleet.model = pb.Model(name="models/m", etag='"7"', version=2)
    fleet.model.sites.add(site="sites/edge", replicas=1)
    fleet.model.rollout.MergeFrom(
        pb.Rollout(state=pb.ROLLOUT_STATE_WATCHING, to_version=2, from_version=1, message="it is watched")
    )
    assert "v2 WATCHING: it is watched" in RUN.invoke(app, ["rollout", "status", "m"]).output
    told = json.loads(RUN.invoke(app, ["rollout", "status", "m", "-o", "json"]).stdout)
    assert (told["version"], told["rollout"]["message"]) == ("2", "it is watched")
    assert "rolled back by user/ann" in RUN.invoke(app, ["rollout", "undo", "-y", "models/m"]).output
    assert fleet.asked[-1].etag == '"7"'


def test_nobody_is_asked_whether_to_go_back_to_nothing(fleet):
    fleet.model = pb.Model(name="models/m", etag='"7"', version=1)
    done = RUN.invoke(app, ["rollout", "undo", "m"])
    assert isinstance(done.exception, FailedPrecondition)
    assert "?" not in done.output


@pytest.mark.parametrize("more", [(), ("-o", "json")])
@pytest.mark.parametrize(("lack", "code"), [("SERVING_LACK_TOKEN", 2), ("SERVING_LACK_UNSPECIFIED", 0)])
def test_a_dry_run_ends_as_deploy_where_nothing_at_a_site_serves_it(fleet, file, monkeypatch, more, lack, code):
    answer = pb.EstimateDeploymentResponse(sites=[pb.SiteEstimate(site="sites/edge", replicas=1)])
    answer.sites[0].sizes.add(gpu_type="L4", gpus=1, site="sites/edge", lack=lack, words="too slow")
    monkeypatch.setattr(fleet, "EstimateDeployment", lambda *_, **__: answer, raising=False)
    done = RUN.invoke(app, ["deploy", str(file), "--dry-run", *more])
    assert done.exit_code == code, done.output
    assert not fleet.datasets
