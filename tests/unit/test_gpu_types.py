"""A GPU type is one entry of one table: job files, drivers, profiles and plans accept what stands there."""

import re
from pathlib import Path

import pytest

from whaleflux.demo.fleet import FLEET as MACHINES
from whaleflux.fleet.gpu_types import CATALOGUE, GPU_TYPES, Catalogue, GpuType, LinkGroup, MachineShape
from whaleflux.fleet.model import LinkKind, Price
from whaleflux.fleet.profile import Profile
from whaleflux.manifests.job_spec import spec_of
from whaleflux.manifests.yaml_files import job_from_yaml, model_from_yaml
from whaleflux_agent.devices.profile import ProfileSource
from whaleflux_scheduler.core.placement.api import Placement
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.request import place_request

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
MADE_UP = GpuType(
    "Q7-300GB",
    memory_bytes=300 * GIB,
    compute_capability=(13, 1),
    products=("NVIDIA Q7 HBM5",),
    machines={
        "q7x2": MachineShape(
            2, (LinkGroup(frozenset({0, 1}), LinkKind.NVLINK, 9e11),), 64_000, GIB, (), 1e11, Price(usd_per_gpu_hour=9)
        )
    },
)
WITH_MADE_UP = Catalogue((*GPU_TYPES, MADE_UP))
JOB = "run: python train.py\ngpus: 2\ngpu: Q7-300GB\n"


@pytest.mark.parametrize("gpu", [*GPU_TYPES, MADE_UP], ids=lambda gpu: gpu.name)
def test_a_type_is_known_by_each_product_name_and_by_its_own(gpu):
    assert gpu.products
    for product in gpu.products:
        assert WITH_MADE_UP.name_of(product, gpu.memory_bytes) == gpu.name
    assert list(job_from_yaml(f"run: x\ngpus: 1\ngpu: {gpu.name}\n", ROOT).spec.gpu.any_of) == [gpu.name]


async def test_one_entry_is_enough_for_the_driver_the_profile_the_files_and_the_plan(tmp_path):
    spec = spec_of(job_from_yaml(JOB, tmp_path).spec)
    model = model_from_yaml("model: m\nengine: {image: i}\nreplicas: {on: [Q7-300GB]}\n", tmp_path).model
    assert list(model.engine.gpu_models) == [MADE_UP.name]
    # A driver that names the size differently is still of the family that the entry made known.
    assert WITH_MADE_UP.name_of("NVIDIA Q7", int(296.5 * GIB)) == MADE_UP.name
    engine = Engine()
    for name, node in (("h200x8", "sites/s/nodes/other"), ("q7x2", "sites/s/nodes/new")):
        machine = await ProfileSource(Profile.load(name, WITH_MADE_UP)).read(node)
        engine.upsert_node(machine.node)
    plan = engine.place(place_request("job", spec))
    assert isinstance(plan, Placement), plan
    assert plan.node_names == ("sites/s/nodes/new",)


def test_names_of_types_profiles_and_products_are_distinct():
    names = [gpu.name for gpu in GPU_TYPES]
    products = [product for gpu in GPU_TYPES for product in gpu.products]
    machines = [name for gpu in GPU_TYPES for name in gpu.machines]
    for words in (names, products, machines):
        assert len(set(words)) == len(words)


def test_what_is_played_or_asked_for_in_examples_and_deployments_is_in_the_table():
    played, asked = {machine.profile for machine in MACHINES}, set()
    for file in (ROOT / "deploy").rglob("*.yaml"):
        played |= set(re.findall(r"WHALEFLUX_PROFILE(?:: |, value: )([\w.]+)", file.read_text()))
    for file in (ROOT / "examples").rglob("*job*.yaml"):
        asked |= set(job_from_yaml(file.read_text(), file.parent).spec.gpu.any_of)
    for file in (ROOT / "examples").rglob("*model*.yaml"):
        asked |= set(model_from_yaml(file.read_text(), file.parent).model.engine.gpu_models)
    assert {"h200x8", "rtx4090x2"} <= played
    assert played <= set(CATALOGUE.profiles())
    assert asked
    assert asked <= set(CATALOGUE.types)


def test_no_other_place_of_the_code_names_a_type():
    """Docstrings, comments and texts may give one as an example; a table elsewhere would be a second list."""
    families = {re.split(r"-\d+GB", gpu.name)[0] for gpu in GPU_TYPES}
    word = re.compile(r"[\"'](" + "|".join(sorted(families)) + r")(-\d+GB)?[\"']")
    for folder in ("libs/whaleflux", "services"):
        for file in (ROOT / folder).rglob("*.py"):
            if file.name == "gpu_types.py" or "/v1/" in str(file):
                continue
            code = re.sub(r'""".*?"""|#.*', "", file.read_text(), flags=re.DOTALL)
            assert not word.findall(code), f"{file.relative_to(ROOT)} names a GPU type; use fleet.gpu_types"


@pytest.mark.parametrize("gpu", [gpu for gpu in GPU_TYPES if gpu.speed], ids=lambda gpu: gpu.name)
def test_a_speed_is_that_of_the_card(gpu):
    """Drivers report a little less than the label in GiB; nothing measured is more than the data sheet; fewer bits are never slower."""
    speed = gpu.speed
    assert 0.92 * gpu.memory_bytes < speed.nvml_bytes <= gpu.memory_bytes
    assert all(measured < speed.flops[precision] for precision, measured in speed.best.items())
    assert speed.best_flops("bf16") <= speed.best_flops("fp8") <= speed.best_flops("fp4")
    assert (speed.nvlink_domain > 1) == (speed.nvlink_bytes_per_s > 0)
