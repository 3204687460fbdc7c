"""The model of a Ray cluster in the benchmark of a shared pool."""

from benchmarks.ray_pool import Pool, demand, static_halves
from benchmarks.ray_pool_cluster import Cluster, Task, delays
from whaleflux_scheduler.simulation.traces import Row

TOTAL = {"GPU": 2.0, "CPU": 2.0, "gpu_memory": 200.0}


def test_tasks_wait_run_and_begin_anew_when_their_node_goes():
    first, second, large = Task(0.0, 10.0, 1), Task(1.0, 10.0, 1), Task(2.0, 5.0, 2)
    cluster = Cluster([first, second, large])
    cluster.run_until(2.5)
    assert [n for _, n in cluster.demand(1.5).singles] == [2], "what came a moment ago is not told yet"
    assert sorted(n for _, n in cluster.demand(2.5).singles) == [1, 2]
    cluster.join("w1", TOTAL, 3.0)
    assert (first.start_s, second.start_s, large.start_s) == (3.0, 3.0, -1.0)
    (state,) = cluster.states()
    assert (state.status, state.free["GPU"], state.free["gpu_memory"]) == ("RUNNING", 0.0, 0.0)
    cluster.run_until(14.0)
    assert (large.start_s, cluster.busy_gpus) == (13.0, 2)
    cluster.lose("w1")
    assert (large.lost, cluster.gpus) == (1, 0)
    cluster.join("w2", TOTAL, 20.0)
    cluster.run_until(40.0)
    assert delays([first, second, large]) == [2.0, 3.0, 18.0]
    assert not cluster.nodes["w2"].running
    assert cluster.nodes["w2"].idle_s == 25.0


def test_a_pool_does_what_its_tasks_ask_for_and_counts_every_gpu():
    rows = [Row(0.0, 300.0 + n, 1 + n % 2, "q") for n in range(6000)]
    tasks = demand(rows, 240.0, 1)
    halves = static_halves({name: [Task(t.at_s, t.run_s, t.gpus) for t in mine] for name, mine in tasks.items()}, 240.0)
    pool = Pool(tasks, [], 240.0)
    found = pool.run()
    assert found.use.total == halves.use.total == 64 * 240
    assert (found.lost, found.waiting) == (0, 0)
    assert 0 < found.delays_s[-1] <= 10.0, "seen, placed, joined"
    assert found.use.free > 0
    pool.check()
